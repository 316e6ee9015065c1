"""Stable Diffusion 3 and 3.5."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from ipa_train.adapter.joint_attention import JointImageAttention
from ipa_train.adapter.projector import FeatureKind, NullImage
from ipa_train.adapter.sites import AttentionSite
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.bases.base import Base, Block, MicroConditioning, TextConditioning
from ipa_train.bases.folders import loading, require_pipeline_class
from ipa_train.bases.tokens import token_ids
from ipa_train.bases.vae import FrozenVAE
from ipa_train.diffusion.schedule import RectifiedFlow
from ipa_train.errors import ConfigError
from ipa_train.runtime.precision import to_dtype

_log = logging.getLogger(__name__)


def sd3_attention_sites(transformer: SD3Transformer2DModel) -> list[AttentionSite]:
    """All attentions of the transformer, numbered without gaps in the order of interchange files.

    That order is ``transformer.attn_processors``: 38 in SD 3.5 large; 37 in medium, whose first 13 blocks have a second
    attention (over latents alone) each, numbered right after the block's first. diffusers' loader wants every one.
    """
    sites = []
    for index, name in enumerate(transformer.attn_processors):
        path = name.removesuffix(".processor")
        module = transformer.get_submodule(path)
        dim = module.to_k.weight.shape[0]
        sites.append(AttentionSite(path, index, dim, transformer.inner_dim, module, JointImageAttention))
    return sites


class StableDiffusion3(Base):
    """A frozen SD 3, 3.5 medium or 3.5 large: rectified flow; text from two CLIP encoders and T5."""

    pipeline_class = "StableDiffusion3Pipeline"
    prediction_type = "flow"

    def __init__(
        self,
        *,
        transformer: SD3Transformer2DModel,
        vae: FrozenVAE,
        text_encoder: CLIPTextModelWithProjection,
        text_encoder_2: CLIPTextModelWithProjection,
        text_encoder_3: T5EncoderModel | None,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        tokenizer_3: Any,
        scheduler: FlowMatchEulerDiscreteScheduler,
        path: str = "",
        max_t5_tokens: int = 256,
    ) -> None:
        super().__init__()
        if not 1 <= max_t5_tokens <= 512:
            raise ConfigError(f"base.max_t5_tokens must be between 1 and 512, got {max_t5_tokens}.")
        self.transformer, self.vae, self.scheduler, self.path = transformer, vae, scheduler, path
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.text_encoder_3, self.tokenizer_3 = text_encoder_3, tokenizer_3
        self.max_t5_tokens = max_t5_tokens
        self.schedule = RectifiedFlow()
        self.context_dim = transformer.inner_dim
        self.dtype = transformer.dtype
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: str = "bfloat16",
        vae_dtype: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        t5: bool = True,
        max_t5_tokens: int = 256,
    ) -> "StableDiffusion3":
        """Load from a diffusers folder or hub id.

        Args:
            path: folder with ``model_index.json``, or hub id.
            dtype: precision of the frozen transformer and text encoders.
            vae_dtype: precision of the VAE; ``dtype`` unless given.
            revision: branch, tag or commit of a hub id.
            variant: ``fp16`` and the like, for folders that hold several sets of weights.
            t5: load the third text encoder (9 GB in bf16); without it its tokens are zeros, as in diffusers.
            max_t5_tokens: length that captions are padded and cut to for T5, at most 512; pipelines have 256.

        Raises:
            ConfigError: no diffusers folder there, one of another family, or an option out of range.
        """
        require_pipeline_class(path, cls.pipeline_class, revision=revision)
        where: dict[str, Any] = {"revision": revision, "variant": variant}
        precision = to_dtype(dtype, option="base.dtype")
        with loading(path):
            if t5 and DiffusionPipeline.load_config(path, revision=revision).get("text_encoder_3") in (
                None,
                [None] * 2,
            ):
                _log.warning("base.path=%s has no third text encoder (T5): its tokens are zeros, as in diffusers", path)
                t5 = False
            clip_1, clip_2 = (
                CLIPTextModelWithProjection.from_pretrained(path, subfolder=name, dtype=precision, **where)
                for name in ("text_encoder", "text_encoder_2")
            )
            tokenizer_1, tokenizer_2 = (
                CLIPTokenizer.from_pretrained(path, subfolder=name, revision=revision)
                for name in ("tokenizer", "tokenizer_2")
            )
            return cls(
                transformer=SD3Transformer2DModel.from_pretrained(
                    path, subfolder="transformer", torch_dtype=precision, **where
                ),
                vae=cls.load_vae(path, dtype=dtype, vae_dtype=vae_dtype, **where),
                text_encoder=clip_1,
                text_encoder_2=clip_2,
                text_encoder_3=T5EncoderModel.from_pretrained(
                    path, subfolder="text_encoder_3", dtype=precision, **where
                )
                if t5
                else None,
                tokenizer=tokenizer_1,
                tokenizer_2=tokenizer_2,
                tokenizer_3=AutoTokenizer.from_pretrained(path, subfolder="tokenizer_3", revision=revision)
                if t5
                else None,
                scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
                    path, subfolder="scheduler", revision=revision
                ),
                path=str(path),
                max_t5_tokens=max_t5_tokens,
            )

    @property
    def size_multiple(self) -> int:
        """Height and width of pictures must be multiples of this: whole patches of latents."""
        return self.vae.stride * int(self.transformer.config.patch_size)

    @property
    def max_size(self) -> int:
        """Its table of positions ends there."""
        return self.size_multiple * int(self.transformer.config.pos_embed_max_size)

    def null_image(self, kind: FeatureKind) -> NullImage:
        """Zeros in place of the features, also of hidden states."""
        return "zero_features"

    def timestep_shift(self, latent_size: tuple[int, int]) -> float:
        """The scheduler's: 3, or growing with the picture where the folder asks for dynamic shifting."""
        mu = self._dynamic_shift(latent_size)
        if mu is None:
            return float(self.scheduler.config.shift)
        return mu if self.scheduler.config.time_shift_type == "linear" else math.exp(mu)

    def _dynamic_shift(self, latent_size: tuple[int, int]) -> float | None:
        """``mu`` of the pipeline, for schedulers that want one."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        height, width = (edge // self.transformer.config.patch_size for edge in latent_size)
        ends = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        return float(calculate_shift(height * width, *ends))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """The two CLIP encoders' states side by side, padded with zeros to T5's width; then those of T5."""
        captions = list(captions)
        (states_1, pooled_1), (states_2, pooled_2) = (
            self._clip(encoder, tokenizer, captions)
            for encoder, tokenizer in ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        )
        t5 = self._t5(captions)
        clip = torch.cat([states_1, states_2], dim=-1)
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return TextConditioning(torch.cat([clip, t5], dim=1), torch.cat([pooled_1, pooled_2], dim=-1))

    def _clip(
        self, encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states before the last layer, and the projected vector of each caption."""
        tokens = token_ids(tokenizer, captions, device=encoder.device, length=self.tokenizer.model_max_length)
        output = encoder(tokens, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    def _t5(self, captions: list[str]) -> Tensor:
        length, device = self.max_t5_tokens, self.text_encoder.device
        if self.text_encoder_3 is None:
            shape = (len(captions), length, self.transformer.config.joint_attention_dim)
            return torch.zeros(shape, device=device, dtype=self.text_encoder.dtype)
        tokens = token_ids(self.tokenizer_3, captions, device=device, length=length)
        return cast(Tensor, self.text_encoder_3(tokens)[0])

    def attention_sites(self) -> list[AttentionSite]:
        """All attentions, in the order of interchange files."""
        return sd3_attention_sites(self.transformer)

    @property
    def denoiser(self) -> SD3Transformer2DModel:
        """The transformer."""
        return self.transformer

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks."""
        return list(self.transformer.transformer_blocks)

    def wrap_blocks(self, wrap: Callable[[Block], Block]) -> None:
        """The transformer blocks."""
        for block in self.blocks:
            block.forward = wrap(block.forward)

    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Num[Tensor, "b"],
        text: TextConditioning,
        image_tokens: ImageTokens | None,
        micro: MicroConditioning | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One transformer forward: the velocity from latents to noise."""
        assert text.pooled is not None
        extra = None
        if image_tokens is not None:
            extra = {"ip_hidden_states": image_tokens.states, "temb": image_tokens.time_embedding}
        prediction = self.transformer(
            hidden_states=noisy_latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=text.context.to(self.dtype),
            pooled_projections=text.pooled.to(self.dtype),
            joint_attention_kwargs=extra,
        )
        return cast(Tensor, prediction.sample.float())

    def sampler(self, num_steps: int, latent_size: tuple[int, int]) -> FlowMatchEulerDiscreteScheduler:
        """Euler steps along the flow, shifted as the folder's scheduler says."""
        sampler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(num_steps, mu=self._dynamic_shift(latent_size))
        return sampler

    def pipeline(self) -> StableDiffusion3Pipeline:
        """A diffusers pipeline on these very weights."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config),
            vae=self.vae.model,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            text_encoder_3=self.text_encoder_3,
            tokenizer_3=self.tokenizer_3,
        )

    def image_arguments(
        self,
        pipeline: Any,
        image_features: Sequence[Float[Tensor, "n *_"]],
        null_features: Sequence[Float[Tensor, "1 *_"]],
        *,
        guided: bool,
    ) -> dict[str, Any]:
        """The hidden states of one image prompt, unconditional half first."""
        (features,), (null,) = image_features, null_features
        if len(features) != 1:
            raise ConfigError(f"the SD 3 pipeline takes one image prompt at a time, got {len(features)}.")
        return {"ip_adapter_image_embeds": torch.cat([null, features] if guided else [features]).to(self.dtype)}
