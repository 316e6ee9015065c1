"""What all tools share: work spread over processes with a progress bar, and a report that says what came of it.

A task is one output (a shard, as a rule), written atomically and last of all; a re-run does only what is missing.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ipa_train.data.scan import EXTRAS
from ipa_train.errors import ConfigError, DataError, difference
from ipa_train.runtime.files import atomic_write
from ipa_train.runtime.processes import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
_MAX_SHOWN = 5
_PLACES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))  # a batch script alone is one
_NO_ARRAY = {"ID": 0, "MIN": 0, "STEP": 1, "COUNT": 1}
EXIT_PROBLEMS = 1
"""The work is done, but its result is not to be trusted blindly: the report names what is wrong."""


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every tool takes."""
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument("--report", type=Path, help="where to write the JSON report, if not beside the output")


def add_share_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how processes share the work; under torchrun, srun and in a Slurm job array nothing need be said."""
    index, count = _place()
    parser.add_argument("--num-tasks", type=int, default=count, help="processes that share the work")
    parser.add_argument("--task-index", type=int, default=index, help="which of them this is, from 0")


def my_share(tasks: Sequence[Task], args: argparse.Namespace) -> Sequence[Task]:
    """The tasks of this process: neighbours, which read the same sources.

    Raises:
        ConfigError: ``--task-index`` is not one of ``--num-tasks``.
    """
    index, count = args.task_index, args.num_tasks
    if not 0 <= index < count:
        raise ConfigError(f"--task-index={index} must be from 0 to --num-tasks - 1 = {count - 1}.")
    return tasks[len(tasks) * index // count : len(tasks) * (index + 1) // count]


def _place() -> tuple[int, int]:
    """This process's number and how many there are: of its launcher, times the jobs of an array."""
    index, count = 0, 1
    for names in _PLACES:
        if all(name in os.environ for name in names):
            index, count = (int(os.environ[name]) for name in names)
            break
    array = {name: int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", value)) for name, value in _NO_ARRAY.items()}
    job = (array["ID"] - array["MIN"]) // array["STEP"]
    return job * count + index, array["COUNT"] * count


def add_max_bad_rate(parser: argparse.ArgumentParser) -> None:
    """Declare what a tool takes that leaves out bad samples; see :meth:`Report.left_out`."""
    parser.add_argument("--max-bad-rate", type=float, default=0.0, help="exit with 0 in spite of so many bad samples")


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every tool takes that reads shards where they lie."""
    parser.add_argument("shards", nargs="+", help="folder, glob, or /data/{00000..00010}.tar")
    parser.add_argument("--index-dir", type=Path, help="where the index lies, if not beside the shards")
    parser.add_argument("--allow-missing-stats", action="store_true", help="take shards of other writers")


def add_needs(parser: argparse.ArgumentParser) -> None:
    """Declare what a sample must hold besides its picture and caption, for runs that need it."""
    parser.add_argument(
        "--needs", nargs="+", choices=EXTRAS, default=[], help="also KEY.ref.*, KEY.mask.png, KEY.npy of every sample"
    )


def make_output_folder(path: Path, *, option: str = "--out") -> Path:
    """Make the folder ``path``, if it is not there, and return it.

    Raises:
        ConfigError: it cannot be made, or not written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be made: {error.strerror}.") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path}: cannot be written to.")
    return path


def claim_folder(
    folder: Path, mark: str, facts: Mapping[str, Any], *, what: str = "shards", pattern: str = "*.tar"
) -> None:
    """Make an output folder this work's own: what it is made of and how is written to its file ``mark``, once.

    ``what`` the work makes are files like ``pattern``.

    Raises:
        ConfigError: it holds such files of another origin, and what differs; or it cannot be used.
    """
    path = make_output_folder(folder) / mark
    if not path.exists():
        if any(folder.glob(pattern)):
            raise ConfigError(f"--out {folder} holds {what}, and no {mark} says what they are; give another folder.")
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(facts, indent=1))
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged ({error}); give another folder, or delete this one.") from error
    # As JSON has it, a tuple is a list; and what an older mark does not speak of is None.
    if differing := difference(there, json.loads(json.dumps(facts))):
        raise ConfigError(
            f"--out {folder} holds {what} made in another way: {differing}; give another folder, or delete this one."
        )


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    description: str,
    unit: str = "shard",
    workers: int | None = None,
) -> Iterator[tuple[Task, Result | DataError]]:
    """Yield (task, result) in the order of ``tasks``; a DataError is handed over in place of a result.

    ``function`` and its tasks cross to other processes: they must be picklable, so a plain function or a partial of
    one. Any exception but DataError and OSError is a fault of ours, and is raised.

    Raises:
        ConfigError: ``workers`` is below 1.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}.")
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    safely = partial(_refuse, function)
    bar = partial(tqdm, total=len(tasks), desc=description, unit=unit, disable=None)
    if workers <= 1:
        yield from zip(tasks, bar(map(safely, tasks)), strict=True)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        yield from zip(tasks, bar(pool.map(safely, tasks)), strict=True)


def _refuse(function: Callable[[Task], Result], task: Task) -> Result | DataError:
    """One task's failure, as a value: it must not end the work on the others."""
    try:
        return function(task)
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{error.filename or task}: {error.strerror or error}")


class Report:
    """Counts, problems and whatever else a tool found; one JSON file, one summary, one exit code."""

    def __init__(self, tool: str, **facts: Any) -> None:
        self.tool, self.facts = tool, facts
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Note what makes the result doubtful: it will be in the report, and the exit code will not be 0."""
        self.problems.append(text)

    def left_out(self, bad: Sequence[str], num_samples: int, max_bad_rate: float) -> None:
        """Name the samples that could not be used beside ``num_samples`` that could; too many are a problem."""
        if not 0.0 <= max_bad_rate <= 1.0:
            raise ConfigError(f"--max-bad-rate must be between 0 and 1, got {max_bad_rate}.")
        self.counts["bad samples left out"] = len(bad)
        self.facts["bad"] = list(bad)
        if len(bad) > max_bad_rate * (num_samples + len(bad)):
            self.problem(f"{len(bad):,} samples are bad, above --max-bad-rate={max_bad_rate}; first {bad[0]}")

    def finish(self, path: Path) -> int:
        """Write the report to ``path``, say what came of it, and return the exit code: 0, or 1 if there are problems.

        Raises:
            ConfigError: the report cannot be written there.
        """
        content = {"tool": self.tool, "ok": not self.problems, "counts": dict(self.counts)}
        content |= {"problems": self.problems, **self.facts}
        try:
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--report {path}: cannot be written: {error}.") from error
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        sys.stdout.write(f"{self.tool}: {counts or 'nothing to do'}; report in {path}\n")
        for text in self.problems[:_MAX_SHOWN]:
            sys.stdout.write(f"  {text}\n")
        if len(self.problems) > _MAX_SHOWN:
            sys.stdout.write(f"  and {len(self.problems) - _MAX_SHOWN:,} more problems\n")
        return EXIT_PROBLEMS if self.problems else 0
