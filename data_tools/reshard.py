"""Rewrite shards so that training is cheaper: pictures at their exact training size, shuffled, each bucket by itself.

ipa data reshard '/data/laion/{00000..41000}.tar' --out /data/laion-512 --resolution 512 --bucket-step 64
ipa train experiment=sd15_linear run.name=first data.shards=/data/laion-512 data.bucket_step=64

Training on the output sees the pixels, captions and SDXL sizes that it would have seen on the source, but for the
losses of a JPEG. Run the same command again after a stop, and on many machines at once with --task-index (a Slurm job
array needs no option): each output shard is written by one of them, and what is there is not done again. To have a
shard done again, delete it. Of a sample only its picture and caption are kept, and what --carry names; its key names
the source shard and key. With --carry, samples that lack a part of it are counted, and not in the output.
"""

import argparse
import io
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.shard_writer import open_shard, read_stats, stats_path
from data_tools.work import (
    Report,
    add_max_bad_rate,
    add_share_arguments,
    add_work_arguments,
    claim_folder,
    my_share,
    run_tasks,
)
from ipa_train.data.decode import Decoder, decode, stored_size
from ipa_train.data.image_prompts import ImagePrompts
from ipa_train.data.index import Index, build_index
from ipa_train.data.pictures import PictureLoader
from ipa_train.data.reader import ShardReader
from ipa_train.data.scan import EXTRAS, Extra
from ipa_train.data.stream import choose_buckets, make_stream
from ipa_train.errors import ConfigError, DataError

VERSION = 1
DESCRIPTION = "reshard.json"
# Colours at full resolution, which costs 24 % of the bytes and 0.35 ms of decoding at 512 x 512 (quality 95, photos):
# blurred colour edges are the one loss that no --quality can make small, and every pixel is trained on.
_SUBSAMPLING = "4:4:4"
_NUM_LANES, _WINDOW_SIZE = 64, 20_000  # an output shard mixes samples from about 190 source shards

Place = tuple[int, int]
"""An output shard: number of its bucket, and its number in the bucket."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that the output depends on besides the source."""

    resolution: int
    bucket_step: int | None
    max_aspect_ratio: float
    min_bucket_rate: float
    resize: bool
    quality: int
    shard_size: int
    seed: int
    max_pixels: int
    carry: tuple[Extra, ...] | None
    """What is kept besides; None only if there is nothing."""

    def __post_init__(self) -> None:
        for name, low, high in (("quality", 1, 100), ("shard_size", 1, 10**6)):
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be from {low} to {high}, got {getattr(self, name)}.")
        if self.resize and "mask" in (self.carry or ()) and "reference" not in (self.carry or ()):
            raise ConfigError(
                "--carry mask: masks of the pictures themselves would not fit the resized ones; add --no-resize, or "
                "reference if they are masks of KEY.ref.*."
            )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to know to write any of the output shards."""

    shards: tuple[str, ...]
    index_dir: Path | None
    allow_missing_stats: bool
    out: Path
    recipe: Recipe

    def index(self, num_workers: int | None = None) -> Index:
        """Index of the source."""
        return build_index(
            list(self.shards),
            index_dir=self.index_dir,
            allow_missing_stats=self.allow_missing_stats,
            num_workers=num_workers,
            extras=self.recipe.carry or (),
        )


class Source:
    """The source in the order of a first epoch of training on it; memory O(shards), in each process."""

    def __init__(self, job: Job) -> None:
        recipe = self.recipe = job.recipe
        self.index = job.index()
        if self.index.content != "pictures":
            raise ConfigError("cached features cannot be resharded: reshard the pictures, and encode those.")
        if recipe.carry is None:
            _require_no_extras(self.index)
        elif "mask" in recipe.carry and "reference" not in recipe.carry:
            _require_no_references(self.index)
        self.buckets, counts, _ = choose_buckets(
            self.index,
            resolution=recipe.resolution,
            step=recipe.bucket_step,
            max_aspect_ratio=recipe.max_aspect_ratio,
            min_rate=recipe.min_bucket_rate,
        )
        self.reader, self.decoder = ShardReader(self.index, self.buckets), Decoder(max_pixels=recipe.max_pixels)
        loader = PictureLoader(self.reader, self.buckets, decoder=self.decoder, image_prompts=ImagePrompts(size=None))
        order = {"seed": recipe.seed, "num_lanes": _NUM_LANES, "window_size": _WINDOW_SIZE}
        self.plans = make_stream(loader, self.buckets, counts, {}, weights=None, **order).plans
        self._counts = counts.sum(axis=1).tolist()
        self._prefixes = _prefixes(self.index)

    def places(self) -> list[Place]:
        """All output shards."""
        size = self.recipe.shard_size
        return [(bucket, k) for bucket, count in enumerate(self._counts) for k in range(-(-count // size))]

    def name(self, place: Place) -> str:
        """Name of an output shard."""
        height, width = self.buckets[place[0]]
        return f"{height}x{width}-{place[1]:05d}.tar"

    def write(self, place: Place, path: Path) -> None:
        """Write an output shard.

        Raises:
            DataError: none of its samples can be read; there is no shard then.
        """
        bucket, number = place
        size = self.recipe.shard_size
        positions = np.arange(number * size, min((number + 1) * size, self._counts[bucket]))
        _, shards, numbers = self.plans[bucket].locate(positions)
        with open_shard(path) as writer:
            for shard, in_bucket in zip(shards.tolist(), numbers.tolist(), strict=True):
                row = in_bucket
                try:
                    row = self.reader.row(shard, bucket, in_bucket)
                    sample = self.reader.read(shard, row)
                    members = self._picture(sample.content, bucket)
                except DataError as error:
                    writer.leave_out(f"{self.index.shards[shard].path}/{self.reader.key(shard, row)}", str(error))
                else:
                    for extra, data in sample.extras.items():
                        members[EXTRAS[extra].replace("*", _image_suffix(data))] = data
                    writer.write(f"{self._prefixes[shard]}-{sample.key}", members | {"txt": sample.caption.encode()})
            if not writer.num_samples:
                first = next(iter(writer.left_out.items()))
                raise DataError(f"{path}: not written, all its samples are bad; first {first[0]}: {first[1]}")

    def _picture(self, content: bytes, bucket: int) -> dict[str, bytes]:
        suffix = _image_suffix(content)
        if not self.recipe.resize:
            decode(content, max_pixels=self.recipe.max_pixels)
            return {suffix: content}
        pixels = np.empty((*self.buckets[bucket], 3), np.uint8)
        placement, _ = self.decoder(content, pixels=pixels)
        if suffix == "jpg" and stored_size(content) == self.buckets[bucket]:
            return {suffix: content}  # a second compression would only lose
        buffer = io.BytesIO()
        options = {"quality": self.recipe.quality, "subsampling": _SUBSAMPLING, "comment": placement.comment()}
        Image.fromarray(pixels).save(buffer, "JPEG", **options)
        return {"jpg": buffer.getvalue()}


def _image_suffix(content: bytes) -> str:
    return {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(content[:2], "webp")


def _require_no_extras(index: Index) -> None:
    for shard in index.shards:
        if found := shard.entry.found_extras:
            raise ConfigError(
                f"{shard.path}: holds {', '.join(f'KEY.{EXTRAS[extra]}' for extra in found)}: say what to keep, "
                f"--carry {' '.join(found)}, or --carry alone to keep none of it."
            )


def _require_no_references(index: Index) -> None:
    for shard in index.shards:
        if "reference" in shard.entry.found_extras:
            raise ConfigError(
                f"{shard.path}: holds KEY.ref.*, and its masks are of these: --carry reference mask, or neither."
            )


def _prefixes(index: Index) -> list[str]:
    """Begin of the new keys of each shard: its name, up to the first hyphen, and a number if names come twice."""
    stems = [shard.path.stem.replace(".", "_").replace("-", "_") for shard in index.shards]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number}_{stem}" for number, stem in enumerate(stems)]


_open = lru_cache(1)(Source)  # once per process: the index of 41,000 shards is not sent along with every task


def _write(job: Job, index_id: str, place: Place) -> None:
    source = _open(job)
    if source.index.index_id != index_id:
        raise DataError("the source has changed since this command started: run it again.")
    source.write(place, job.out / source.name(place))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("shards", nargs="+", help="folder, glob, or /data/{00000..00010}.tar")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new shards")
    parser.add_argument("--resolution", type=int, required=True, help="data.resolution of the training")
    parser.add_argument("--bucket-step", type=int, help="data.bucket_step of the training; default: centre squares")
    parser.add_argument("--max-aspect-ratio", type=float, default=2.0, help="data.max_aspect_ratio of the training")
    parser.add_argument("--min-bucket-rate", type=float, default=0.005, help="data.min_bucket_rate of the training")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--no-resize", dest="resize", action="store_false", help="only shuffle, and sort into buckets")
    form.add_argument("--quality", type=int, default=95, help="of the new JPEGs, to 100")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a new shard")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle")
    parser.add_argument(
        "--carry", nargs="*", choices=EXTRAS, help="keep KEY.ref.*, KEY.mask.png, KEY.npy: needed of every sample"
    )
    parser.add_argument("--max-pixels", type=int, default=50_000_000, help="larger pictures are bad samples")
    add_max_bad_rate(parser)
    parser.add_argument("--allow-missing-stats", action="store_true", help="take shards of other writers")
    parser.add_argument("--index-dir", type=Path, help="where to write the source's index, if not beside it")
    add_share_arguments(parser)
    add_work_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write what is missing, and report on all."""
    args.carry = None if args.carry is None else tuple(extra for extra in EXTRAS if extra in args.carry)
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__})
    job = Job(
        shards=tuple(args.shards),
        index_dir=args.index_dir,
        allow_missing_stats=args.allow_missing_stats,
        out=args.out,
        recipe=recipe,
    )
    job.index(args.workers)  # what is not indexed yet, by all workers; each then reads the index for itself
    source = _open(job)
    index_id = source.index.index_id
    if job.out.resolve() in {shard.path.parent.resolve() for shard in source.index.shards}:
        raise ConfigError(f"--out {job.out} holds the source: the new shards would be mixed with it; give another.")
    claim_folder(job.out, DESCRIPTION, {"version": VERSION, "source": index_id, **asdict(recipe)})
    places = my_share(source.places(), args)
    paths = {place: job.out / source.name(place) for place in places}
    missing = [place for place, path in paths.items() if not (path.exists() and stats_path(path).exists())]
    report = Report("reshard", source=index_id, **asdict(recipe), task_index=args.task_index, num_tasks=args.num_tasks)
    write = partial(_write, job, index_id)
    for place, result in run_tasks(write, missing, description="reshard", workers=args.workers):
        if isinstance(result, DataError):
            report.problem(str(result))
            del paths[place]
    bad = []
    for path in paths.values():
        num_samples, left_out = read_stats(path)
        report.counts["samples"] += num_samples
        bad += [f"{name}: {why}" for name, why in left_out.items()]
    report.counts["shards"] = len(paths)
    report.counts["incomplete samples of the source"] = sum(s.entry.num_incomplete for s in source.index.shards)
    report.counts["of these already there"] = len(places) - len(missing)
    report.counts["shards left to other tasks"] = len(source.places()) - len(places)
    report.left_out(bad, report.counts["samples"], args.max_bad_rate)
    name = "report.json" if args.num_tasks == 1 else f"report-{args.task_index}-of-{args.num_tasks}.json"
    return report.finish(args.report or job.out / name)
