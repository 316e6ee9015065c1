"""Where image attention attaches: one entry for each attention of a denoiser that is extended; and what attaches there.

A family whose attentions work in another way writes a branch of its own (``attention.py`` holds that of UNets).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import nn

from ipa_train.adapter.projector import Projector


@runtime_checkable
class Processor(Protocol):
    """Takes the place of an attention's ``processor``."""

    scale: float
    """Weight of the image half (lambda in the paper); 0 skips it, so the base's output is kept bit for bit."""


class ImageBranch(nn.Module, ABC):
    """The trained half of one site. Its parameters have the names of interchange files."""

    unexportable: ClassVar[str | None] = None
    """Why no loader takes an adapter of such branches; None where they do."""
    takes_time: ClassVar[bool] = False
    """Whether it wants the time embedding that a ``TimeResampler`` gives."""

    @classmethod
    @abstractmethod
    def for_site(cls, site: "AttentionSite", projector: Projector) -> "ImageBranch":
        """A branch that fits the site and the projector's tokens, with the weights training starts from."""

    @abstractmethod
    def processor(self, site: "AttentionSite") -> Processor:
        """What runs the site's attention with this branch added.

        Not an ``nn.Module``: the adapter owns the weights, and a frozen base that registered them would cast, freeze
        and save them with its own.
        """


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the frozen denoiser that the adapter extends."""

    name: str
    """Module path in the denoiser, e.g. ``down_blocks.0.attentions.0.transformer_blocks.0.attn2``."""
    index: int
    """The site's number in interchange files: in UNets its place among all attentions (1, 3, 5, ...)."""
    hidden_dim: int
    """Width of the keys and values (heads x head width)."""
    context_dim: int
    """Width of the image tokens; in UNets that of the text tokens."""
    module: Any
    """The attention module: has ``to_q, to_k, to_v, to_out, heads`` and takes another ``processor``."""
    branch: type[ImageBranch]
    """What attaches here."""
