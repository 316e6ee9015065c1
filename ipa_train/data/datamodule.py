"""The stream as Lightning wants it; its state is one integer for each bucket."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader

from ipa_train.data.augmentation import ReferenceAugmentation
from ipa_train.data.batch import Batch
from ipa_train.data.buckets import BucketSchedule
from ipa_train.data.cache import FeatureLoader
from ipa_train.data.decode import MAX_PIXELS, Decoder
from ipa_train.data.image_prompts import ImagePrompts
from ipa_train.data.index import MAX_MEMBER_BYTES, Index, build_index
from ipa_train.data.local_copies import LocalCopies
from ipa_train.data.pictures import PictureLoader
from ipa_train.data.pipeline import LoadedBatch, Places, StreamDataset, StreamSampler, count_micro_batches
from ipa_train.data.plan import rank_share
from ipa_train.data.prefetch import Lanes, Prefetcher, lanes_of_node, require_room
from ipa_train.data.reader import ShardReader
from ipa_train.data.resume import are_same_buckets, require_same_order
from ipa_train.data.scan import lacks
from ipa_train.data.stream import Stream, choose_buckets, make_stream
from ipa_train.data.tolerance import ErrorBudget
from ipa_train.data.transfer import DeviceCopies
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.distributed import rank
from ipa_train.runtime.processes import leave_signals_to_parent

STATE_VERSION = 3
_log = logging.getLogger(__name__)


class StreamingDataModule(lightning.LightningDataModule):
    """Endless batches from WebDataset shards, the same ones whatever the number of ranks and workers.

    Every sample comes exactly once per epoch, and a resumed run goes on at the very next one, also with other numbers
    of ranks, workers and another batch size. Sizes are in samples and pixels.

    ``shards`` hold pictures, or the features of a cache (``ipa data encode``), made by ``encoders``. Several sources
    may be given by name, and mixed by ``weights``; without weights all samples are seen equally often.
    """

    def __init__(
        self,
        *,
        shards: str | Sequence[str] | Mapping[str, Any],
        global_batch_size: int,
        resolution: int,
        weights: Mapping[str, float] | None = None,
        bucket_step: int | None = None,
        max_aspect_ratio: float = 2.0,
        min_bucket_rate: float = 0.005,
        image_prompt_size: int | None = 224,
        image_prompt: str = "picture",
        reference_mask: str = "none",
        reference_mask_margin: float = 0.1,
        reference_augment: ReferenceAugmentation | None = None,
        embedding_shape: Sequence[int] | None = None,
        batch_size: int | None = None,
        crop: str = "center",
        flip_rate: float = 0.0,
        num_workers: int = 4,
        prefetch_factor: int = 4,
        seed: int = 0,
        num_lanes: int = 64,
        window_size: int = 20_000,
        max_bad_rate: float = 0.001,
        on_missing_shard: str = "stop",
        max_pixels: int = MAX_PIXELS,
        max_member_bytes: int = MAX_MEMBER_BYTES,
        allow_missing_stats: bool = False,
        allow_index_change: bool = False,
        index_dir: str | None = None,
        cache_dir: str | None = None,
        cache_gib: float = 100.0,
        patience_seconds: float = 60.0,
        num_nodes: int = 1,
        bad_samples_dir: str | None = None,
        encoders: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ConfigError(f"data.num_workers must be at least 0, got {num_workers}.")
        positive = {
            "global_batch_size": global_batch_size,
            "prefetch_factor": prefetch_factor,
            "num_lanes": num_lanes,
            "window_size": window_size,
            "num_nodes": num_nodes,
        }
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}.")
        if weights is not None and not isinstance(shards, Mapping):
            raise ConfigError("data.weights needs sources with names: data.shards='{a: /data/a, b: /data/b}'.")
        self.decoder = Decoder(max_pixels=max_pixels)
        self.image_prompts = ImagePrompts(
            size=image_prompt_size,
            source=image_prompt,
            mask=reference_mask,
            mask_margin=reference_mask_margin,
            augment=reference_augment or ReferenceAugmentation(),
            embedding_shape=None if embedding_shape is None else tuple(embedding_shape),
            max_pixels=max_pixels,
        )
        self.sources: dict[str, Any] = dict(shards) if isinstance(shards, Mapping) else {"": shards}
        self.weights = None if weights is None else dict(weights)
        self.resolution, self.bucket_step = resolution, bucket_step
        self.max_aspect_ratio, self.min_bucket_rate = max_aspect_ratio, min_bucket_rate
        self.crop, self.flip_rate = crop, flip_rate
        self.global_batch_size, self.batch_size = global_batch_size, batch_size
        self.num_workers, self.prefetch_factor, self.seed = num_workers, prefetch_factor, seed
        self.num_lanes, self.window_size = num_lanes, window_size
        self.max_bad_rate, self.on_missing_shard = max_bad_rate, on_missing_shard
        self.max_member_bytes = max_member_bytes
        self.allow_missing_stats, self.allow_index_change = allow_missing_stats, allow_index_change
        self.index_dir = None if index_dir is None else Path(index_dir)
        self.num_nodes = num_nodes
        self.copies = None
        if cache_dir is not None:
            self.copies = LocalCopies(Path(cache_dir), max_gib=cache_gib, patience_seconds=patience_seconds)
        self._prefetcher: Prefetcher | None = None
        self.bad_samples_dir = None if bad_samples_dir is None else Path(bad_samples_dir)
        self.encoders = encoders
        self._start_positions: np.ndarray | None = None
        self._device_copies = DeviceCopies()
        self._start_step = 0
        self.budget = self._make_budget(None)

    def prepare_data(self) -> None:
        """Index the shards, once per node."""
        _ = self.stream

    @cached_property
    def _indices(self) -> dict[str, Index]:
        """The index of each source, built or read at the first use."""
        indices = {
            name: build_index(
                spec,
                index_dir=self.index_dir,
                allow_missing_stats=self.allow_missing_stats,
                max_member_bytes=self.max_member_bytes,
                copies=self.copies,
                trust_index=rank() > 0,  # rank 0 has just looked at all shards
                extras=self.image_prompts.extras,
            )
            for name, spec in self.sources.items()
        }
        entries = [shard.entry for index in indices.values() for shard in index.shards]
        _log.info("data: %d samples in %d shards", sum(entry.num_samples for entry in entries), len(entries))
        if incomplete := sum(entry.num_incomplete for entry in entries):
            _log.warning("data: %d samples without %s are left out", incomplete, lacks(self.image_prompts.extras))
        if excluded := sum(entry.num_excluded for entry in entries):
            _log.info("data: %d samples are left out by exclude lists", excluded)
        return indices

    @cached_property
    def index(self) -> Index:
        """The index of all sources together."""
        return Index(tuple(shard for index in self._indices.values() for shard in index.shards))

    @cached_property
    def stream(self) -> Stream:
        """The order of the samples, and what loads them.

        Raises:
            ConfigError: options that cannot be with these shards.
            DataError: an unfinished cache, or sources without samples.
        """
        options = {name: getattr(self, name) for name in ("weights", "seed", "num_lanes", "window_size")}
        if self.index.content == "features":
            return self._feature_stream(options)
        buckets, counts, is_exact = choose_buckets(
            self.index,
            resolution=self.resolution,
            step=self.bucket_step,
            max_aspect_ratio=self.max_aspect_ratio,
            min_rate=self.min_bucket_rate,
        )
        prompts = self.image_prompts
        for shard in self.index.shards if prompts.masks_pictures else ():
            if "reference" in shard.entry.found_extras:
                raise ConfigError(
                    f"data.reference_mask={prompts.mask}: {shard.tar.location} has KEY.ref.*, and masks are of these: "
                    "set data.image_prompt=reference, or data.reference_mask=none."
                )
        if is_exact and self.crop == "center" and prompts.are_pictures:
            # What is stored at its training size is cropped to the very square that the image encoder sees.
            prompts = replace(prompts, size=None)
        loader = PictureLoader(
            ShardReader(self.index, buckets),
            buckets,
            decoder=self.decoder,
            image_prompts=prompts,
            crop=self.crop,
            flip_rate=self.flip_rate,
            seed=self.seed,
        )
        ends = np.cumsum([len(index.shards) for index in self._indices.values()])
        groups = np.split(np.arange(ends[-1]), ends[:-1])
        stream = make_stream(loader, buckets, counts, dict(zip(self._indices, groups, strict=True)), **options)
        return self._with_room(stream)

    def _feature_stream(self, options: dict[str, Any]) -> Stream:
        if self.crop != "center":
            raise ConfigError(f"data.crop={self.crop!r}: cached features are of centre crops; set data.crop=center.")
        self.image_prompts.require_fixed()
        loader = FeatureLoader(self.index, flip_rate=self.flip_rate, seed=self.seed)
        for folder, description in loader.descriptions.items():
            description.require(
                folder,
                encoders=description.encoders if self.encoders is None else self.encoders,
                resolution=self.resolution,
                bucket_step=self.bucket_step,
                max_aspect_ratio=self.max_aspect_ratio,
                **self.image_prompts.description,
            )
        names = {shard.tar.folder: name for name, index in self._indices.items() for shard in index.shards}
        of_group = np.array([names[folder] for folder in loader.group_folders])
        sources = {name: np.flatnonzero(of_group == name) for name in self._indices}
        return self._with_room(make_stream(loader, loader.buckets, loader.counts, sources, **options))

    def _with_room(self, stream: Stream) -> Stream:
        if self.copies is not None and self.index.is_remote:
            require_room(stream, self._lanes(stream, np.zeros(len(stream.buckets), np.int64), 0), self.copies)
        return stream

    def _lanes(self, stream: Stream, positions: np.ndarray, node: int) -> Lanes:
        return lanes_of_node(
            stream, positions, global_batch_size=self.global_batch_size, node=node, num_nodes=self.num_nodes
        )

    def setup(self, stage: str) -> None:
        """Open this rank's log of bad samples."""
        path = None
        if self.bad_samples_dir is not None:
            path = self.bad_samples_dir / f"bad_samples-rank{self.trainer.global_rank:04d}.jsonl"
        self.budget = self._make_budget(path)

    def _make_budget(self, log_path: Path | None) -> ErrorBudget:
        return ErrorBudget(max_bad_rate=self.max_bad_rate, on_missing_shard=self.on_missing_shard, log_path=log_path)

    def teardown(self, stage: str) -> None:
        """Stop downloading."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def on_exception(self, exception: BaseException) -> None:
        """Stop downloading."""
        self.teardown("fit")

    def accumulate_grad_batches(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each of ``world_size`` ranks; ConfigError if the sizes do not divide."""
        return count_micro_batches(
            global_batch_size=self.global_batch_size, batch_size=self.batch_size, world_size=world_size
        )

    def train_dataloader(self) -> DataLoader[LoadedBatch]:
        """The stream from the current position on, for this rank; remote shards are downloaded ahead of it."""
        if self.copies is not None and self.index.is_remote and self.trainer.local_rank == 0:
            lanes = self._lanes(self.stream, self.positions, self.trainer.node_rank)
            self._prefetcher = Prefetcher(self.stream, self.positions, lanes, self.copies)
        return self.loader(
            self.positions, rank=self.trainer.global_rank, world_size=self.trainer.world_size, workers=self.num_workers
        )

    def loader(
        self, start: np.ndarray | None = None, *, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> DataLoader[LoadedBatch]:
        """Batches of one rank from ``start`` on (samples consumed of each bucket; none); needs no trainer."""
        stream = self.stream
        start = np.zeros(len(stream.buckets), np.int64) if start is None else start
        sampler = StreamSampler(
            stream.plans,
            BucketSchedule(stream.shares, start),
            global_batch_size=self.global_batch_size,
            batch_size=self.global_batch_size // world_size // self.accumulate_grad_batches(world_size),
            rank=rank,
            world_size=world_size,
        )
        return DataLoader(
            self.dataset(start, rank),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            worker_init_fn=leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def largest_bucket(self) -> int:
        """Number of the bucket with the most pixels."""
        return max(range(len(self.stream.buckets)), key=lambda bucket: math.prod(self.stream.buckets[bucket]))

    def first_batch(self, num_samples: int, *, bucket: int | None = None) -> Batch:
        """The first samples of a bucket, of the first unless given: for checks and pictures of what training sees."""
        stream = self.stream
        if bucket is None:
            bucket, _, _ = BucketSchedule(stream.shares, np.zeros(len(stream.buckets), np.int64)).step(num_samples)
        positions = rank_share(stream.plans[bucket], 0, num_samples, 0, 1)
        dataset = self.dataset(np.zeros(len(stream.buckets), np.int64), 0)
        return dataset[Places(bucket, positions, positions)].batch

    def dataset(self, start: np.ndarray, rank: int) -> StreamDataset:
        """What a rank's loader takes batches from; here it is the same for all ranks and starts."""
        return StreamDataset(self.stream.plans, self.stream.loader)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the bad samples, and hand on the batch alone."""
        if not isinstance(batch, LoadedBatch):
            return batch
        if self._prefetcher is not None:
            self._prefetcher.advance(self.positions)
        self.budget.record(batch.num_samples, batch.bad)
        return batch.batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy it without a wait."""
        return self._device_copies(batch, device)

    @property
    def positions(self) -> np.ndarray:
        """Samples of each bucket consumed by optimizer steps so far; what workers have prefetched does not count."""
        schedule = BucketSchedule(self.stream.shares, self._start)
        steps = self.trainer.global_step - self._start_step if self.trainer is not None else 0
        for _ in range(steps):
            schedule.step(self.global_batch_size)
        if steps:  # so that the next look need not begin so far back
            self._start_positions, self._start_step = schedule.positions, self.trainer.global_step
        return schedule.positions

    @property
    def _start(self) -> np.ndarray:
        if self._start_positions is None:
            self._start_positions = np.zeros(len(self.stream.buckets), np.int64)
        return self._start_positions

    @property
    def _order(self) -> dict[str, Any]:
        """All that a position's sample depends on."""
        return {
            "index_id": self.index.index_id,
            "extras": list(self.image_prompts.extras),
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "window_size": self.window_size,
            "weights": self.weights,
            "buckets": [list(bucket) for bucket in self.stream.buckets],
        }

    def progress(self) -> dict[str, float]:
        """For the dashboards, alike on all ranks: epochs of each source, and the bad samples of this start."""
        budget = self.budget
        metrics = {
            "data/bad_fraction": budget.num_bad / max(1, budget.num_seen),
            "data/bad_samples": float(budget.num_bad),
            "data/bad_shards": float(len(budget.by_shard)),
        }
        for name, count in self.stream.consumed(self.positions).items():
            metrics[f"data/epochs_{name}" if name else "data/epochs"] = count / self.stream.sources[name]
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream; equal on all ranks."""
        return {
            "version": STATE_VERSION,
            **self._order,
            "positions": self.positions.tolist(),
            "step": self.trainer.global_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved place.

        Raises:
            DataError: the shards, what is needed of each sample, the seed, the buckets, weights, lanes or windows are
                not those of the checkpoint.
        """
        if state_dict["version"] != STATE_VERSION:
            raise DataError(
                f"the checkpoint's place in the data is of version {state_dict['version']}, this release reads "
                f"{STATE_VERSION}: train on with the release that wrote it."
            )
        order = self._order
        require_same_order(state_dict, order, allow_index_change=self.allow_index_change)
        positions = np.array(state_dict["positions"])
        if not are_same_buckets(state_dict, order):
            positions = BucketSchedule.positions_at(self.stream.shares, int(positions.sum()))
        self._start_positions, self._start_step = positions, state_dict["step"]
