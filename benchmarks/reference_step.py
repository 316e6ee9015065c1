"""The training step of IP-Adapter's tutorial scripts, written anew from what they compute: the yardstick for ours.

As they run it: the UNet in fp32 under bf16 autocast, the other frozen models in bf16, all encoders online, image tokens
joined to the text tokens and cut off again in every attention, which also keeps an attention map; AdamW as torch
defaults to; the loss fetched and printed at every step. A batch that holds features and ``lean`` take single habits
away, so that their costs can be told apart; autocast is off where ``precision`` is float32 (mixed_precision=no).
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ipa_train.adapter import LinearProjector, Projector, Resampler
from ipa_train.bases import StableDiffusion, StableDiffusionXL, UNetBase
from ipa_train.bases.tokens import token_ids
from ipa_train.conditioning import CLIPImageEncoder


@dataclass(frozen=True)
class ReferenceBatch:
    """What the scripts' data loaders yield: pictures, or what a cache would hold of them."""

    token_ids: tuple[Tensor, ...]
    """Of each text encoder."""
    drop_image: Sequence[bool]
    time_ids: Tensor | None
    """(b, 6), of SDXL."""
    pixels: Tensor | None = None
    """(b, 3, h, w), normalised to [-1, 1]."""
    image_prompts: Tensor | None = None
    """(b, 3, 224, 224), normalised as CLIP's."""
    latents: Tensor | None = None
    """(b, 4, h / 8, w / 8), scaled; in place of pixels."""
    image_features: Tensor | None = None
    """In place of image prompts."""


@dataclass(frozen=True)
class Given:
    """Random numbers from outside, to compare steps that would draw other ones."""

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


class JoinedTokensAttention(nn.Module):
    """Cross-attention over text tokens and, behind them, image tokens, each with keys and values of its own."""

    def __init__(self, hidden_size: int, context_size: int, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens, self.keep_map, self.scale = num_tokens, True, 1.0
        self.to_k_ip = nn.Linear(context_size, hidden_size, bias=False)
        self.to_v_ip = nn.Linear(context_size, hidden_size, bias=False)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: object, **kwargs: object
    ) -> Tensor:
        """The argument names are the caller's (a diffusers ``Attention``)."""
        residual = hidden_states
        end = encoder_hidden_states.shape[1] - self.num_tokens
        text, image = encoder_hidden_states[:, :end], encoder_hidden_states[:, end:]

        def by_heads(x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        query = by_heads(attn.to_q(hidden_states))
        mixed = F.scaled_dot_product_attention(query, by_heads(attn.to_k(text)), by_heads(attn.to_v(text)))
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        key, value = by_heads(self.to_k_ip(image)), by_heads(self.to_v_ip(image))
        from_image = F.scaled_dot_product_attention(query, key, value)
        if self.keep_map:
            with torch.no_grad():
                self.attn_map = query @ key.transpose(-2, -1).softmax(dim=-1)
        from_image = from_image.transpose(1, 2).flatten(2).to(query.dtype)
        mixed = mixed + self.scale * from_image
        mixed = attn.to_out[1](attn.to_out[0](mixed))
        if attn.residual_connection:
            mixed = mixed + residual
        return mixed / attn.rescale_output_factor


class ReferenceStep(nn.Module):
    """Projection, attentions, frozen models and the body of the loop.

    Args:
        base: its frozen models; its UNet, and its VAE, are this step's alone.
        image_encoder: of the image prompts.
        projector: trained; initial weights as given.
        num_tokens: that the projector makes.
        precision: bfloat16 (autocast) or float32.
    """

    def __init__(
        self,
        *,
        base: UNetBase,
        image_encoder: CLIPImageEncoder,
        projector: Projector,
        num_tokens: int,
        precision: torch.dtype = torch.bfloat16,
        lr: float = 1e-4,
    ) -> None:
        super().__init__()
        assert isinstance(projector, (LinearProjector, Resampler))
        self.base, self.image_encoder, self.projector = base, image_encoder, projector
        self.precision, self.lean = precision, False
        nn.Module.to(base.unet, torch.float32, memory_format=torch.contiguous_format)
        # The SDXL script leaves its VAE in fp32: it overflows in fp16.
        vae_precision = torch.float32 if isinstance(base, StableDiffusionXL) else precision
        nn.Module.to(base.vae.model, vae_precision, memory_format=torch.contiguous_format)
        processors: dict[str, Any] = {}
        for name in base.unet.attn_processors:
            attention = base.unet.get_submodule(name.removesuffix(".processor"))
            if "attn1" in name:
                processors[name] = AttnProcessor2_0()
                continue
            processor = JoinedTokensAttention(*attention.to_k.weight.shape, num_tokens)
            processor.to_k_ip.load_state_dict({"weight": attention.to_k.weight})
            processor.to_v_ip.load_state_dict({"weight": attention.to_v.weight})
            processors[name] = processor
        base.unet.set_attn_processor(dict(processors))  # it empties what it is given
        self.branches = nn.ModuleList(base.unet.attn_processors[name] for name in processors if "attn2" in name)
        self.branches.requires_grad_(True)
        self.scheduler = DDPMScheduler.from_config(base.scheduler.config)
        self.optimizer = torch.optim.AdamW(self.trained, lr, weight_decay=0.01)

    @property
    def trained(self) -> list[nn.Parameter]:
        """In the order of interchange files: the projection, then keys and values by attention."""
        return [*self.projector.parameters(), *self.branches.parameters()]

    def be_lean(self, lean: bool) -> None:
        """Whether to go without attention maps, and without a loss fetched and printed."""
        self.lean = lean
        for branch in self.branches:
            branch.keep_map = not lean
            branch.attn_map = None

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the UNet and the projection, as accelerate wraps the module that it is given."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.branches[0].to_k_ip.weight.device.type, self.precision)

    def text(self, batch: ReferenceBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states, and SDXL's pooled vector."""
        if isinstance(self.base, StableDiffusion):
            return self.base.text_encoder(batch.token_ids[0])[0], None
        assert isinstance(self.base, StableDiffusionXL)
        encoders = (self.base.text_encoder, self.base.text_encoder_2)
        outputs = [e(ids, output_hidden_states=True) for e, ids in zip(encoders, batch.token_ids, strict=True)]
        return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), outputs[1].text_embeds

    def features(self, batch: ReferenceBatch) -> Tensor:
        """Of the image prompts; those that are dropped are zeros (pooled), or zero pixels (hidden states)."""
        if batch.image_features is not None:
            features = batch.image_features.to(self.image_encoder.dtype)
        else:
            assert batch.image_prompts is not None
            prompts = batch.image_prompts.to(self.image_encoder.dtype)
            if isinstance(self.projector, Resampler):
                rows = [torch.zeros_like(p) if gone else p for p, gone in zip(prompts, batch.drop_image, strict=True)]
                return self.image_encoder.model(torch.stack(rows), output_hidden_states=True).hidden_states[-2]
            features = self.image_encoder.model(prompts).image_embeds
        pairs = zip(features, batch.drop_image, strict=True)
        return torch.stack([torch.zeros_like(row) if gone else row for row, gone in pairs])

    def loss(self, batch: ReferenceBatch, given: Given | None = None) -> Tensor:
        """The mean squared error of the predicted noise."""
        with torch.no_grad():
            if batch.latents is not None:
                latents = batch.latents.to(self.precision)
            else:
                assert batch.pixels is not None
                vae = self.base.vae.model
                posterior = vae.encode(batch.pixels.to(vae.dtype)).latent_dist
                if given is None:
                    latents = posterior.sample()
                else:
                    latents = posterior.mean + posterior.std * given.posterior.to(posterior.mean)
                latents = (latents * vae.config.scaling_factor).to(self.precision)
        noise = torch.randn_like(latents) if given is None else given.noise.to(latents)
        if given is None:
            num_timesteps = self.scheduler.config.num_train_timesteps
            timesteps = torch.randint(0, num_timesteps, (len(latents),), device=latents.device)
        else:
            timesteps = given.timesteps
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad():
            features = self.features(batch)
            context, pooled = self.text(batch)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": batch.time_ids}
        with self.autocast():
            tokens = self.projector(features)
            context = torch.cat([context, tokens.to(context.dtype)], dim=1)
            prediction = self.base.unet(noisy_latents, timesteps, context, added_cond_kwargs=added).sample
        return F.mse_loss(prediction.float(), noise.float(), reduction="mean")

    def step(self, batch: ReferenceBatch) -> None:
        """One update."""
        update(self.loss(batch), len(batch.drop_image), self.optimizer, lean=self.lean)


def update(loss: Tensor, batch_size: int, optimizer: torch.optim.Optimizer, *, lean: bool) -> None:
    """One update as the tutorials make it; ``lean`` goes without the loss fetched and printed."""
    mean = None if lean else loss.repeat(batch_size).mean().item()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if not lean:
        with Path(os.devnull).open("w") as console:
            print(f"step_loss: {mean}", file=console)


def tokenise(base: UNetBase, captions: Sequence[str], device: torch.device) -> tuple[Tensor, ...]:
    """What the scripts' data sets do with captions, in the loader's workers."""
    tokenizers = [base.tokenizer, *([base.tokenizer_2] if isinstance(base, StableDiffusionXL) else [])]
    return tuple(token_ids(tokenizer, captions, device=device) for tokenizer in tokenizers)
