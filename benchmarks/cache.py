"""CPU time per sample of cached features: ours beside plain webdataset, MosaicML Streaming, litdata and Energon.

    python -m benchmarks.cache [--work DIR] [--out benchmarks/results/cache.json]

All read the same samples (latents 4x64x64 and an embedding of 1024 in fp16, crop, size, caption: 35 kB), each in its
own form, in batches, through the loader that its users get, in a process of its own. Readers take turns; the least of
the rounds counts. What is not installed is left out, and said to be. Takes about two minutes, and 2 GB of disk.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import feature_readers
from benchmarks.reporting import Batches, cost, facts, finish, measure, measure_with_worker, parser, table
from benchmarks.synthetic import draw_features, write_features
from ipa_train.data.index import build_index

OURS, PLAIN = "ipa-train", "webdataset"
LIMIT = "reading alone (one pread a sample, into the same memory)"


class ReaderProcess:
    """A reader in a process of its own, so that nothing a library does in the background is counted with another's."""

    def __init__(self, opener: Callable[[], Batches]) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(opener, theirs))
        self._process.start()
        theirs.close()
        self.is_installed: bool = self._pipe.recv()

    def cost(self, num_batches: int) -> float:
        """CPU microseconds per sample."""
        self._pipe.send(num_batches)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(opener: Callable[[], Batches], pipe: Connection) -> None:
    _be_quiet()
    with redirect_stdout(sys.stderr):
        reader = opener()
        try:
            first = next(reader)
        except ImportError:
            pipe.send(False)
            return
        for caption, latents in zip(first["captions"], first["latents_mean"], strict=True):
            if not torch.equal(latents, draw_features(int(caption.split()[0])).tensors["latents_mean"]):
                raise AssertionError(f"{opener} gave a sample that is not what was written")
        pipe.send(True)
        while num_batches := pipe.recv():
            pipe.send(cost(partial(read_batches, reader, num_batches)))


def _be_quiet() -> None:
    warnings.simplefilter("ignore")  # the other libraries' own
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def openers(work: Path, *, num_samples: int, batch_size: int) -> dict[str, Callable[[], Batches]]:
    cache = work / "cache"
    return {
        OURS: partial(feature_readers.ours, cache, batch_size),
        PLAIN: partial(feature_readers.plain_webdataset, cache, batch_size),
        "MosaicML Streaming": partial(feature_readers.mosaic_streaming, work / "mds", batch_size, num_samples),
        "litdata, tensors": partial(
            feature_readers.litdata, work / "litdata", batch_size, num_samples, as_tensors=True
        ),
        "litdata, NumPy arrays": partial(
            feature_readers.litdata, work / "litdata-numpy", batch_size, num_samples, as_tensors=False
        ),
        "Energon": partial(feature_readers.energon, work / "energon", batch_size, cache),
    }


def read_batches(reader: Batches, num_batches: int) -> int:
    return sum(len(next(reader)["captions"]) for _ in range(num_batches))


def read_alone(cache: Path, batch_size: int, num_batches: int) -> Callable[[], int]:
    """A case that reads the same bytes in random order, and does nothing else."""
    shards = build_index(str(cache)).shards
    descriptors = [os.open(shard.path, os.O_RDONLY) for shard in shards]
    rng = np.random.default_rng(0)
    places = []
    for shard in rng.integers(len(shards), size=batch_size * num_batches).tolist():
        rows = shards[shard].rows()
        places.append((descriptors[shard], int(rows[rng.integers(len(rows))]["offset"])))
    block = np.empty((batch_size, int(shards[0].rows()["length"].max())), np.uint8)
    buffers = [[row.data] for row in block]

    def work() -> int:
        for number, (descriptor, offset) in enumerate(places):
            os.preadv(descriptor, buffers[number % batch_size], offset)
        return len(places)

    return work


def run(work: Path, *, num_shards: int, shard_size: int, batch_size: int, num_batches: int, rounds: int) -> Any:
    """All figures."""
    cache, num_samples = work / "cache", num_shards * shard_size
    if not cache.exists():
        write_features(cache, map(draw_features, range(num_samples)), num_shards=num_shards, shard_size=shard_size)
    build_index(str(cache), num_workers=1)
    readers = {}
    for name, opener in openers(work, num_samples=num_samples, batch_size=batch_size).items():
        readers[name] = ReaderProcess(opener)
    missing = [name for name, reader in readers.items() if not reader.is_installed]
    cases = {name: partial(reader.cost, num_batches) for name, reader in readers.items() if reader.is_installed}
    costs = measure(cases | {LIMIT: partial(cost, read_alone(cache, batch_size, num_batches))}, rounds=rounds)
    for name in cases:
        readers[name].close()
    makers = {
        OURS: partial(feature_readers.ours, cache, batch_size),
        PLAIN: partial(feature_readers.plain_webdataset, cache, batch_size),
    }
    with_worker = measure_with_worker(makers, batch_size=batch_size, num_batches=num_batches, rounds=rounds)
    return {
        **facts(("mosaicml-streaming", "litdata", "megatron-energon")),
        "settings": {
            "samples": num_samples,
            "sample_bytes": int(build_index(str(cache)).shards[0].rows()["length"][0]),
            "batch_size": batch_size,
            "samples_per_round": batch_size * num_batches,
            "rounds": rounds,
        },
        "not_installed": missing,
        "cpu_us_per_sample": costs,
        "times_ours": {name: found / costs[OURS] for name, found in costs.items()},
        "cpu_us_per_sample_with_one_worker": with_worker,
    }


def markdown(figures: Any) -> str:
    rows = []
    for name, found in figures["cpu_us_per_sample"].items():
        rows.append([name, f"{found:.1f}", f"{figures['times_ours'][name]:.1f}"])
    rows += [[name, "not installed", ""] for name in figures["not_installed"]]
    for name, found in figures["cpu_us_per_sample_with_one_worker"].items():
        ratio = found / figures["cpu_us_per_sample_with_one_worker"][OURS]
        rows.append([f"{name}, one worker process", f"{found:.1f}", f"{ratio:.1f}"])
    return table(["cached features, 35 kB", "CPU us per sample", "times ours"], rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--shards", type=int, default=16)
    arguments.add_argument("--shard-size", type=int, default=500)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--batches", type=int, default=48, help="of a reader, in a round; default: 48")
    args = arguments.parse_args()
    _be_quiet()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        figures = run(
            work,
            num_shards=args.shards,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            num_batches=args.batches,
            rounds=args.rounds,
        )
    finish(figures, markdown(figures), args.out)


if __name__ == "__main__":
    main()
