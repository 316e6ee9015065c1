"""Download the pictures of url lists into shards, with img2dataset.

pipx install --python 3.12 img2dataset     # in an environment of its own; Python 3.13 lacks a module that it imports
ipa data filter relaion2B-en/*.parquet --out urls --min-size 512 --max-unsafe 0.1 --max-watermark 0.8
ipa data download urls --out /data/laion --image-size 512 --workers 16

The source of metadata we recommend is research-safe Re-LAION (laion/relaion2B-en-research-safe on the Hugging Face
hub), from which links to suspected child abuse material were removed; do not use older copies of LAION-5B.

Under --out there will be urls/ (http and https only, every url once), shards/ (for data.shards), download.json (what
was asked) and download-report.json. Pictures whose server forbids their use for training by an X-Robots-Tag (noai,
noimageai, noindex, noimageindex) are not taken. Every shard is then read from end to end. The same command again goes
on after an interrupt, downloads damaged and empty shards anew, and leaves finished ones alone.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow.parquet as pq

from data_tools.downloaded import check_shard, is_empty
from data_tools.metadata import find_metadata
from data_tools.url_lists import clean_url_lists, common_columns
from data_tools.work import Report, add_work_arguments, make_output_folder, run_tasks
from ipa_train.errors import ConfigError, DataError
from ipa_train.runtime.files import atomic_write

Stats = dict[str, Any]
RESIZE_MODES = ("keep_ratio", "center_crop", "keep_ratio_largest", "border", "no")
_SETTINGS = ("image_size", "resize_mode", "quality", "samples_per_shard", "user_agent_token")
_NUM_REASONS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("metadata", nargs="+", help="folder, glob, or /data/{000..127}.parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument(
        "--image-size", type=positive, default=512, help="pixels; larger pictures are resized; default: 512"
    )
    parser.add_argument(
        "--resize-mode", choices=RESIZE_MODES, default="keep_ratio", help="default: keep_ratio, by the shorter side"
    )
    parser.add_argument("--quality", type=positive, default=95, help="of the JPEGs written, 1 to 100; default: 95")
    parser.add_argument("--samples-per-shard", type=positive, default=10_000, help="default: 10000")
    parser.add_argument("--user-agent-token", help="name to give to servers, whose X-Robots-Tag for it is heeded")
    parser.add_argument("--timeout", type=positive, default=10, help="seconds per url; default: 10")
    parser.add_argument("--retries", type=int, default=0, help="per url, refusals too; default: 0")
    parser.add_argument("--threads", type=positive, default=256, help="per process; default: 256")
    parser.add_argument("--min-success-rate", type=float, default=0.3, help="below it exit with 1; default: 0.3")
    parser.add_argument("--img2dataset", metavar="PATH", help="the program, if not on PATH")
    add_work_arguments(parser)


def positive(text: str) -> int:
    """Parse an option's value. Raises ValueError below 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run(args: argparse.Namespace) -> int:
    """Clean the url lists, download, check and report."""
    program = _find_program(args.img2dataset)
    shards = make_output_folder(args.out / "shards")
    report = Report("download")
    with _alone(args.out) as lock:
        asked = _prepare(args)
        report.counts.update(asked["counts"])
        names = [f"{number:05d}" for number in range(_num_shards(args))]
        checked = _check(shards, names, args.workers)
        sound = {name: stats for name, stats in checked.items() if _is_sound(stats, shards / f"{name}.tar")}
        for name in checked.keys() - sound.keys():
            (shards / f"{name}_stats.json").unlink()  # for img2dataset a shard with statistics is finished
            report.counts["bad shards before"] += 1
        report.facts["num_done_before"] = len(sound)
        missing = [name for name in names if name not in sound]
        if missing:
            status = _download(program, args, asked["columns"], lock)
            if status:
                report.problem(f"{program} ended with exit status {status}; what it said is above.")
            checked = _check(shards, missing, args.workers)
            _report_bad(checked, missing, shards, report)
            sound |= {name: stats for name, stats in checked.items() if isinstance(stats, dict)}
    _describe(report, sound, args.min_success_rate)
    return report.finish(args.report or args.out / "download-report.json")


def _find_program(given: str | None) -> str:
    found = shutil.which(given or "img2dataset")
    if not found:
        raise ConfigError(
            f"{'--img2dataset ' + given if given else 'img2dataset'}: no such program; install it in an environment of "
            "its own (pipx install --python 3.12 img2dataset), and give --img2dataset PATH if it is not on PATH."
        )
    return found


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Hold the folder's lock, for as long as img2dataset lives too, even if this process is killed."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {out}: another download into it is going on; wait for it, or end it.") from None
        yield lock.fileno()


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Clean the url lists unless that is done, and return what was asked and counted.

    Raises:
        ConfigError: there is something else in the folder, or nothing to download.
    """
    paths = find_metadata(args.metadata)
    inputs = [[path.name, path.stat().st_size] for path in paths]
    asked: dict[str, Any] = {name: getattr(args, name) for name in _SETTINGS} | {"inputs": inputs}
    settings, urls = args.out / "download.json", args.out / "urls"
    if settings.exists():
        before = json.loads(settings.read_text())
        different = [name for name, value in asked.items() if before.get(name) != value]
        if different:
            raise ConfigError(
                f"--out {args.out} was begun with other {', '.join(different)} ({before.get(different[0])} and not "
                f"{asked[different[0]]}): give another folder, or the same command as then."
            )
        if urls.is_dir():
            return before
    schema = common_columns(paths)
    shutil.rmtree(urls, ignore_errors=True)  # settings are written last: without them it is a leftover
    counts = clean_url_lists(paths, urls, schema=schema, workers=args.workers)
    if not counts["to download"]:
        raise ConfigError(f"METADATA: none of {counts['urls']:,} urls is of http or https.")
    asked |= {"columns": schema.names, "counts": counts}
    with atomic_write(settings) as temporary:
        temporary.write_text(json.dumps(asked, indent=1))
    return asked


def _num_shards(args: argparse.Namespace) -> int:
    """img2dataset begins a new shard with every file."""
    files = (args.out / "urls").glob("*.parquet")
    return sum(-(-pq.read_metadata(path).num_rows // args.samples_per_shard) for path in files)


def _check(shards: Path, names: Sequence[str], workers: int | None) -> dict[str, Stats | DataError]:
    """Read every shard that img2dataset says is finished: its statistics, or what is wrong with it."""
    finished = [shards / f"{name}.tar" for name in names if (shards / f"{name}_stats.json").exists()]
    results = run_tasks(check_shard, finished, description="check", workers=workers)
    return {path.stem: result for path, result in results}


def _is_sound(stats: Stats | DataError, shard: Path) -> TypeGuard[Stats]:
    return isinstance(stats, dict) and not is_empty(shard, stats)


def _report_bad(
    checked: Mapping[str, Stats | DataError], expected: Sequence[str], shards: Path, report: Report
) -> None:
    """Name the shards that are damaged, empty or not there."""
    for name, stats in checked.items():
        shard = shards / f"{name}.tar"
        if isinstance(stats, DataError):
            report.problem(str(stats))
        elif is_empty(shard, stats):
            report.problem(
                f"{shard}: no url gave a picture; run the same command again to try anew, or delete the tar."
            )
    unfinished = [name for name in expected if name not in checked]
    if unfinished:
        first = shards / f"{unfinished[0]}.tar"
        report.problem(f"{len(unfinished):,} shards unfinished, first {first}; run the same command again.")


def _download(program: str, args: argparse.Namespace, columns: Sequence[str], lock: int) -> int:
    """Run img2dataset and return its exit status.

    It has a process group of its own that ends with us: a SIGTERM would end its main process alone.
    """
    shards = args.out.resolve() / "shards"
    foreign = [path for path in shards.glob("*.json") if not re.fullmatch(r"\d+_stats\.json", path.name)]
    if foreign:
        raise ConfigError(f"{foreign[0]}: img2dataset takes every .json there for a shard's statistics; move it away.")
    options = {
        "url_list": args.out.resolve() / "urls",
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": list(columns[2:]) or None,
        "output_folder": shards,
        "output_format": "webdataset",
        "number_sample_per_shard": args.samples_per_shard,
        "image_size": args.image_size,
        "resize_mode": args.resize_mode,
        "resize_only_if_bigger": True,
        "encode_quality": args.quality,
        "incremental_mode": "incremental",
        "timeout": args.timeout,
        "retries": args.retries,
        "processes_count": args.workers or os.cpu_count(),
        "thread_count": args.threads,
        "user_agent_token": args.user_agent_token,
    }
    command = [program, *(f"--{name}={value}" for name, value in options.items() if value is not None)]
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}  # or each of its processes asks the internet
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, start_new_session=True, pass_fds=[lock], env=environment)
    try:
        return process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _describe(report: Report, sound: Mapping[str, Stats], min_success_rate: float) -> None:
    """Sum up the statistics of all sound shards."""
    reasons: Counter[str] = Counter()
    for stats in sound.values():
        for what in ("successes", "failed_to_download", "failed_to_resize"):
            report.counts[what] += stats[what]
        reasons.update({reason: count for reason, count in stats["status_dict"].items() if reason != "success"})
    tried = sum(stats["count"] for stats in sound.values())
    success_rate = report.counts["successes"] / max(1, tried)
    report.counts["shards"] = len(sound)
    report.facts |= {"success_rate": success_rate, "reasons": dict(reasons.most_common(_NUM_REASONS))}
    report.facts["num_reasons_left_out"] = max(0, len(reasons) - _NUM_REASONS)
    if tried and success_rate < min_success_rate:
        report.problem(
            f"{success_rate:.1%} of the urls gave a picture, below --min-success-rate {min_success_rate:g}: the report "
            "has the reasons; if it was the network, delete the shards' _stats.json and run the same command again."
        )
