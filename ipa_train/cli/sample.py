"""Generate pictures with an adapter file, through plain diffusers.

ipa sample --adapter exported/ip_adapter.safetensors --image photo.jpg --prompt "a cat" --out pictures
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ipa_train.cli.image_prompts import read_embeddings, read_picture
from ipa_train.cli.pipeline import add_pipeline_arguments, open_pipeline, writing
from ipa_train.errors import ConfigError
from ipa_train.runtime.files import atomic_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_pipeline_arguments(parser)
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="image prompt(s), a row of pictures each")
    parser.add_argument(
        "--embedding", type=Path, nargs="+", default=[], help=".npy of each image prompt, for adapters that read such"
    )
    parser.add_argument("--together", action="store_true", help="one row that follows all image prompts at once")
    parser.add_argument(
        "--mask", type=Path, nargs="+", default=[], help="white where each image prompt counts; with --together"
    )
    parser.add_argument("--prompt", default="", help="text; none by default")
    parser.add_argument("--negative-prompt", help="none by default, which SDXL tells from an empty one")
    parser.add_argument(
        "--scale", type=float, help="weight of the image; less leaves more to the text (default: 1, and 0.5 for SD 3)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=4, help="pictures for each image prompt")
    parser.add_argument("--steps", type=int, default=30, help="sampler steps")
    parser.add_argument("--guidance", type=float, help="the pipeline's own by default")
    parser.add_argument("--size", type=int, help="pixels; the model's own size by default")
    parser.add_argument("--out", type=Path, default=Path("samples"))


def run(args: argparse.Namespace) -> int:
    """Generate, write PNGs and a grid."""
    from ipa_train.eval.generate import grid, seeds

    _check(args)
    pictures = [read_picture(path, f"--image {path}") for path in args.image]
    embeddings = read_embeddings([(f"--embedding {path}", path) for path in args.embedding])
    loaded = open_pipeline(args)
    loaded.check(size=args.size, num_inference_steps=args.steps)
    needed: list[tuple[str, Sequence[Any], object]] = [("--image", pictures, loaded.image_encoder.image_size)]
    needed += [("--embedding", args.embedding, loaded.image_encoder.embedding_shape)]
    for option, given, wanted in needed:
        if bool(given) != (wanted is not None):
            verb = "needs" if wanted is not None else "has no use for"
            raise ConfigError(f"{args.adapter}: this adapter {verb} {option}.")
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    paths, features = args.image or args.embedding, loaded.features(pictures, embeddings)
    rows = [list(range(len(paths)))] if args.together else [[i] for i in range(len(paths))]
    drawn = []
    for row in rows:
        images = loaded.draw(
            args.prompt,
            [kind[row] for kind in features],
            scale=args.scale,
            masks=[read_picture(path, f"--mask {path}") for path in args.mask],
            guidance_scale=args.guidance,
            negative_prompt=args.negative_prompt,
            num_images_per_prompt=args.num,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            generator=seeds(args.seed, args.num),
        )
        for i, image in enumerate(images):
            # With the row's number, since pictures of several folders may have one name.
            _save(image, args.out / f"{row[0]}-{paths[row[0]].stem}-{args.seed + i}.png")
        drawn.append([*(ImageOps.fit(pictures[i], images[0].size) for i in row if pictures), *images])
    at = "" if args.scale is None else f" at scale {args.scale}"
    label = f"image prompt, then {repr(args.prompt) if args.prompt else 'no text'}{at}"
    _save(grid(drawn, [label] * len(drawn), cell=min(drawn[0][-1].width, 256)), args.out / "grid.png")
    sys.stdout.write(f"{len(drawn) * args.num} pictures and grid.png in {args.out}\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    if args.num < 1 or args.steps < 1:
        raise ConfigError(f"--num and --steps must be at least 1, got {args.num} and {args.steps}.")
    if not args.image and not args.embedding:
        raise ConfigError("give --image, or --embedding for adapters that read such.")
    counts = {"--image": len(args.image), "--embedding": len(args.embedding), "--mask": len(args.mask)}
    if len({count for count in counts.values() if count}) > 1:
        given = ", ".join(f"{count} {option}" for option, count in counts.items() if count)
        raise ConfigError(f"each image prompt needs one of each, got {given}.")
    if args.mask and not args.together:
        raise ConfigError("--mask says which part each of several image prompts counts for: add --together.")


def _save(image: Image.Image, path: Path) -> None:
    with writing(path.parent), atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
