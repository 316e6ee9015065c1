"""What the benchmarks share: costs measured side by side, and one form for their results."""

import argparse
import importlib.metadata
import json
import platform
import resource
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ipa_train.runtime.files import atomic_write

Batches = Generator[Any, None, None]
Name = TypeVar("Name")
_PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "transformers", "webdataset")


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def cost(work: Callable[[], int]) -> float:
    """CPU microseconds per sample of some work, which returns how many samples it was."""
    start = cpu_seconds()
    num_samples = work()
    return 1e6 * (cpu_seconds() - start) / num_samples


def measure(cases: Mapping[Name, Callable[[], float]], *, rounds: int) -> dict[Name, float]:
    """Least cost of each case.

    Cases take turns, so that whatever else the machine does meets all of them, and the least of the rounds is what
    remains without it.
    """
    least: dict[Name, float] = {}
    for _ in range(rounds):
        for name, case in cases.items():
            found = case()
            least[name] = min(found, least.get(name, found))
    return least


def measure_with_worker(
    makers: Mapping[str, Callable[..., Batches]], *, batch_size: int, num_batches: int, rounds: int
) -> dict[str, float]:
    """As :func:`measure`, read by one worker process, whose start does not count: a short run is taken from a long."""

    def read(make: Callable[..., Batches], count: int) -> int:
        batches = make(workers=1)
        for _ in range(count):
            next(batches)
        batches.close()  # a child's CPU time is known when it has ended
        return 1

    lengths = (num_batches, 3 * num_batches)
    cases = {
        (name, count): partial(cost, partial(read, make, count)) for name, make in makers.items() for count in lengths
    }
    found = measure(cases, rounds=rounds)
    num_samples = (lengths[1] - lengths[0]) * batch_size
    return {name: (found[name, lengths[1]] - found[name, lengths[0]]) / num_samples for name in makers}


def facts(packages: Sequence[str] = ()) -> dict[str, Any]:
    """The machine, the versions and the commit."""
    versions = {}
    for package in (*_PACKAGES, *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": f"{platform.machine()}, {_processor()}, one core per process",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """Of the code that was measured; ``-dirty`` if there were changes beside it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parser(description: str | None) -> argparse.ArgumentParser:
    """With what all benchmarks take."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, help="folder for the made-up data; kept, and used again")
    arguments.add_argument("--out", type=Path, help="write the figures to this JSON file, and a table beside it (.md)")
    arguments.add_argument("--rounds", type=int, default=5, help="of which the least counts; default: 5")
    return arguments


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def finish(figures: Mapping[str, Any], markdown: str, out: Path | None) -> None:
    """Show the table; write it, and the figures."""
    print(markdown)
    if out is None:
        return
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    with atomic_write(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown)
