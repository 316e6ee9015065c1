"""Score an adapter file by the paper's protocol, on pictures with captions.

    ipa eval --adapter ip_adapter.safetensors --images coco/val2017 \
        --annotations coco/annotations/captions_val2017.json --out results/mine
    ipa eval --adapter ip_adapter.safetensors --images photos --scales 0 0.5 1 --text caption --out results/sweep

Without --annotations the caption of a picture is the .txt beside it. Every process of a torchrun, srun or Slurm array
takes its share; the same command again does only what is missing, and the last to finish writes report.html,
summary.json and pictures.parquet.
"""

import argparse
import hashlib
import logging
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from data_tools.work import add_share_arguments, claim_folder, my_share
from ipa_train.cli.pipeline import add_pipeline_arguments, encoder_subfolder, open_pipeline, precision, writing
from ipa_train.errors import ConfigError
from ipa_train.eval.captions import CaptionedPicture, fingerprint, missing, read_pictures
from ipa_train.eval.protocol import TEXTS, Protocol
from ipa_train.runtime.distributed import rank
from ipa_train.runtime.files import atomic_write
from ipa_train.runtime.logging import setup_logging
from ipa_train.version import __version__

if TYPE_CHECKING:
    from ipa_train.eval.evaluate import Evaluation
    from ipa_train.eval.parts import Parts

REPORT = "report.html"
_NONE = "none"
_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_pipeline_arguments(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures, the image prompts")
    parser.add_argument("--annotations", type=Path, help="their captions, in COCO's format; default: .txt beside each")
    parser.add_argument("--num-images", type=int, help="only the first, by id; default: all")
    parser.add_argument("--allow-missing", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument(
        "--text", choices=TEXTS, default="none", help="what to prompt with beside the image (%(default)s)"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="weights of the image prompt (1)")
    parser.add_argument("--num-samples", type=int, default=4, help="pictures for each image prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (%(default)s)")
    parser.add_argument("--guidance", type=float, default=7.5, help="(%(default)s)")
    parser.add_argument("--size", type=int, help="pixels; the model's own size by default")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--clip", default="openai/clip-vit-large-patch14", help="for CLIP-I and CLIP-T, or none")
    parser.add_argument("--dino", default="facebook/dinov2-base", help="DINOv2 or v3 for DINO, or none (%(default)s)")
    parser.add_argument(
        "--fid", default=_NONE, help="network for FID and KID: inception, or a CLIP, SigLIP or DINO; none by default"
    )
    parser.add_argument("--compare", type=Path, nargs="+", default=[], help="other results to put beside these")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    add_share_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Draw and score this process's share; report, if all is done."""
    from ipa_train.eval.parts import Parts

    setup_logging(rank=rank())
    protocol = Protocol(
        text=args.text,
        scales=args.scales,
        num_samples=args.num_samples,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        size=args.size,
        seed=args.seed,
    )
    pictures = _pictures(args)
    facts = _facts(args, protocol, pictures)
    claim_folder(args.out, "protocol.json", facts, what="results", pattern="parts/*.parquet")
    parts = Parts(args.out / "parts", pictures)
    todo = [part for part in my_share(range(parts.count), args) if not parts.is_done(part)]
    if todo:
        _make(parts, todo, _evaluation(args, protocol))
    if left := sum(not parts.is_done(part) for part in range(parts.count)):
        _log.info("%d of %d parts are for others to do; when they have, there is a %s", left, parts.count, REPORT)
        return 0
    _report(args, parts, facts)
    return 0


def _pictures(args: argparse.Namespace) -> list[CaptionedPicture]:
    pictures = read_pictures(args.images, args.annotations)
    if args.num_images is not None:
        if not 1 <= args.num_images <= len(pictures):
            raise ConfigError(f"--num-images must be from 1 to {len(pictures)}, got {args.num_images}.")
        pictures = pictures[: args.num_images]
    absent = missing(pictures)
    if absent and (len(absent) == len(pictures) or not args.allow_missing):
        raise ConfigError(
            f"--images {args.images}: {len(absent)} of the {len(pictures)} pictures of {args.annotations} are not "
            f"there, e.g. {absent[0].path.name}; --allow-missing leaves such pictures out."
        )
    return pictures


def _facts(args: argparse.Namespace, protocol: Protocol, pictures: Sequence[CaptionedPicture]) -> dict[str, Any]:
    """What the numbers depend on: results of other facts are other results."""
    try:
        adapter = hashlib.sha256(args.adapter.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--adapter {args.adapter}: cannot be read: {error.strerror}.") from error
    packages = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers"))
    source = (args.annotations or args.images.absolute()).name
    return {
        "adapter": f"{args.adapter.name} (sha256 {adapter[:16]})",
        "base": args.base,
        "image_encoder": "/".join(filter(None, (args.image_encoder, encoder_subfolder(args)))),
        "dtype": precision(args),
        "data_set": f"{len(pictures):,} pictures of {source} (sha256 {fingerprint(pictures)[:16]})",
        **protocol.facts(),
        "clip": args.clip,
        "dino": args.dino,
        "fid_network": args.fid,
        "versions": f"ipa-train {__version__} {packages} python {platform.python_version()}",
    }


def _evaluation(args: argparse.Namespace, protocol: Protocol) -> "Evaluation":
    from ipa_train.eval.distribution import FeatureNetwork
    from ipa_train.eval.evaluate import Evaluation
    from ipa_train.eval.metrics import SimilarityScores

    clip, dino = (None if path == _NONE else path for path in (args.clip, args.dino))
    network = None if args.fid == _NONE else FeatureNetwork.from_pretrained(args.fid)
    try:
        scores = SimilarityScores.from_pretrained(clip=clip, dino=dino)
    except ConfigError as error:
        raise ConfigError(f"--clip {args.clip} --dino {args.dino}: {error}") from error
    if not scores.names and network is None:
        raise ConfigError("--clip, --dino and --fid are none: there is nothing to score by.")
    loaded = open_pipeline(args)
    device = loaded.pipeline.device
    scores.to(device)
    if network is not None:
        network.to(device)
    return Evaluation(loaded, scores, network, protocol, allow_missing=args.allow_missing)


def _make(parts: "Parts", todo: Sequence[int], evaluation: "Evaluation") -> None:
    total = sum(len(parts.pictures_of(part)) for part in todo)
    with tqdm(total=total, desc="eval", unit="image prompt", disable=True if rank() else None) as bar:
        for part in todo:
            pictures = parts.pictures_of(part)
            rows, notes = evaluation.run(pictures)
            with writing(parts.folder.parent):
                parts.write(part, rows, notes)
            bar.update(len(pictures))


def _report(args: argparse.Namespace, parts: "Parts", facts: dict[str, Any]) -> None:
    from ipa_train.eval.report import draw_report
    from ipa_train.eval.summary import TABLE, Summary, summarise, write_table

    summary = summarise(parts, facts)
    others = {folder: Summary.read(folder) for folder in args.compare}
    for folder, other in others.items():
        summary.require_comparable(other, source=f"--compare {folder}")
    page = draw_report({args.out: summary, **others}, parts)
    with writing(args.out):
        summary.write(args.out)
        write_table(parts, args.out / TABLE)
        with atomic_write(args.out / REPORT) as temporary:
            temporary.write_text(page)
    for row in summary.by_scale:
        found = [f"{name} {mean.mean:.4f}" for name, mean in row.scores.items()]
        found += [f"fid {row.distances.fid:.3f} kid {row.distances.kid:.5f}"] if row.distances else []
        _log.info("scale %g: %s", row.scale, ", ".join(found))
    if summary.left_out:
        _log.warning("%d pictures were left out, e.g. %s", len(summary.left_out), summary.left_out[0])
    _log.info("%d image prompts; %s", summary.num_pictures, args.out / REPORT)
