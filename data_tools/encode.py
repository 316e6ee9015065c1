"""The work of `ipa data encode`: every picture through the frozen encoders, once, into a feature cache.

A task is one source shard, done when its ``NAME.json`` is there. Any number of processes on any number of nodes may
share the tasks, and a re-run does only what is missing. Memory does not grow with the data.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_tools.shard_writer import open_shard
from ipa_train.bases import LatentPosterior
from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.cache import DESCRIPTION, CacheDescription, features_column, shard_name
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.pictures import PictureBatch, PictureLoader
from ipa_train.data.scan import FEATURES_SUFFIX, FLIPPED_SUFFIX, TEXT_SUFFIX
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

Encode = Callable[[Pictures], tuple[LatentPosterior, tuple[Tensor, ...]]]
"""From pictures to the posterior of their latents and their image features of each kind, as training makes them."""


@dataclass(frozen=True, kw_only=True)
class EncodedShard:
    """What came of one source shard: the content of its ``NAME.json``."""

    num_samples: int
    bad: list[str]
    """``shard/key: reason`` of each sample that is not in the cache."""


class CacheWriter:
    """Encodes shards of pictures into ``out``, each into one tar per aspect bucket.

    ``flip`` adds the features of the mirrored pictures, since latents cannot be mirrored themselves. Without
    ``latents_std`` the posterior's spread is left out, and training takes the means for latents. ``precision`` says in
    which the encoders run, by name.
    """

    def __init__(
        self,
        data: StreamingDataModule,
        encode: Encode,
        *,
        out: Path,
        precision: dict[str, str],
        flip: bool = False,
        latents_std: bool = True,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {batch_size}.")
        if len(data.sources) > 1:
            raise ConfigError("data.shards names several sources: encode each into a cache of its own.")
        if not data.index.shards:
            raise ConfigError("these shards are streamed, but encoding reads them at random: use data=shards.")
        if data.index.content != "pictures":
            raise ConfigError(f"data.shards: {data.index.shards[0].path.parent} holds features already.")
        if data.crop != "center":
            raise ConfigError(f"data.crop={data.crop!r}: features are of centre crops; set data.crop=center.")
        data.image_prompts.require_fixed()
        self.shards, self.encode, self.out = data.index.shards, encode, out
        assert isinstance(data.stream.loader, PictureLoader)
        self.loader = data.stream.loader
        self.flip, self.latents_std, self.batch_size = flip, latents_std, batch_size
        self.num_workers = data.num_workers
        self.groups = [shard.path.stem for shard in self.shards]
        if Path(DESCRIPTION).stem in self.groups:
            raise ConfigError(f"data.shards: rename {Path(DESCRIPTION).stem}.tar: the cache has a file of that name.")
        if twice := [name for name, count in Counter(self.groups).items() if count > 1]:
            raise ConfigError(f"data.shards: two shards are named {twice[0]}: encode each folder into its own cache.")
        self.description = CacheDescription(
            encoders=data.encoders or {},
            precision=precision,
            resolution=data.resolution,
            buckets=[list(bucket) for bucket in data.stream.buckets],
            bucket_step=data.bucket_step,
            max_aspect_ratio=data.max_aspect_ratio,
            flipped=flip,
            latents_std=latents_std,
            source=data.index.index_id,
            groups=self.groups,
            **data.image_prompts.description,
        )

    def done(self, shard: int) -> EncodedShard | None:
        """What came of a shard, if it is done.

        Raises:
            DataError: what is written of it is damaged.
        """
        mark = self._mark(shard)
        try:
            return EncodedShard(**json.loads(mark.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise DataError(f"{mark}: damaged; delete it, and its shard is encoded anew.") from error

    def run(self, shards: Sequence[int]) -> Iterator[EncodedShard | DataError]:
        """Encode some shards, by number, and yield what came of each in turn.

        Raises:
            ConfigError: ``out`` holds a cache of another kind, or cannot be written.
        """
        try:
            self.description.write(self.out)
        except OSError as error:
            raise ConfigError(f"--out {self.out}: cannot be written: {error.strerror}.") from error
        loader: DataLoader[_Chunk] = DataLoader(
            _Chunks(self.loader, flip=self.flip),
            sampler=self._pieces(shards),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        total = sum(self.shards[shard].entry.num_samples for shard in shards)
        with tqdm(total=total, desc="encode", unit="picture", disable=None) as bar:
            for shard, chunks in groupby(loader, key=lambda chunk: chunk.shard):
                counted = _counted(chunks, bar)
                try:
                    yield self._encode_shard(shard, counted)
                except DataError as error:
                    yield error
                except OSError as error:
                    yield DataError(f"{self.out}: shard {self.groups[shard]} cannot be written: {error.strerror}")
                for _ in counted:  # what is left of a shard that failed
                    pass

    def _mark(self, shard: int) -> Path:
        return self.out / f"{self.groups[shard]}.json"

    def _pieces(self, shards: Sequence[int]) -> Iterator["_Piece"]:
        for shard in shards:
            try:
                counts = self.loader.reader.counts(shard)
            except DataError as error:
                yield _Piece(shard, 0, range(0), str(error))
                continue
            for bucket, count in enumerate(counts):
                for start in range(0, max(count, 1), self.batch_size):  # one piece of nothing, so that none is missed
                    yield _Piece(shard, bucket, range(start, min(start + self.batch_size, count)), "")

    def _encode_shard(self, shard: int, chunks: Iterable["_Chunk"]) -> EncodedShard:
        num_samples = 0
        bad: list[str] = []
        for bucket, of_bucket in groupby(chunks, key=lambda chunk: chunk.bucket):
            samples = self._samples(of_bucket, bad)
            for first in samples:  # a bucket without samples has no file
                path = self.out / shard_name(self.groups[shard], self.loader.buckets[bucket])
                with open_shard(path) as writer:
                    for key, members in chain([first], samples):
                        writer.write(key, members)
                num_samples += writer.num_samples
        if num_samples + len(bad) != self.shards[shard].entry.num_samples:
            raise DataError(f"{self.shards[shard].path}: only {num_samples} samples came; run the command again.")
        if bad and not num_samples:
            raise DataError(
                f"{self.shards[shard].path}: none of its samples can be encoded; first {bad[0]}. Mend it, or leave it "
                "out of data.shards."
            )
        result = EncodedShard(num_samples=num_samples, bad=bad)
        with atomic_write(self._mark(shard)) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=1))
        return result

    def _samples(self, chunks: Iterable["_Chunk"], bad: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members of each sample; what cannot be cached is added to ``bad``."""
        for chunk in chunks:
            if chunk.error:
                raise DataError(f"{self.shards[chunk.shard].path}: {chunk.error}")
            bad += chunk.bad
            versions = {FEATURES_SUFFIX: chunk.batch, FLIPPED_SUFFIX: chunk.flipped}
            features = {suffix: self._features(batch) for suffix, batch in versions.items() if batch is not None}
            for i, (key, caption) in enumerate(zip(chunk.batch.keys, chunk.batch.captions, strict=True)):
                tensors = {suffix: {name: values[i] for name, values in f.items()} for suffix, f in features.items()}
                if not all(value.isfinite().all() for part in tensors.values() for value in part.values()):
                    bad.append(f"{self.shards[chunk.shard].name}/{key}: its features are not finite in fp16")
                    continue
                members = {suffix: safetensors.torch.save(part) for suffix, part in tensors.items()}
                yield key, {**members, TEXT_SUFFIX: caption.encode()}

    @torch.no_grad()
    def _features(self, batch: Batch) -> dict[str, Tensor]:
        """The tensors of a batch by the names that the cache gives them; a row is a sample."""
        if not len(batch):
            return {}
        assert isinstance(batch.content, Pictures)
        posterior, image_features = self.encode(batch.content)
        stored = {"latents_mean": posterior.mean}
        stored |= {features_column(number): features for number, features in enumerate(image_features)}
        if self.latents_std:
            stored["latents_std"] = posterior.std
        features = {name: values.to("cpu", torch.float16).contiguous() for name, values in stored.items()}
        return features | {"original_size": batch.original_sizes, "crop_top_left": batch.crop_top_lefts}


class _Piece(NamedTuple):
    shard: int
    bucket: int
    numbers: range
    error: str
    """Why the shard cannot be read: an exception here or in a worker would take the place of another's piece."""


class _Chunk(NamedTuple):
    shard: int
    bucket: int
    batch: Batch
    flipped: Batch | None
    bad: list[str]
    error: str


class _Chunks(Dataset[_Chunk]):
    """Pieces of shards, decoded; runs in the loader's workers."""

    def __init__(self, loader: PictureLoader, *, flip: bool) -> None:
        self.loader, self.flip = loader, flip

    def __getitem__(self, piece: _Piece) -> _Chunk:
        try:
            return self._chunk(piece)
        except DataError as error:
            nothing, _ = self._load(piece, [], [], flipped=False)
            return _Chunk(piece.shard, piece.bucket, nothing, None, [], str(error))

    def _chunk(self, piece: _Piece) -> _Chunk:
        if piece.error:
            raise DataError(piece.error)
        reader = self.loader.reader
        bad: list[str] = []
        rows = [reader.row(piece.shard, piece.bucket, number) for number in piece.numbers]
        batch, sound = self._load(piece, rows, bad, flipped=False)
        flipped = None
        if self.flip:
            flipped, again = self._load(piece, sound, bad, flipped=True)
            if again != sound:
                raise DataError(f"it changed while it was read: {bad[-1]}")
        return _Chunk(piece.shard, piece.bucket, batch, flipped, bad, "")

    def _load(self, piece: _Piece, rows: list[int], bad: list[str], *, flipped: bool) -> tuple[Batch, list[int]]:
        size = self.loader.buckets[piece.bucket]
        batch = PictureBatch(self.loader, size, torch.arange(len(rows)), [flipped] * len(rows))
        reader = self.loader.reader
        captions, keys = [], []
        sound: list[int] = []
        for row in rows:
            try:
                caption, key = batch.load(len(sound), piece.shard, row)
            except DataError as error:
                bad.append(f"{reader.index.shards[piece.shard].name}/{reader.key(piece.shard, row)}: {error}")
                continue
            captions.append(caption)
            keys.append(key)
            sound.append(row)
        return batch.finish(captions, keys), sound


def _counted(chunks: Iterable[_Chunk], bar: tqdm) -> Iterator[_Chunk]:
    for chunk in chunks:
        yield chunk
        bar.update(len(chunk.batch) + len(chunk.bad))
