"""The fallback for sources that can only be read from front to back: the output of commands, for the most part.

Every worker draws shards with replacement, and mixes their samples in a buffer. So there are no epochs, the order
depends on ranks and workers, and a resumed run sees other samples than it would have seen. What holds: every rank has
as many batches, no two samples are drawn for with the same key, and bad samples are replaced, counted and limited.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from ipa_train.data.augmentation import ReferenceAugmentation
from ipa_train.data.buckets import make_buckets
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.index import Index
from ipa_train.data.pictures import PictureBatch, PictureLoader
from ipa_train.data.pipeline import ENDLESS, Places, StreamDataset, UnfinishedBatch
from ipa_train.data.plan import Plan
from ipa_train.data.reader import ShardReader
from ipa_train.data.stream import Stream
from ipa_train.data.tar_stream import Sample, SampleReader, find_sources
from ipa_train.data.tolerance import MAX_ATTEMPTS, BadSample, all_bad
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.distributed import rank

_log = logging.getLogger(__name__)


class SequentialDataset(StreamDataset):
    """Fills the places of a batch with whatever samples come next."""

    def __init__(self, stream: Stream, samples: SampleReader) -> None:
        super().__init__(stream.plans, stream.loader)
        self.samples = samples
        self._iterator: Iterator[Sample] | None = None

    def _load(
        self, batch: UnfinishedBatch, i: int, places: Places, group: int, number: int, bad: list[BadSample]
    ) -> tuple[str, str]:
        assert isinstance(batch, PictureBatch)
        if self._iterator is None:  # each worker has its own
            worker = get_worker_info()
            self._iterator = self.samples.read(0 if worker is None else worker.id)
        for _ in range(MAX_ATTEMPTS):
            sample = next(self._iterator)
            try:
                if sample.error:
                    raise DataError(sample.error)
                batch.fill(i, sample.image, sample.extras)
                caption = sample.caption.decode().strip()
                return caption, f"{PurePosixPath(sample.source).name}/{sample.key}"
            except (DataError, UnicodeDecodeError) as error:
                position = int(places.positions[i])
                # Of endless size: how much of a source is bad cannot be told.
                bad.append(BadSample(position, sample.source, ENDLESS, position, sample.key, str(error)))
        raise all_bad(bad[-MAX_ATTEMPTS:])


class SequentialDataModule(StreamingDataModule):
    """Endless batches from sources without random access; of the guarantees of its base only the above.

    ``shards`` are commands (``pipe:...``, only if ``allow_shell``), URLs or local files, which need no index and no
    cache here. ``shuffle_size`` is how many samples each worker holds to mix them, as they are stored.
    """

    def __init__(
        self,
        *,
        shards: str | Sequence[str],
        global_batch_size: int,
        resolution: int,
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
        shuffle_size: int = 1000,
        max_bad_rate: float = 0.001,
        max_pixels: int = 50_000_000,
        max_member_bytes: int = 64 * 2**20,
        allow_shell: bool = False,
        patience_seconds: float = 60.0,
        bad_samples_dir: str | None = None,
        encoders: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            shards=shards,
            global_batch_size=global_batch_size,
            resolution=resolution,
            image_prompt_size=image_prompt_size,
            image_prompt=image_prompt,
            reference_mask=reference_mask,
            reference_mask_margin=reference_mask_margin,
            reference_augment=reference_augment,
            embedding_shape=embedding_shape,
            batch_size=batch_size,
            crop=crop,
            flip_rate=flip_rate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            seed=seed,
            max_bad_rate=max_bad_rate,
            max_pixels=max_pixels,
            max_member_bytes=max_member_bytes,
            bad_samples_dir=bad_samples_dir,
            encoders=encoders,
        )
        if shuffle_size < 1:
            raise ConfigError(f"data.shuffle_size must be at least 1, got {shuffle_size}.")
        self.shuffle_size, self.allow_shell, self.patience_seconds = shuffle_size, allow_shell, patience_seconds

    @cached_property
    def index(self) -> Index:
        """None is made."""
        return Index(())

    @cached_property
    def stream(self) -> Stream:
        """Positions, which key the draws; what comes at each is not known before."""
        if rank() == 0:
            _log.warning(
                "data: streamed without an index: order, resume and every sample once per epoch do not hold here; "
                "data=shards reads disks, web servers and object stores exactly"
            )
        buckets = make_buckets(self.resolution)
        loader = PictureLoader(
            ShardReader(self.index),
            buckets,
            decoder=self.decoder,
            image_prompts=self.image_prompts,
            crop=self.crop,
            flip_rate=self.flip_rate,
            seed=self.seed,
        )
        order = Plan(np.array([ENDLESS]), seed=self.seed, num_lanes=1)
        return Stream(buckets, [order], np.ones(1), loader, {"": ENDLESS})

    @cached_property
    def tars(self) -> list[str]:
        """All sources, one by one."""
        (spec,) = self.sources.values()
        return find_sources(spec, allow_shell=self.allow_shell, patience_seconds=self.patience_seconds)

    def prepare_data(self) -> None:
        """Look whether there is anything to read, before training waits for it."""
        _ = self.stream, self.tars

    def dataset(self, start: np.ndarray, rank: int) -> SequentialDataset:
        """Other shards for each rank and each start: a resumed run does not begin with the same ones again."""
        samples = SampleReader(
            self.tars,
            seed=(self.seed, rank, int(start.sum())),
            shuffle_size=self.shuffle_size,
            max_member_bytes=self.max_member_bytes,
            patience_seconds=self.patience_seconds,
            extras=self.image_prompts.extras,
        )
        return SequentialDataset(self.stream, samples)
