"""The feature cache: what the frozen encoders made of every picture, so that training need not run them.

    cache/cache.json                   what was encoded, by what, and how: compared before a single feature is used
    cache/00000-512x512.tar            of shard 00000 the samples of one bucket: an ordinary WebDataset tar of
                                       key.safetensors (and key.flipped.safetensors) and key.txt
    cache/00000.json                   shard 00000 is done: how many samples, and which were bad

Every safetensors header of a bucket is the same, so a sample is read straight into its place in the batch. Captions are
kept as text: text encoders are cheap, and their states large.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor

from ipa_train.data.batch import Batch, Features
from ipa_train.data.buckets import Bucket
from ipa_train.data.index import Index
from ipa_train.data.pictures import check_flip_rate, draw_flips
from ipa_train.data.reader import ShardReader
from ipa_train.data.sources import LocalFile
from ipa_train.data.transfer import BatchMemory
from ipa_train.errors import ConfigError, DataError, difference
from ipa_train.runtime.files import atomic_write

VERSION = 1
DESCRIPTION = "cache.json"
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "I64": np.dtype(np.int64)}
_MAX_HEADER_BYTES = 2**16
_UNLIKE_NEIGHBOURS = "its features are laid out unlike those of its neighbours"


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """All that the features of a cache depend on."""

    encoders: dict[str, Any]
    """What made them: VAE, image encoder, kind of image features, as the training module states it."""
    precision: dict[str, str]
    """In which the encoders ran; not compared at training, which may run in another one."""
    resolution: int
    buckets: list[list[int]]
    """(height, width) of the training pixels."""
    bucket_step: int | None
    max_aspect_ratio: float
    flipped: bool
    latents_std: bool
    source: str
    """Identity of the index of the shards that were encoded."""
    groups: list[str] = field(default_factory=list)
    """Names of these shards, in their order."""
    image_prompt: str = "picture"
    reference_mask: str = "none"
    reference_mask_margin: float = 0.0
    embedding_shape: list[int] | None = None

    @property
    def fingerprint(self) -> str:
        """Of everything above, save what is at its default: older caches do not speak of that."""
        usual = {part.name: part.default for part in fields(self)}
        facts = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write ``cache.json``, or check that the one there says the same.

        Raises:
            ConfigError: another cache is there; names what differs.
        """
        if (folder / DESCRIPTION).exists():
            there = read_description(folder)
            if there != self:
                old, new = (asdict(description) | description.encoders for description in (there, self))
                differing = difference(old | {"encoders": None}, new | {"encoders": None})
                raise ConfigError(
                    f"{folder} holds a cache of another kind: {differing}; "
                    "encode into another folder, or delete this one."
                )
            return
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / DESCRIPTION) as temporary:
            content = {"version": VERSION, "fingerprint": self.fingerprint, **asdict(self)}
            temporary.write_text(json.dumps(content, indent=1))

    def require(self, folder: str, *, encoders: dict[str, Any], **options: object) -> None:
        """Raise ConfigError, naming what differs, unless the features are what training with these would compute."""
        if encoders != self.encoders:
            raise ConfigError(
                f"{folder}: these features were made by other encoders than this run's: "
                f"{difference(self.encoders, encoders)}; encode anew (ipa data encode), or use the encoders of then."
            )
        for name, value in options.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"data.{name}={value}, but {folder} was encoded with {name}={getattr(self, name)}: "
                    "set it alike, or encode anew (ipa data encode)."
                )


def encoders_identity(vae: dict[str, Any], image_encoder: dict[str, Any], feature_kind: str) -> dict[str, Any]:
    """What features depend on besides the pictures, of what the encoders say of themselves.

    What older caches do not speak of is said only where it is not as it was for all of them.
    """
    layer, embedding = image_encoder.get("layer"), image_encoder.get("embedding")
    return {
        **vae,
        "image_encoder_sha256": image_encoder["weights_sha256"],
        "image_preprocessing": image_encoder["preprocessing"],
        **({} if layer == -2 else {"image_layer": layer}),
        **({} if embedding is None else {"stored_embedding": embedding}),
        "feature_kind": feature_kind,
    }


def read_description(folder: Path) -> CacheDescription:
    """Read ``cache.json``.

    Raises:
        ConfigError: there is none, or not of this version, or it was changed by hand.
    """
    return _read_description(str(folder), (folder / DESCRIPTION).read_bytes)


def _read_description(folder: str, read: Callable[[], bytes]) -> CacheDescription:
    path = f"{folder}/{DESCRIPTION}"
    try:
        content = json.loads(read())
        version, fingerprint = content.pop("version"), content.pop("fingerprint")
        if version != VERSION:
            raise ConfigError(f"{path}: version {version}, this release reads {VERSION}; encode anew.")
        description = CacheDescription(**content)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: without it nothing says what the features beside it are.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: damaged: {error}; encode anew.") from error
    if description.fingerprint != fingerprint:
        raise ConfigError(f"{path}: its fingerprint is not that of its content; it was changed, so encode anew.")
    return description


class _Tensor(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Layout:
    """The header that all members of a bucket share, and the tensors behind it in their order."""

    def __init__(self, head: bytes) -> None:
        """Read from the first bytes of a member, or all. Raises DataError if they are no safetensors header."""
        length = int.from_bytes(head[:8], "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, len(head) - 8):
            raise DataError("its features are not in safetensors form")
        self.header = head[: 8 + length]
        try:
            entries = json.loads(self.header[8:])
            entries.pop("__metadata__", None)
            found = sorted((e["data_offsets"][0], name, e["dtype"], e["shape"]) for name, e in entries.items())
            self.tensors = [_Tensor(name, _DTYPES[dtype], tuple(shape)) for _, name, dtype, shape in found]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"its features cannot be understood: {error}") from error

    def check(self, data: bytes) -> None:
        """Raise DataError unless ``data`` is a member of this layout and all its numbers are finite."""
        if data[: len(self.header)] != self.header:
            raise DataError(_UNLIKE_NEIGHBOURS)
        start = len(self.header)
        length = start + sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)
        if len(data) != length:
            raise DataError(f"its features are {len(data)} bytes long, not {length}")
        for tensor in self.tensors:
            values = np.frombuffer(data, tensor.dtype, math.prod(tensor.shape), start)
            start += values.nbytes
            if not np.isfinite(values).all():
                raise DataError(f"its {tensor.name} are not finite")


class FeatureLoader:
    """Reads cached features; also finds which shard of a cache holds a bucket of a source shard (its group)."""

    def __init__(self, index: Index, *, flip_rate: float = 0.0, seed: int = 0) -> None:
        check_flip_rate(flip_rate)
        self.reader, self.flip_rate, self.seed = ShardReader(index), flip_rate, seed
        self._tars = {shard.tar.folder: shard.tar for shard in index.shards}
        self.descriptions = {
            folder: _read_description(folder, partial(tar.read_beside, DESCRIPTION))
            for folder, tar in self._tars.items()
        }
        first = next(iter(self.descriptions.values()))
        for folder, description in self.descriptions.items():
            for name in ("buckets", "latents_std"):
                if getattr(description, name) != getattr(first, name):
                    raise ConfigError(f"{folder}: its {name} are not those of the other caches; encode them alike.")
            if flip_rate and not description.flipped:
                raise ConfigError(
                    f"data.flip_rate={flip_rate}, but {folder} holds no flipped features: encode with --flip."
                )
        self.buckets: list[Bucket] = [(height, width) for height, width in first.buckets]
        self._table = self._group_shards(index)
        self._layouts = [self._read_layout(bucket) for bucket in range(len(self.buckets))]

    @property
    def counts(self) -> Int64[ndarray, "buckets groups"]:
        """Samples of each bucket in each group."""
        counts = np.append(self.reader.index.counts, 0)
        return counts[self._table].T

    @property
    def group_folders(self) -> list[str]:
        """The cache that each group belongs to."""
        shards = self.reader.index.shards
        return [shards[row.max()].tar.folder for row in self._table]

    def shard(self, group: int, bucket: int) -> int:
        """The shard that holds the samples of a bucket which a plan counts under ``group``."""
        return int(self._table[group, bucket])

    def begin(self, bucket: int, positions: Tensor) -> "FeatureBatch":
        """Make room for the samples of these positions."""
        layout = self._layouts[bucket]
        if layout is None:
            raise ValueError(f"bucket {bucket} has no samples")
        return FeatureBatch(self, layout, self.buckets[bucket], positions)

    def _group_shards(self, index: Index) -> Int64[ndarray, "groups buckets"]:
        """Numbers of the shards, -1 where a group has no sample of a bucket.

        Raises:
            DataError: the cache is not finished, or holds a shard that its description does not know.
        """
        numbers = {shard.tar.location: number for number, shard in enumerate(index.shards)}
        table = []
        for folder, description in self.descriptions.items():
            for group in description.groups:
                paths = [f"{folder}/{shard_name(group, bucket)}" for bucket in self.buckets]
                row = [numbers.pop(path, -1) for path in paths]
                tar = self._tars[folder]
                # Of remote caches those are asked for that nothing else is known of: else it were a question each.
                is_asked = max(row) < 0 or isinstance(tar, LocalFile)
                if is_asked and not tar.has_beside(f"{group}.json"):
                    raise DataError(f"{folder}: shard {group} is not encoded yet; run ipa data encode again.")
                if max(row) >= 0:
                    table.append(row)
        if numbers:
            raise DataError(f"{next(iter(numbers))}: not a shard of the cache that {DESCRIPTION} beside it describes.")
        return np.array(table)

    def _read_layout(self, bucket: int) -> Layout | None:
        shards = self._table[:, bucket]
        shards = shards[np.append(self.reader.index.counts, 0)[shards] > 0]
        if not len(shards):
            return None
        found = shards[0]
        length = int(self.reader.index.shards[found].rows()[0]["content_length"])
        try:
            return Layout(self.reader.head(int(found), min(length, _MAX_HEADER_BYTES)))
        except DataError as error:
            raise DataError(f"{self.reader.index.shards[found].tar.location}: {error}") from error


class FeatureBatch:
    """A batch of features in the making."""

    def __init__(self, loader: FeatureLoader, layout: Layout, size: Bucket, positions: Tensor) -> None:
        self.loader, self.layout = loader, layout
        count = len(positions)
        self._memory = BatchMemory(
            ((count,), np.int64), ((count, 2), np.int64), *(((count, *t.shape), t.dtype) for t in layout.tensors)
        )
        own_positions, target_sizes, *arrays = self._memory.arrays
        own_positions[:] = positions
        target_sizes[:] = size
        self._header = bytearray(len(layout.header))
        self._buffers = list(zip(*map(_rows, arrays), strict=True))
        self._num_bytes = len(layout.header) + sum(array[0].nbytes for array in arrays)
        self._flips = draw_flips(loader.seed, positions, loader.flip_rate)

    def load(self, i: int, shard: int, row: int) -> tuple[str, str]:
        """Read a sample into place ``i``; return (caption, key). Raises DataError if it is bad."""
        found = self.loader.reader.read_into(
            shard, row, (self._header, *self._buffers[i]), num_bytes=self._num_bytes, flipped=self._flips[i]
        )
        if self._header != self.layout.header:
            raise DataError(_UNLIKE_NEIGHBOURS)
        return found

    def finish(self, captions: list[str], keys: list[str]) -> Batch:
        """The batch, when every place is filled."""
        positions, target_sizes, *tensors = self._memory.hand_over()
        of = dict(zip((t.name for t in self.layout.tensors), tensors, strict=True))
        return Batch(
            content=Features(
                latents_mean=of["latents_mean"],
                latents_std=of.get("latents_std"),
                image_features=tuple(of[name] for name in takewhile(of.__contains__, map(features_column, count()))),
            ),
            captions=captions,
            positions=positions,
            original_sizes=of["original_size"],
            crop_top_lefts=of["crop_top_left"],
            target_sizes=target_sizes,
            keys=keys,
        )


def _rows(array: ndarray) -> list[memoryview]:
    """The memory of each sample of a batch."""
    whole, length = array.reshape(-1).view(np.uint8).data, array[0].nbytes
    return [whole[start : start + length] for start in range(0, len(whole), length)]


def features_column(number: int) -> str:
    """Name of the tensor that holds a sample's image features of the kind of this number."""
    return f"image_features_{number}" if number else "image_features"


def shard_name(group: str, bucket: Sequence[int]) -> str:
    """Name of the tar that holds a bucket of a source shard."""
    return f"{group}-{bucket[0]}x{bucket[1]}.tar"
