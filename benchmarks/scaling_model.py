"""What a step of many GPUs costs: all-reduce over two levels of network, overlap, stragglers, and the data it reads.

Times are seconds, sizes bytes, bandwidths bytes per second. Nothing here is measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def assumption(default: float, source: str) -> float:
    return field(default=default, metadata={"help": source})


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed of the machines; each field is an option of the benchmark."""

    gpus_per_node: int = assumption(8, "of an HGX board")
    node_gb_per_s: float = assumption(360, "inside a node, each way; 80 %% of NVLink 4's 450 GB/s")
    nic_gbit_per_s: float = assumption(400, "line rate of one NIC: NDR InfiniBand")
    nic_share: float = assumption(0.8, "of the line rate that a large all-reduce reaches; an estimate")
    hop_us: float = assumption(12, "of one hop of a collective; an estimate, launch included")
    jitter: float = assumption(0.005, "standard deviation of a step, as a share of it; an estimate")
    backward_share: float = assumption(0.52, "of a step; 0.867 of 1.670 TFLOP counted for SD 1.5 at 512 px")

    def all_reduce(self, num_bytes: float, num_gpus: int, num_nics: int) -> float:
        """A ring inside each node, then one between nodes; two hops for each level of a tree."""
        local = min(num_gpus, self.gpus_per_node)
        nodes = num_gpus / local
        wire = num_nics * self.nic_gbit_per_s * 1e9 / 8 * self.nic_share
        inside = 2 * (1 - 1 / local) * num_bytes / (self.node_gb_per_s * 1e9)
        between = 2 * (1 - 1 / nodes) * num_bytes / wire
        return inside + between + 2e-6 * self.hop_us * (1 + math.log2(nodes)) * (num_gpus > 1)

    def exposed(self, buckets: Sequence[float], step: float, num_gpus: int, num_nics: int) -> float:
        """Of the all-reduce of buckets, the time after the backward's end.

        The backward fills them evenly; each waits for the one before it.
        """
        begin, done, end = step * (1 - self.backward_share), 0.0, 0.0
        for num_bytes in buckets:
            done += num_bytes
            ready = begin + step * self.backward_share * done / sum(buckets)
            end = max(ready, end) + self.all_reduce(num_bytes, num_gpus, num_nics)
        return end - step

    def efficiency(self, step: float, communication: float, num_gpus: int) -> float:
        """Share of the speed of so many single GPUs; the slowest of N is late by about sigma sqrt(2 ln N)."""
        late = self.jitter * math.sqrt(2 * math.log(num_gpus))
        return 1 / (1 + late + communication / step)


def fill_buckets(sizes: Sequence[int], *, cap: int = 25 * 2**20, first_cap: int = 2**20) -> list[int]:
    """Bytes of DDP's buckets for gradients that come in this order: each closes when it reaches its cap.

    The first is small, so that communication starts early (torch.nn.parallel.DistributedDataParallel).
    """
    buckets, open_bytes = [], 0
    for size in sizes:
        open_bytes += size
        if open_bytes >= (cap if buckets else first_cap):
            buckets.append(open_bytes)
            open_bytes = 0
    return [*buckets, open_bytes] if open_bytes else buckets


def even_buckets(num_bytes: float, cap: float) -> list[float]:
    """As many equal buckets as the cap asks for."""
    count = math.ceil(num_bytes / cap)
    return [num_bytes / count] * count


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run on one GPU."""

    name: str
    num_parameters: int
    """Trained."""
    batch_size: int
    step_seconds: float


RUNS = (
    Run(name="SD 1.5 512, batch 8", num_parameters=22_319_616, batch_size=8, step_seconds=8 / 172),
    Run(name="SD 1.5 512, batch 64", num_parameters=22_319_616, batch_size=64, step_seconds=64 / 172),
    Run(name="SDXL 512, batch 16", num_parameters=351_285_248, batch_size=16, step_seconds=16 / 90),
    Run(name="SDXL 1024, batch 8", num_parameters=351_285_248, batch_size=8, step_seconds=8 / 21.7),
)
"""Step times estimated for one H200 with cached features, +-25 %: half of MLPerf's share of a fused roofline."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a GPU reads for one picture."""

    name: str
    num_bytes: int
    images_per_second: float
    """Estimated for one H200."""


RECORDS = (
    Record(name="SD 1.5 512, JPEG (110 kB assumed)", num_bytes=110_000, images_per_second=92),
    Record(name="SD 1.5 512, moments, pooled, captions", num_bytes=67_892, images_per_second=171),
    Record(name="SD 1.5 512, moments, pooled, text", num_bytes=185_856, images_per_second=172),
    Record(name="SD 1.5 plus 512, all cached", num_bytes=841_728, images_per_second=170),
    Record(name="SDXL 1024, JPEG (400 kB assumed)", num_bytes=400_000, images_per_second=15),
    Record(name="SDXL 1024, moments, pooled, captions", num_bytes=265_320, images_per_second=21.7),
    Record(name="SDXL 1024, all cached", num_bytes=582_656, images_per_second=21.7),
)
