"""Generate pictures with an adapter file, through plain diffusers.

ipa sample --adapter exported/ip_adapter.safetensors --image photo.jpg --prompt "a cat" --out pictures
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ipa_train.data.decode import decode_image
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

_MAX_PIXELS = 200_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--adapter", type=Path, required=True, help=".safetensors or .bin")
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="image prompt(s), a row of pictures each")
    parser.add_argument("--prompt", default="", help="text; none by default")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="weight of the image, 0 to 1; less leaves more to the text"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=4, help="pictures for each image prompt")
    parser.add_argument("--steps", type=int, default=30, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--size", type=int, default=512, help="pixels, a multiple of 8")
    parser.add_argument(
        "--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="diffusers folder or hub id"
    )
    parser.add_argument("--image-encoder", default="h94/IP-Adapter", help="folder or hub id")
    parser.add_argument("--image-encoder-subfolder", help="default: models/image_encoder for h94/IP-Adapter, else none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--out", type=Path, default=Path("samples"))


def run(args: argparse.Namespace) -> int:
    """Generate, write PNGs and a grid."""
    from ipa_train.eval.generate import grid, load_pipeline, seeds

    if args.size < 8 or args.size % 8:
        raise ConfigError(f"--size {args.size} must be a multiple of 8.")
    if args.num < 1 or args.steps < 1:
        raise ConfigError(f"--num and --steps must be at least 1, got {args.num} and {args.steps}.")
    prompts = [_open(path) for path in args.image]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subfolder = args.image_encoder_subfolder
    if subfolder is None:
        subfolder = "models/image_encoder" if args.image_encoder == "h94/IP-Adapter" else ""
    pipeline = load_pipeline(
        args.base,
        args.adapter,
        args.image_encoder,
        subfolder=subfolder,
        dtype=args.dtype or ("bfloat16" if device == "cuda" else "float32"),
        device=device,
    )
    pipeline.set_ip_adapter_scale(args.scale)
    with _writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for row, (path, prompt) in enumerate(zip(args.image, prompts, strict=True)):
        images = pipeline(
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            num_images_per_prompt=args.num,
            ip_adapter_image=prompt,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=seeds(args.seed, args.num),
        ).images
        for i, image in enumerate(images):
            # With the row's number, since pictures of several folders may have one name.
            _save(image, args.out / f"{row}-{path.stem}-{args.seed + i}.png")
        rows.append([ImageOps.fit(prompt, (args.size, args.size)), *images])
    label = f"image prompt, then {args.prompt!r} at scale {args.scale}"
    _save(grid(rows, [label] * len(rows), cell=min(args.size, 256)), args.out / "grid.png")
    sys.stdout.write(f"{len(rows) * args.num} pictures and grid.png in {args.out}\n")
    return 0


def _open(path: Path) -> Image.Image:
    """The picture upright and on white, as in training."""
    try:
        return decode_image(path.read_bytes(), max_pixels=_MAX_PIXELS)
    except (OSError, DataError) as error:
        raise ConfigError(f"--image {path}: no picture that can be read: {error}.") from error


def _save(image: Image.Image, path: Path) -> None:
    with _writing(path.parent), atomic_write(path) as temporary:
        image.save(temporary, format="PNG")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot write there: {error.strerror or error}.") from error
