"""The contract of a base: all that a new family of frozen text-to-image models has to write.

Image tokens are an argument of :meth:`Base.predict`, never state kept on a module: activation checkpointing recomputes
the forward after such state is gone, and then returns wrong gradients without an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from ipa_train.adapter.projector import FeatureKind, NullImage
from ipa_train.adapter.sites import AttentionSite
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.bases.vae import FrozenVAE
from ipa_train.diffusion.schedule import NoiseSchedule, PredictionType
from ipa_train.errors import ConfigError


@dataclass(frozen=True)
class TextConditioning:
    """Encoded captions."""

    context: Float[Tensor, "b l d"]
    """Token states that attention reads."""
    pooled: Float[Tensor, "b p"] | None = None
    """One vector per caption, for families that use it."""

    @staticmethod
    def cat(parts: Sequence["TextConditioning"]) -> "TextConditioning":
        """Join batches."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextConditioning(torch.cat([part.context for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class MicroConditioning:
    """What SDXL is told of a picture's making, in pixels (height, width); other families ignore it."""

    original_sizes: Int64[Tensor, "b 2"]
    crop_top_lefts: Int64[Tensor, "b 2"]
    target_sizes: Int64[Tensor, "b 2"]

    @staticmethod
    def uncropped(size: tuple[int, int], count: int, device: torch.device) -> "MicroConditioning":
        """What pipelines say of pictures that they are to make: of this (height, width), and not cropped."""
        sizes = torch.tensor([size] * count, device=device)
        return MicroConditioning(sizes, torch.zeros_like(sizes), sizes)


Block = Callable[..., Any]
"""What runs one of the blocks that a denoiser repeats."""


class Base(nn.Module, ABC):
    """A frozen text-to-image model. Its weights never require gradients and it always stays in eval mode."""

    pipeline_class: ClassVar[str]
    """``_class_name`` in the ``model_index.json`` of its folders."""
    prediction_type: PredictionType
    schedule: NoiseSchedule
    """How noise was mixed into the latents it was trained on; an objective may set another, for ``sampler`` too."""
    context_dim: int
    """Width of the image tokens that its attention takes; in UNets that of the text tokens."""
    vae: FrozenVAE
    """What makes latents of pictures."""
    path: str
    """Folder or hub id it was loaded from."""
    dtype: torch.dtype
    """Precision of the denoiser."""

    @classmethod
    def load_vae(
        cls,
        path: str,
        *,
        dtype: str = "bfloat16",
        vae_dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        **_: Any,
    ) -> FrozenVAE:
        """Load the autoencoder alone, by the options of ``from_pretrained``."""
        return FrozenVAE.from_pretrained(path, dtype=vae_dtype or dtype, revision=revision, variant=variant)

    @property
    def size_multiple(self) -> int:
        """Height and width of pictures must be multiples of this, in pixels."""
        return self.vae.stride

    @property
    def max_size(self) -> int | None:
        """Height and width of pictures may be at most this, in pixels; None: anything."""
        return None

    def null_image(self, kind: FeatureKind) -> NullImage:
        """What stands for "no image" in this family's diffusers pipelines, and so in training."""
        return "zero_features" if kind == "pooled" else "zero_pixels"

    def null_text(self, count: int) -> TextConditioning:
        """What this family's diffusers pipelines guide away from, where no negative prompt is given."""
        return self.encode_text([""] * count)

    def timestep_shift(self, latent_size: tuple[int, int]) -> float:
        """How far timesteps are shifted towards the noise for latents of (height, width); see ``Timesteps``."""
        return 1.0

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """Tokenise and encode; the empty caption is the "no text" condition."""

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """The attentions an adapter extends, in the order of interchange files."""

    def low_rank_sites(self, rank: int) -> list[AttentionSite]:
        """Every attention, self-attentions too, to attach low-rank updates of its layers to.

        Raises:
            ConfigError: no layout of adapter files for this family holds any.
        """
        raise ConfigError(
            f"adapter.sites.lora_rank={rank}: a LoRA goes with adapters of UNets, not {self.pipeline_class}."
        )

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The model that ``predict`` runs."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The denoiser's blocks where ``predict`` calls each as a module, and reads its weights nowhere else."""
        return ()

    @abstractmethod
    def wrap_blocks(self, wrap: Callable[[Block], Block]) -> None:
        """Let ``predict`` run ``wrap(block)`` in place of each block that the denoiser repeats.

        For what acts on blocks: checkpointing of activations, compilation. Blocks take all that they read as
        arguments, image tokens too.
        """

    @abstractmethod
    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Num[Tensor, "b"],
        text: TextConditioning,
        image_tokens: ImageTokens | None,
        micro: MicroConditioning | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One denoiser forward, returned in fp32; ``image_tokens=None`` is the base model alone."""

    @abstractmethod
    def sampler(self, num_steps: int, latent_size: tuple[int, int]) -> Any:
        """A diffusers scheduler set to ``num_steps``, that turns predictions into latents of (height, width)."""

    @abstractmethod
    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline on these very weights."""

    def load_adapter(self, pipeline: Any, parts: dict[str, dict[str, Tensor]]) -> None:
        """Give an adapter's tensors (``image_proj`` and ``ip_adapter``) to the loader of :meth:`pipeline`."""
        pipeline.load_ip_adapter(parts, subfolder="", weight_name="", image_encoder_folder=None)

    @abstractmethod
    def image_arguments(
        self,
        pipeline: Any,
        image_features: Sequence[Float[Tensor, "n *_"]],
        null_features: Sequence[Float[Tensor, "1 *_"]],
        *,
        guided: bool,
    ) -> dict[str, Any]:
        """What to call :meth:`pipeline` with for one picture that follows n image prompts, given by their features.

        ``guided``: whether the pipeline runs an unconditional half too.

        Raises:
            ConfigError: the family's pipeline takes no several image prompts.
        """

    def train(self, mode: bool = True) -> "Base":
        """Stay in eval mode: a frozen model has no training behaviour (dropout, batch statistics)."""
        return super().train(False)
