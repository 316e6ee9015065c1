"""Pictures from an adapter: while it is trained, and from its file through plain diffusers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPImageProcessorPil

from ipa_train.adapter import IPAdapter
from ipa_train.adapter.projector import FeatureKind
from ipa_train.bases import Base, MicroConditioning, StableDiffusion, TextConditioning
from ipa_train.conditioning import CLIPImageEncoder
from ipa_train.errors import ConfigError
from ipa_train.export.description import describe
from ipa_train.export.file import nested, read_adapter_file
from ipa_train.export.loadability import require_loadable
from ipa_train.export.warm_start import check_image_encoder, check_sites


@torch.no_grad()
def generate(
    base: Base,
    adapter: IPAdapter,
    image_features: Sequence[Float[Tensor, "b *_"]],
    null_features: Sequence[Float[Tensor, "1 *_"]],
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    seed: int = 0,
    num_inference_steps: int = 30,
    guidance_scale: float = 7.5,
) -> list[Image.Image]:
    """One picture of ``size`` (height, width) for each image prompt, with the adapter as it is attached to the base.

    The loop of diffusers' pipelines around the very ``predict`` that is trained, so it is the same for every base, and
    gives what the exported file will give there. Image i is drawn from the seed ``seed + i``.
    """
    count, device = len(prompts), image_features[0].device
    shape = (base.vae.num_channels, size[0] // base.vae.stride, size[1] // base.vae.stride)
    sampler = base.sampler(num_inference_steps, (shape[1], shape[2]))
    latents = torch.stack([torch.randn(shape, generator=g) for g in seeds(seed, count)]).to(device)
    conditions = [base.encode_text(prompts)]
    features = list(image_features)
    if guidance_scale > 1.0:
        conditions.insert(0, base.null_text(count))
        features = [torch.cat([n.expand_as(f), f]) for f, n in zip(features, null_features, strict=True)]
    text, rounds = TextConditioning.cat(conditions), len(conditions)
    micro = MicroConditioning.uncropped(size, count * rounds, device)
    for t in sampler.timesteps:
        timesteps = t.to(device).expand(count * rounds)
        tokens = adapter(*features, timesteps=timesteps)
        prediction = base.predict(torch.cat([latents] * rounds), timesteps, text, tokens, micro)
        if guidance_scale > 1.0:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        latents = sampler.step(prediction, t, latents, return_dict=False)[0]
    return to_pil(base.vae.decode(latents))


def seeds(seed: int, count: int) -> list[torch.Generator]:
    """One CPU generator for each picture, so that a picture does not depend on its neighbours."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def load_pipeline(
    base: str, adapter_file: Path, image_encoder: str, *, subfolder: str = "", dtype: str, device: str
) -> StableDiffusionPipeline:
    """Plain diffusers with an adapter in it, through ``load_ip_adapter``.

    Raises:
        ConfigError, ExportError: the base, encoder or file cannot be loaded, or do not belong together.
    """
    state, metadata = read_adapter_file(adapter_file)
    description = describe(state, source=str(adapter_file))
    require_loadable(description, source=str(adapter_file))
    encoder = CLIPImageEncoder.from_pretrained(image_encoder, subfolder=subfolder, dtype=dtype)
    kind: FeatureKind = "pooled" if description.variant == "linear" else "penultimate"
    if encoder.feature_dim(kind) != description.feature_dim:
        raise ConfigError(
            f"{adapter_file}: made for an image encoder of width {description.feature_dim}, and {image_encoder} gives "
            f"{encoder.feature_dim(kind)}."
        )
    check_image_encoder(metadata, encoder, source=str(adapter_file))
    frozen = StableDiffusion.from_pretrained(base, dtype=dtype)
    if frozen.context_dim != description.context_dim:
        raise ConfigError(
            f"{adapter_file}: made for a base whose text has width {description.context_dim}, and {base} has "
            f"{frozen.context_dim}."
        )
    check_sites(description, frozen.attention_sites(), source=str(adapter_file))
    pipeline = frozen.pipeline()
    edge = encoder.image_size
    pipeline.register_modules(
        image_encoder=encoder.model,
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
        ),
    )
    # The tensors and not the file's path: they may have come out of a layout that diffusers does not read.
    pipeline.load_ip_adapter(nested(state), subfolder="", weight_name="", image_encoder_folder=None)
    return pipeline.to(device)


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], *, cell: int) -> Image.Image:
    """Pictures in rows, each row under its label; every cell is ``cell`` pixels square."""
    line, gap = 16, 4
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, len(rows) * (cell + line + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = i * (cell + line + gap)
        draw.text((gap, top + 2), label, fill="black")
        for k, image in enumerate(row):
            filter_ = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
            canvas.paste(image.resize((cell, cell), filter_), (gap + k * (cell + gap), top + line))
    return canvas


def to_pil(pixels: UInt8[Tensor, "b c h w"]) -> list[Image.Image]:
    """Pictures of a batch."""
    arrays: Any = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
