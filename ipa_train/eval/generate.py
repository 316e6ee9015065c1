"""Pictures from an adapter while it is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from ipa_train.adapter import IPAdapter
from ipa_train.bases import Base, MicroConditioning, TextConditioning


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
    scale: float = 1.0,
) -> list[Image.Image]:
    """One picture of ``size`` (height, width) for each image prompt, with the adapter as it is attached to the base.

    The loop of diffusers' pipelines around the very ``predict`` that is trained, so it is the same for every base, and
    gives what the exported file will give there. Image i is drawn from the seed ``seed + i``. ``scale`` multiplies the
    weight that the image half has (lambda); 0 leaves the text alone.
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
    with _scaled(adapter, scale):
        for t in sampler.timesteps:
            timesteps = t.to(device).expand(count * rounds)
            tokens = adapter(*features, timesteps=timesteps)
            prediction = base.predict(torch.cat([latents] * rounds), timesteps, text, tokens, micro)
            if guidance_scale > 1.0:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = sampler.step(prediction, t, latents, return_dict=False)[0]
    return to_pil(base.vae.decode(latents))


@contextmanager
def _scaled(adapter: IPAdapter, factor: float) -> Iterator[None]:
    own = adapter.scales
    adapter.scales = {name: factor * scale for name, scale in own.items()}
    try:
        yield
    finally:
        adapter.scales = own


def seeds(seed: int, count: int) -> list[torch.Generator]:
    """One CPU generator for each picture, so that a picture does not depend on its neighbours."""
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


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


def to_tensor(images: Sequence[Image.Image]) -> UInt8[Tensor, "b 3 h w"]:
    """The batch of pictures of one size."""
    rows = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    return torch.stack(rows).view(len(images), images[0].height, images[0].width, 3).permute(0, 3, 1, 2)
