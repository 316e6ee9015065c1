"""The stream as Lightning wants it; its state is one integer."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from ipa_train.data.batch import Batch
from ipa_train.data.decode import Decoder
from ipa_train.data.index import Index, build_index
from ipa_train.data.pipeline import LoadedBatch, StreamDataset, StreamSampler, count_micro_batches
from ipa_train.data.plan import Plan
from ipa_train.data.tolerance import ErrorBudget
from ipa_train.errors import ConfigError, DataError

STATE_VERSION = 2
_log = logging.getLogger(__name__)


class StreamingDataModule(lightning.LightningDataModule):
    """Endless batches from WebDataset shards, the same ones whatever the number of ranks and workers.

    Every sample comes exactly once per epoch, and a resumed run goes on at the very next one, also with other numbers
    of ranks, workers and another batch size. Sizes are in samples and pixels.
    """

    def __init__(
        self,
        *,
        shards: str | Sequence[str],
        global_batch_size: int,
        resolution: int,
        image_prompt_size: int = 224,
        batch_size: int | None = None,
        crop: str = "center",
        flip_rate: float = 0.0,
        num_workers: int = 4,
        prefetch_factor: int = 4,
        seed: int = 0,
        num_lanes: int = 8,
        window_size: int = 20_000,
        max_bad_rate: float = 0.001,
        max_pixels: int = 50_000_000,
        max_member_bytes: int = 64 * 2**20,
        allow_missing_stats: bool = False,
        allow_index_change: bool = False,
        index_dir: str | None = None,
        bad_samples_dir: str | None = None,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ConfigError(f"data.num_workers must be at least 0, got {num_workers}.")
        for name, value in (("global_batch_size", global_batch_size), ("prefetch_factor", prefetch_factor)):
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}.")
        self.decoder = Decoder(
            resolution=resolution,
            image_prompt_size=image_prompt_size,
            crop=crop,
            flip_rate=flip_rate,
            max_pixels=max_pixels,
            seed=seed,
        )
        self.shards, self.global_batch_size, self.batch_size = shards, global_batch_size, batch_size
        self.num_workers, self.prefetch_factor, self.seed = num_workers, prefetch_factor, seed
        self.num_lanes, self.window_size = num_lanes, window_size
        self.max_bad_rate, self.max_member_bytes = max_bad_rate, max_member_bytes
        self.allow_missing_stats, self.allow_index_change = allow_missing_stats, allow_index_change
        self.index_dir = None if index_dir is None else Path(index_dir)
        self.bad_samples_dir = None if bad_samples_dir is None else Path(bad_samples_dir)
        self._index: Index | None = None
        self._start_position, self._start_step = 0, 0
        self.budget = ErrorBudget(max_bad_rate=max_bad_rate)

    def prepare_data(self) -> None:
        """Index the shards, once per node."""
        _ = self.index

    @property
    def index(self) -> Index:
        """The index of the shards, built or read at the first use."""
        if self._index is None:
            self._index = build_index(
                self.shards,
                index_dir=self.index_dir,
                allow_missing_stats=self.allow_missing_stats,
                max_member_bytes=self.max_member_bytes,
            )
            incomplete = sum(shard.entry.num_incomplete for shard in self._index.shards)
            total = int(self._index.counts.sum())
            _log.info("data: %d samples in %d shards", total, len(self._index.shards))
            if incomplete:
                _log.warning("data: %d samples without an image or a caption are left out", incomplete)
        return self._index

    @property
    def plan(self) -> Plan:
        """The order of the samples."""
        return Plan(self.index.counts, seed=self.seed, num_lanes=self.num_lanes, window_size=self.window_size)

    def setup(self, stage: str) -> None:
        """Open this rank's log of bad samples."""
        path = None
        if self.bad_samples_dir is not None:
            path = self.bad_samples_dir / f"bad_samples-rank{self.trainer.global_rank:04d}.jsonl"
        self.budget = ErrorBudget(max_bad_rate=self.max_bad_rate, log_path=path)

    def accumulate_grad_batches(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each of ``world_size`` ranks; ConfigError if the sizes do not divide."""
        return count_micro_batches(
            global_batch_size=self.global_batch_size, batch_size=self.batch_size, world_size=world_size
        )

    def train_dataloader(self) -> DataLoader[LoadedBatch]:
        """The stream from the current position on, for this rank."""
        return self.loader(
            self.position, rank=self.trainer.global_rank, world_size=self.trainer.world_size, workers=self.num_workers
        )

    def loader(self, start: int, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> DataLoader[LoadedBatch]:
        """Batches of one rank from position ``start`` on; needs no trainer."""
        plan = self.plan
        share = self.global_batch_size // world_size // self.accumulate_grad_batches(world_size)
        sampler = StreamSampler(
            plan,
            start=start,
            global_batch_size=self.global_batch_size,
            batch_size=share,
            rank=rank,
            world_size=world_size,
        )
        return DataLoader(
            StreamDataset(self.index, plan, self.decoder),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def first_batch(self, num_samples: int) -> Batch:
        """The first samples of the stream, for checks and for pictures of what training sees."""
        loader = self.loader(0)
        return loader.dataset[loader.sampler.plan.rank_positions(0, num_samples, 0, 1)].batch  # type: ignore[attr-defined]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take out the report of bad samples, and stop when there are too many."""
        if not isinstance(batch, LoadedBatch):
            return batch
        self.budget.record(batch.num_samples, batch.bad)
        return batch.batch

    @property
    def position(self) -> int:
        """Samples consumed by optimizer steps so far; what workers have prefetched does not count."""
        steps = self.trainer.global_step - self._start_step if self.trainer is not None else 0
        return self._start_position + steps * self.global_batch_size

    @property
    def _order(self) -> dict[str, str | int]:
        """All that a position's sample depends on."""
        return {
            "index_id": self.index.index_id,
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "window_size": self.window_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream; equal on all ranks."""
        return {
            "version": STATE_VERSION,
            **self._order,
            "position": self.position,
            "step": self.trainer.global_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved place.

        Raises:
            DataError: the shards, the seed or the lanes and windows are not those of the checkpoint.
        """
        if state_dict["version"] != STATE_VERSION:
            raise DataError(
                f"the checkpoint's place in the data is of version {state_dict['version']}, this release reads "
                f"{STATE_VERSION}: train on with the release that wrote it."
            )
        if state_dict["seed"] != self.seed:
            raise DataError(
                f"this run has seed {self.seed}, its checkpoint {state_dict['seed']}: "
                "use the old seed, or another run.name."
            )
        for name in ("num_lanes", "window_size"):
            if state_dict[name] != getattr(self, name):
                raise DataError(
                    f"data.{name}={getattr(self, name)}, but {state_dict[name]} in the checkpoint: samples would be "
                    "repeated and left out; use the old value, or another run.name."
                )
        if state_dict["index_id"] != self.index.index_id and not self.allow_index_change:
            raise DataError(
                f"data.shards are not the ones of the checkpoint (index {self.index.index_id}, then "
                f"{state_dict['index_id']}): give the same shards, or set data.allow_index_change=true to go on at "
                f"sample {state_dict['position']} of the new ones."
            )
        self._start_position, self._start_step = state_dict["position"], state_dict["step"]
