"""One adapter tried by hand: a picture by its image prompts beside the same seed without them."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ipa_train.errors import ConfigError
from ipa_train.eval.generate import seeds
from ipa_train.eval.layers import Layers, layer_scale
from ipa_train.eval.pipeline import AdapterPipeline


@dataclass(frozen=True)
class Settings:
    """What a picture is drawn by, beside its image prompts."""

    base: str
    """Folder or hub id."""
    prompt: str
    scale: float
    layers: Layers
    seed: int
    num_inference_steps: int
    guidance_scale: float
    size: int
    """Height and width, in pixels."""


class Playground:
    """Draws with one adapter on any of its bases, of which the last used stays in memory."""

    def __init__(self, load: Callable[[str], AdapterPipeline]) -> None:
        self._load = load
        self._loaded: tuple[str, AdapterPipeline] | None = None
        self._reference: tuple[Settings, Image.Image] | None = None

    def pipeline(self, base: str) -> AdapterPipeline:
        """The adapter on this base, loaded now unless it is the one in memory.

        Raises:
            ConfigError, ExportError: it cannot be loaded, or the adapter does not fit it.
        """
        if self._loaded is None or self._loaded[0] != base:
            self._loaded = None  # first, since two may not fit into memory together
            _release_memory()
            pipeline = self._load(base)
            pipeline.pipeline.set_progress_bar_config(disable=True)
            self._loaded = (base, pipeline)
        return self._loaded[1]

    def draw(
        self,
        settings: Settings,
        pictures: Sequence[Image.Image],
        embeddings: Float[Tensor, "n *s f"] | None,
        on_progress: Callable[[int, int], None],
    ) -> tuple[Image.Image, Image.Image]:
        """The picture, and the one of the same settings at scale 0, which is drawn anew only when they change.

        ``on_progress`` is called with the steps done and the number of all.

        Raises:
            ConfigError: an image prompt is missing or of the wrong kind, or the base cannot draw by these settings.
        """
        loaded = self.pipeline(settings.base)
        loaded.check(size=settings.size, num_inference_steps=settings.num_inference_steps)
        _check_image_prompts(loaded, len(pictures), 0 if embeddings is None else len(embeddings))
        features = loaded.features(pictures, embeddings)
        unprompted = replace(settings, scale=0.0, layers="all")
        known = self._reference is not None and self._reference[0] == unprompted
        todo = [settings] if known else [settings, unprompted]
        drawn = []
        for i, wanted in enumerate(todo):

            def step_end(
                _: Any, step: int, __: Any, tensors: Mapping[str, Any], done: int = i * settings.num_inference_steps
            ) -> Mapping[str, Any]:
                on_progress(done + step + 1, len(todo) * settings.num_inference_steps)
                return tensors

            drawn += loaded.draw(
                wanted.prompt,
                features,
                scale=layer_scale(loaded.base, wanted.layers, wanted.scale),
                guidance_scale=wanted.guidance_scale,
                height=wanted.size,
                width=wanted.size,
                num_inference_steps=wanted.num_inference_steps,
                generator=seeds(wanted.seed, 1),
                callback_on_step_end=step_end,
            )
        if not known:
            self._reference = (unprompted, drawn[1])
        assert self._reference is not None
        return drawn[0], self._reference[1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had none left, which the host's allocator says in words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _release_memory() -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_image_prompts(loaded: AdapterPipeline, num_pictures: int, num_embeddings: int) -> None:
    encoder = loaded.image_encoder
    sees, stored = encoder.image_size is not None, encoder.embedding_shape is not None
    if sees and not num_pictures:
        raise ConfigError("there is no image prompt: add a picture.")
    if stored and not num_embeddings:
        raise ConfigError("there is no embedding: add the .npy of each image prompt.")
    if sees and stored and num_pictures != num_embeddings:
        raise ConfigError(
            f"each image prompt needs a picture and its embedding, got {num_pictures} and {num_embeddings}."
        )
