"""Dropping conditions in training, so that classifier-free guidance works at inference."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ipa_train.errors import ConfigError
from ipa_train.runtime.device import send
from ipa_train.runtime.seeding import Draws


@dataclass(frozen=True)
class Dropped:
    """Which samples lose which condition; a sample of the "both" case is in both masks. They lie on the host."""

    text: Bool[Tensor, "b"]
    image: Bool[Tensor, "b"]

    def captions(self, captions: Sequence[str]) -> list[str]:
        """The captions, empty where the text is dropped: the empty caption is the base's "no text"."""
        return ["" if gone else caption for caption, gone in zip(captions, self.text.tolist(), strict=True)]

    def image_features(
        self, image_features: Sequence[Float[Tensor, "b *_"]], null_features: Sequence[Float[Tensor, "1 *_"]]
    ) -> tuple[Float[Tensor, "b *_"], ...]:
        """The features of each kind, replaced by the encoder's "no image" where the image is dropped."""
        return tuple(
            torch.where(send(self.image, features.device).reshape(-1, *[1] * (features.ndim - 1)), null, features)
            for features, null in zip(image_features, null_features, strict=True)
        )


class ConditionDropout:
    """One categorical draw per sample: drop the text, the image, both, or nothing (0.05 each in the paper).

    Independent draws for text and image would give "both" only at the product of their rates.
    """

    def __init__(self, *, text_rate: float = 0.05, image_rate: float = 0.05, both_rate: float = 0.05) -> None:
        rates = {"text_rate": text_rate, "image_rate": image_rate, "both_rate": both_rate}
        for name, rate in rates.items():
            if not 0.0 <= rate <= 1.0:
                raise ConfigError(f"dropout.{name} must be between 0 and 1, got {rate}.")
        if sum(rates.values()) > 1.0:
            raise ConfigError(f"dropout: the rates must add up to at most 1, got {rates}.")
        self.text_rate, self.image_rate, self.both_rate = text_rate, image_rate, both_rate

    def draw(self, draws: Draws) -> Dropped:
        """Return the masks for a batch."""
        u = draws.uniform("dropout")
        text_only = u < self.text_rate
        image_only = (u >= self.text_rate) & (u < self.text_rate + self.image_rate)
        both = (u >= self.text_rate + self.image_rate) & (u < self.text_rate + self.image_rate + self.both_rate)
        return Dropped(text=text_only | both, image=image_only | both)
