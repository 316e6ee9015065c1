"""What all bases with a diffusers UNet share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from jaxtyping import Float, Num
from torch import Tensor, nn

from ipa_train.adapter.attention import ImageAttention
from ipa_train.adapter.lora import LowRankSite, LowRankUpdate
from ipa_train.adapter.sites import AttentionSite
from ipa_train.adapter.tokens import ImageTokens
from ipa_train.bases.base import Base, Block, MicroConditioning, TextConditioning
from ipa_train.bases.unet_forward import UNetForward
from ipa_train.bases.vae import FrozenVAE
from ipa_train.diffusion.schedule import VariancePreserving
from ipa_train.errors import ConfigError


def ddim_scheduler(path: str, *, revision: str | None = None) -> DDIMScheduler:
    """The noise schedule of a folder or hub id, whichever scheduler that names.

    Raises:
        ConfigError: one of another kind of noise (EDM, flow matching), which DDIM would take for its own defaults.
    """
    config = DDIMScheduler.load_config(path, subfolder="scheduler", revision=revision)
    if "beta_start" not in config:
        raise ConfigError(
            f"base.path={path}: its scheduler is a {config.get('_class_name')}, whose noise is not that of "
            "Stable Diffusion (no beta_start): no adapter can be trained on it."
        )
    return cast(DDIMScheduler, DDIMScheduler.from_config(config))


def unet_attention_sites(unet: UNet2DConditionModel) -> list[AttentionSite]:
    """The text cross-attentions of a UNet, in the order of interchange files.

    That order is ``unet.attn_processors``: down blocks, up blocks, the middle block *last*; self-attentions take the
    even numbers and cross-attentions the odd ones. It must be read before any adapter is loaded into the UNet.
    """
    sites = []
    for index, path, module in _attentions(unet):
        if not path.endswith("attn1"):
            hidden_dim, context_dim = module.to_k.weight.shape
            sites.append(AttentionSite(path, index, hidden_dim, context_dim, module, ImageAttention))
    return sites


def unet_low_rank_sites(unet: UNet2DConditionModel, rank: int) -> list[AttentionSite]:
    """All attentions of a UNet, for low-rank updates; no name is that of a site for image attention."""
    sites: list[AttentionSite] = []
    for index, path, module in _attentions(unet):
        hidden_dim, context_dim = module.to_k.weight.shape
        sites.append(LowRankSite(f"{path}.lora", index, hidden_dim, context_dim, module, LowRankUpdate, rank))
    return sites


def _attentions(unet: UNet2DConditionModel) -> Iterator[tuple[int, str, Any]]:
    for index, name in enumerate(unet.attn_processors):
        path = name.removesuffix(".processor")
        yield index, path, unet.get_submodule(path)


class UNetBase(Base):
    """A frozen UNet under text cross-attention: epsilon or v-prediction over DDPM's noise schedule."""

    schedule: VariancePreserving

    def __init__(
        self,
        *,
        unet: UNet2DConditionModel,
        vae: FrozenVAE,
        scheduler: DDIMScheduler,
        path: str = "",
    ) -> None:
        super().__init__()
        channels = unet.config.in_channels
        if channels != vae.num_channels:
            raise ConfigError(
                f"base.path={path}: its UNet takes {channels} channels, not the {vae.num_channels} of noisy latents "
                "alone (models for inpainting and editing do); give a text-to-image model."
            )
        self.unet, self.vae, self.path = unet, vae, path
        # Latents have no bounds; the folders of other schedulers do not say so, and DDIM clips unless it is told.
        self.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in VariancePreserving.prediction_types:
            known = " and ".join(VariancePreserving.prediction_types)
            raise ConfigError(f"base.path={path}: its scheduler predicts {self.prediction_type}; known are {known}.")
        self.schedule = VariancePreserving(scheduler.alphas_cumprod)
        self.context_dim = unet.config.cross_attention_dim
        self.dtype = unet.dtype
        for model in (unet, vae.model):
            nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward = UNetForward(unet) if UNetForward.fits(unet) else None

    def attention_sites(self) -> list[AttentionSite]:
        """The text cross-attentions, in the order of interchange files."""
        return unet_attention_sites(self.unet)

    def low_rank_sites(self, rank: int) -> list[AttentionSite]:
        """Self- and cross-attentions, in the order of interchange files."""
        return unet_low_rank_sites(self.unet, rank)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet."""
        return self.unet

    @property
    def is_frozen(self) -> bool:
        """Whether the UNet is; it is trained as a baseline only."""
        return not self.unet.conv_in.weight.requires_grad

    def wrap_blocks(self, wrap: Callable[[Block], Block]) -> None:
        """The residual and transformer blocks."""
        if self._forward is not None and self.is_frozen:
            self._forward.resnet_block = wrap(self._forward.resnet_block)
            self._forward.transformer_block = wrap(self._forward.transformer_block)
            return
        for module in self.unet.modules():
            if isinstance(module, (ResnetBlock2D, BasicTransformerBlock)):
                module.forward = wrap(module.forward)

    def predict(
        self,
        noisy_latents: Float[Tensor, "b c h w"],
        timesteps: Num[Tensor, "b"],
        text: TextConditioning,
        image_tokens: ImageTokens | None,
        micro: MicroConditioning | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """One UNet forward."""
        size = (noisy_latents.shape[2] * self.vae.stride, noisy_latents.shape[3] * self.vae.stride)
        added = self.added_conditions(text, micro, size)
        latents, context = noisy_latents.to(self.dtype), text.context.to(self.dtype)
        tokens = None if image_tokens is None else image_tokens.states.to(self.dtype)
        latents = latents.contiguous(memory_format=torch.channels_last)
        if self._forward is not None and self.is_frozen:
            return self._forward(latents, timesteps, context, added, tokens).float()
        # The UNet hands these arguments to every attention; this name is the one that self-attentions, which have no
        # use for it, ignore without a warning at each call.
        extra = None if tokens is None else {"ip_hidden_states": tokens}
        prediction = self.unet(latents, timesteps, context, added_cond_kwargs=added, cross_attention_kwargs=extra)
        return cast(Tensor, prediction.sample.float())

    def added_conditions(
        self, text: TextConditioning, micro: MicroConditioning | None, size: tuple[int, int]
    ) -> dict[str, Tensor] | None:
        """What the family's UNet is told beside the text tokens; nothing, unless a family says otherwise.

        ``size`` is the (height, width) of the pictures in pixels.
        """
        return None

    def sampler(self, num_steps: int, latent_size: tuple[int, int]) -> Any:
        """DDIM (arXiv 2010.02502), as in the paper."""
        sampler = self.ddim()
        sampler.set_timesteps(num_steps)
        return sampler

    def ddim(self) -> DDIMScheduler:
        """The folder's scheduler; where an objective made :attr:`schedule` end in noise alone, it starts from there."""
        options: dict[str, Any] = {}
        if self.schedule.zero_terminal_snr and not self.scheduler.config.rescale_betas_zero_snr:
            options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return cast(DDIMScheduler, DDIMScheduler.from_config(self.scheduler.config, **options))

    def image_arguments(
        self,
        pipeline: Any,
        image_features: Sequence[Float[Tensor, "n *_"]],
        null_features: Sequence[Float[Tensor, "1 *_"]],
        *,
        guided: bool,
    ) -> dict[str, Any]:
        """The embeddings, unconditional half first; FaceID-Plus is handed its second kind of features directly."""
        rows = [features.to(self.dtype)[None] for features in image_features]
        if guided:
            nulls = [null.to(self.dtype).expand_as(row[0])[None] for null, row in zip(null_features, rows, strict=True)]
            rows = [torch.cat(pair) for pair in zip(nulls, rows, strict=True)]
        embeds, *looks = rows
        if looks:
            (projection,) = pipeline.unet.encoder_hid_proj.image_projection_layers
            (projection.clip_embeds,) = looks
        return {"ip_adapter_image_embeds": [embeds]}
