"""How pictures are drawn to be scored; by default as in the paper (arXiv 2308.06721, 4.1.2)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ipa_train.errors import ConfigError

TEXTS = ("none", "caption")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What decides, with the models and the data set, which pictures are drawn."""

    text: str = "none"
    """``none``: image prompts alone, as in the paper's Table 1; ``caption``: with the picture's caption."""
    scales: Sequence[float] = (1.0,)
    """Weights of the image prompt, the paper's lambda."""
    num_samples: int = 4
    """For each picture and scale."""
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    size: int | None = None
    """Height and width in pixels; None is the base's own."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise ConfigError(f"--text must be one of {', '.join(TEXTS)}, got {self.text!r}.")
        if self.num_samples < 1:
            raise ConfigError(f"--num-samples must be at least 1, got {self.num_samples}.")
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ConfigError(f"--scales must be different numbers, got {' '.join(map(str, self.scales))}.")

    def seeds(self, picture_id: str) -> list[int]:
        """The seed of each sample of a picture, the same for all scales, so that they can be compared.

        Of the picture's id and the sample's number alone: not of order, of ranks, or of which other pictures there are.
        """
        return [_hash(f"{self.seed}/{picture_id}/{sample}") for sample in range(self.num_samples)]

    def facts(self) -> dict[str, Any]:
        """In plain values."""
        return {**asdict(self), "scales": list(self.scales)}


def comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What two results must have in common to be put side by side: all but what is compared."""
    free = ("adapter", "base", "image_encoder", "dtype", "scales", "versions")
    return {name: value for name, value in facts.items() if name not in free}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
