"""Flux: dev (guidance-distilled) and schnell."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from jaxtyping import Float, Num
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from ipa_train.adapter.flux_attention import FluxImageAttention
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

_MAX_T5_TOKENS = 512
_PATCH = 2


def flux_attention_sites(transformer: FluxTransformer2DModel) -> list[AttentionSite]:
    """The attentions of the double-stream blocks, numbered 0, 1, 2, ...; diffusers extends no others."""
    context_dim = transformer.config.joint_attention_dim
    return [
        AttentionSite(
            f"transformer_blocks.{i}.attn", i, transformer.inner_dim, context_dim, block.attn, FluxImageAttention
        )
        for i, block in enumerate(transformer.transformer_blocks)
    ]


class Flux(Base):
    """A frozen FLUX.1: rectified flow, a pooled CLIP caption and T5 tokens, 19 double-stream blocks with image tokens.

    Latents are (b, 16, h, w) as the VAE makes them; the transformer's 2 x 2 patches are made of them in ``predict``.
    """

    pipeline_class = "FluxPipeline"
    prediction_type = "flow"

    def __init__(
        self,
        *,
        transformer: FluxTransformer2DModel,
        vae: FrozenVAE,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5Tokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        path: str = "",
        guidance: float | None = None,
        max_t5_tokens: int = _MAX_T5_TOKENS,
    ) -> None:
        super().__init__()
        channels, patch_dim = transformer.config.in_channels, _PATCH**2 * vae.num_channels
        if channels != patch_dim:
            raise ConfigError(
                f"base.path={path}: its transformer takes {channels} channels, not the {patch_dim} of noisy latents "
                "alone (Fill and Control models do); give a FLUX.1 dev or schnell."
            )
        if guidance is not None and not transformer.config.guidance_embeds:
            raise ConfigError(
                f"base.guidance={guidance}, but this model is not guidance-distilled (schnell is not): "
                "set base.guidance=null."
            )
        if not 1 <= max_t5_tokens <= _MAX_T5_TOKENS:
            raise ConfigError(f"base.max_t5_tokens must be between 1 and {_MAX_T5_TOKENS}, got {max_t5_tokens}.")
        self.transformer, self.vae, self.scheduler, self.path = transformer, vae, scheduler, path
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        self.guidance = 1.0 if guidance is None and transformer.config.guidance_embeds else guidance
        self.max_t5_tokens = max_t5_tokens
        self.schedule = RectifiedFlow()
        self.context_dim = transformer.config.joint_attention_dim
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
        guidance: float | None = None,
        max_t5_tokens: int = _MAX_T5_TOKENS,
    ) -> "Flux":
        """Load from a diffusers folder or hub id.

        Args:
            path: folder with ``model_index.json``, or hub id.
            dtype: precision of the frozen transformer and text encoders.
            vae_dtype: precision of the VAE; ``dtype`` unless given.
            revision: branch, tag or commit of a hub id.
            variant: ``fp16`` and the like, for folders that hold several sets of weights.
            guidance: the guidance scale that a guidance-distilled model (dev) is told, in training and in pictures
                drawn with it; 1 unless given, where it predicts the plain velocity that the objective asks for.
                Others (schnell) are told none.
            max_t5_tokens: captions are padded or cut to this many T5 tokens, at most 512.

        Raises:
            ConfigError: no diffusers folder there, one of another family, or options that do not go with it.
        """
        require_pipeline_class(path, cls.pipeline_class, revision=revision)
        where: dict[str, Any] = {"revision": revision, "variant": variant}
        precision = to_dtype(dtype, option="base.dtype")
        with loading(path):
            return cls(
                transformer=FluxTransformer2DModel.from_pretrained(
                    path, subfolder="transformer", torch_dtype=precision, **where
                ),
                vae=cls.load_vae(path, dtype=dtype, vae_dtype=vae_dtype, **where),
                text_encoder=CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=precision, **where),
                tokenizer=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", revision=revision),
                text_encoder_2=T5EncoderModel.from_pretrained(
                    path, subfolder="text_encoder_2", dtype=precision, **where
                ),
                tokenizer_2=T5Tokenizer.from_pretrained(path, subfolder="tokenizer_2", revision=revision),
                scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
                    path, subfolder="scheduler", revision=revision
                ),
                path=str(path),
                guidance=guidance,
                max_t5_tokens=max_t5_tokens,
            )

    @property
    def size_multiple(self) -> int:
        """Pixels of a patch of latents."""
        return _PATCH * self.vae.stride

    def null_image(self, kind: FeatureKind) -> NullImage:
        """A black picture: FluxPipeline's, where true guidance has no negative image prompt."""
        return "black_image"

    def timestep_shift(self, latent_size: tuple[int, int]) -> float:
        """The scheduler's: exp(mu) for so many patches where it asks for that (dev), else its constant (1, schnell)."""
        config = self.scheduler.config
        return math.exp(self._mu(latent_size)) if config.use_dynamic_shifting else float(config.shift)

    def _mu(self, latent_size: tuple[int, int]) -> float:
        config = self.scheduler.config
        return float(
            calculate_shift(
                latent_size[0] * latent_size[1] // _PATCH**2,
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
        )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextConditioning:
        """T5's last hidden states as the context, padding included as in the pipeline, and CLIP's pooled caption."""
        device = self.transformer.device
        clip = token_ids(self.tokenizer, captions, device=device)
        t5 = token_ids(self.tokenizer_2, captions, device=device, length=self.max_t5_tokens)
        return TextConditioning(self.text_encoder_2(t5)[0], self.text_encoder(clip).pooler_output)

    def attention_sites(self) -> list[AttentionSite]:
        """The double-stream attentions, in the order of interchange files."""
        return flux_attention_sites(self.transformer)

    @property
    def denoiser(self) -> FluxTransformer2DModel:
        """The transformer."""
        return self.transformer

    @property
    def blocks(self) -> list[nn.Module]:
        """The double-stream and the single-stream ones."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

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
        """One transformer forward over the latents' patches."""
        count, rows, columns = len(noisy_latents), noisy_latents.shape[2] // _PATCH, noisy_latents.shape[3] // _PATCH
        device, pooled = noisy_latents.device, cast(Tensor, text.pooled)
        y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
        # An argument of every attention; those of single-stream blocks ignore this name without a warning.
        extra = None if image_tokens is None else {"ip_hidden_states": image_tokens.states.to(self.dtype)}
        patches = F.pixel_unshuffle(noisy_latents.to(self.dtype), _PATCH).flatten(2).transpose(1, 2)
        prediction = self.transformer(
            hidden_states=patches,
            timestep=timesteps.to(self.dtype) / self.schedule.num_timesteps,  # rounded as in the pipeline
            guidance=None if self.guidance is None else torch.full((count,), self.guidance, device=device),
            pooled_projections=pooled.to(self.dtype),
            encoder_hidden_states=text.context.to(self.dtype),
            txt_ids=torch.zeros(text.context.shape[1], 3, device=device),
            img_ids=F.pad(torch.cartesian_prod(y, x), (1, 0)),
            joint_attention_kwargs=extra,
        )
        prediction = prediction.sample.float().transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(prediction, _PATCH)

    def sampler(self, num_steps: int, latent_size: tuple[int, int]) -> FlowMatchEulerDiscreteScheduler:
        """Euler steps over evenly spaced noise levels, shifted as in FluxPipeline."""
        sampler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        sampler.set_timesteps(sigmas=[1.0 - i / num_steps for i in range(num_steps)], mu=self._mu(latent_size))
        return sampler

    def pipeline(self) -> FluxPipeline:
        """A diffusers pipeline on these very weights."""
        return FluxPipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config),
            vae=self.vae.model,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
        )

    def load_adapter(self, pipeline: Any, parts: dict[str, dict[str, Tensor]]) -> None:
        """As for every base, under this pipeline's own names of the arguments."""
        pipeline.load_ip_adapter(parts, weight_name="", image_encoder_pretrained_model_name_or_path=None)

    def image_arguments(
        self,
        pipeline: Any,
        image_features: Sequence[Float[Tensor, "n *_"]],
        null_features: Sequence[Float[Tensor, "1 *_"]],
        *,
        guided: bool,
    ) -> dict[str, Any]:
        """The embeddings, and "no image" beside them: the pipeline would else encode a black picture by itself."""
        (features,), (null,) = image_features, null_features
        return {
            "ip_adapter_image_embeds": [features.to(self.dtype)[None]],
            "negative_ip_adapter_image_embeds": [null.to(self.dtype).expand_as(features)[None]],
        }
