"""The run directory: one folder per run, the same for every start of the same command, held by one start at a time.

outputs/<run.name>/
    config.yaml     the resolved config of the latest start
    versions.json   what it ran with
    tracker.json    the tracker's run id, so that a resumed run goes on with the same curves
    metrics.csv, checkpoints/
    owner.json, heartbeat, run.lock     who is at work in it, see ownership.py
"""

import json
import logging
import platform
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ipa_train.errors import CheckpointError, FinishedError
from ipa_train.runtime.distributed import rank
from ipa_train.runtime.files import atomic_write
from ipa_train.training.checkpoint import newest_valid, remove_temporaries, step_of
from ipa_train.training.ownership import HEARTBEAT, LOCK, OWNER, Ownership

MAY_DIFFER = (
    "run",  # where the run lies
    "hydra",
    "logger",  # who is told
    "callbacks",  # what is shown and saved, and how often
    "trainer.max_steps",  # a longer run; a cosine or linear lr_schedule stretches with it
    "trainer.max_time",
    "trainer.default_root_dir",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.profiler",
    # The machines: order, draws and the global batch do not depend on them.
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accumulate_grad_batches",
    "data.batch_size",
    "data.num_workers",
    "data.prefetch_factor",
    "acceleration.checkpointing",
    "acceleration.compile",
    "acceleration.cuda_graphs",
    # Where the shards lie; that they are the same ones is held by the data module's own state.
    "data.shards",
    "data.index_dir",
    "data.cache_dir",
    "data.cache_gib",
    "data.patience_seconds",
    "data.num_nodes",
    "data.allow_index_change",
    "data.allow_missing_stats",
    # What is tolerated, which one learns when a run has stopped.
    "data.max_bad_rate",
    "data.on_missing_shard",
    "data.max_pixels",
    "data.max_member_bytes",
)
"""Config keys, and all below them, that may change when a run is resumed. Any other change is another run."""

_PACKAGES = ("torch", "lightning", "diffusers", "transformers", "safetensors", "webdataset", "numpy")
_CONFIG, _VERSIONS, _TRACKER = "config.yaml", "versions.json", "tracker.json"
_ABSENT = "absent"
_log = logging.getLogger(__name__)


@dataclass
class RunDir:
    """An open run; :meth:`close` lets another start have it."""

    path: Path
    resume_from: Path | None
    """The newest valid checkpoint, None at the first start."""
    tracker_id: str | None
    """The run id for the tracker; known to rank 0 alone, which is the one that reports."""
    ownership: Ownership | None = None
    """Of rank 0, which is the one that writes."""

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def close(self) -> None:
        """Give up the ownership."""
        if self.ownership is not None:
            self.ownership.release()
            self.ownership = None


def open_run(path: Path, config: Mapping[str, Any], *, max_steps: int) -> RunDir:
    """Open or make the run directory ``path`` for a run of ``config``, a plain resolved mapping.

    Rank 0 checks, takes the ownership and writes; the others only look up the checkpoint. Raises CheckpointError, with
    nothing written, if the folder is no run, is in use, belongs to another config, or holds only damaged checkpoints;
    FinishedError, on every rank, if it has reached ``max_steps`` already (-1: no limit).
    """
    checkpoints = path / "checkpoints"
    if rank() != 0:
        return RunDir(path, _resume_from(checkpoints, max_steps), tracker_id=None)
    _refuse_no_run(path)
    _refuse_foreign(path, config)
    ownership: Ownership | None = None
    try:
        ownership = Ownership(path)
        resume_from = _resume_from(checkpoints, max_steps)
        remove_temporaries(checkpoints)
        _write(path / _CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        _write_versions(path / _VERSIONS)
        return RunDir(path, resume_from, _tracker_id(path / _TRACKER), ownership)
    except BaseException as error:
        if ownership is not None:
            ownership.release()
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write run directory {path}: {error.strerror or error}") from error
        raise


def _resume_from(checkpoints: Path, max_steps: int) -> Path | None:
    newest = newest_valid(checkpoints)
    if newest is not None and 0 <= max_steps <= step_of(newest):
        raise FinishedError(
            f"run {checkpoints.parent} has finished at step {step_of(newest)}: "
            "choose run.name=OTHER, or raise trainer.max_steps to go on"
        )
    return newest


def _refuse_no_run(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file: choose another run.name")
    # A process that died at its very start may have left these and a temporary.
    if path.is_dir() and not (path / _CONFIG).exists():
        strange = sorted(
            p.name for p in path.iterdir() if p.name not in (LOCK, OWNER, HEARTBEAT) and not p.name.startswith(".tmp-")
        )
        if strange:
            raise CheckpointError(
                f"{path} holds {strange[0]!r} but no {_CONFIG}, so it is no run of ipa-train: choose another run.name"
            )


def _refuse_foreign(path: Path, config: Mapping[str, Any]) -> None:
    file = path / _CONFIG
    if not file.exists():
        return
    try:
        before = dict(_flatten(yaml.safe_load(file.read_text())))
    except (yaml.YAMLError, AttributeError) as error:
        raise CheckpointError(f"{file} is unreadable: delete or rename {path}, or choose another run.name") from error
    now = dict(_flatten(yaml.safe_load(yaml.safe_dump(dict(config)))))
    differing = [key for key in sorted(before.keys() | now.keys()) if _differs(key, before, now)]
    if differing:
        shown = ", ".join(f"{key}: {before.get(key, _ABSENT)!r} -> {now.get(key, _ABSENT)!r}" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(
            f"run {path} belongs to another config ({shown}{more}): choose run.name=OTHER, or delete or rename {path}"
        )


def _differs(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    free = any(key == prefix or key.startswith(f"{prefix}.") for prefix in MAY_DIFFER)
    return not free and before.get(key, _ABSENT) != now.get(key, _ABSENT)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tracker_id(file: Path) -> str:
    if not file.exists():
        _write(file, json.dumps({"run_id": secrets.token_hex(4)}) + "\n")
    return str(json.loads(file.read_text())["run_id"])


def _write_versions(file: Path) -> None:
    now = {"python": platform.python_version(), "ipa-train": _version("ipa-train"), "git": _git_commit()}
    now |= {name: _version(name) for name in _PACKAGES}
    before = json.loads(file.read_text()) if file.exists() else now
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        _log.warning("resumed with other versions, so results may differ in the last digits: %s", ", ".join(changed))
    _write(file, json.dumps(now, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the source tree that runs, None if it is not run from its repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--match", "-"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
