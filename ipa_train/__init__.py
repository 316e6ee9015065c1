"""Train IP-Adapters: image prompts for frozen text-to-image diffusion models (arXiv 2308.06721)."""

from ipa_train.version import __version__

__all__ = ["__version__"]
