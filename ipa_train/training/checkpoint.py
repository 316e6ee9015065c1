"""Checkpoints are folders that hold the adapter and all that training needs to go on, each file with its hash.

    checkpoints/step-00001000/
        adapter.safetensors   the module's state_dict: trained weights only
        ema.safetensors       their moving average, if there is one
        state.pt              optimizer, schedules, loops, callbacks, data position (plain containers and tensors)
        ...                   whatever the run adds, for example the export
        manifest.json         written last: format, step, size and sha256 of every file
    checkpoints/best          a link to the best one, where a run chooses one

A folder is filled under a temporary name, flushed and renamed, so a name of this form is a complete checkpoint however
the process ended. Its hashes find what a disk damaged later.
"""

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipa_train.errors import CheckpointError
from ipa_train.runtime.distributed import gather_objects
from ipa_train.runtime.files import follow_umask, sync

FORMAT = 1
BEST = "best"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"
_log = logging.getLogger(__name__)

Extras = Callable[[Path], None]
"""Writes further files, for example the export, into the folder it is given."""


class AdapterCheckpointIO(CheckpointIO):
    """Lightning's way to the checkpoint folders: ``Trainer(plugins=[AdapterCheckpointIO()])``.

    The module puts its EMA into ``checkpoint["ema"]`` as ``AdapterEMA.state_dict()`` gives it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Extras | None = None
    ) -> None:
        """Write ``checkpoint`` as the folder ``path``, named by :func:`checkpoint_path`; called on rank 0 alone.

        ``storage_options`` is the function that adds files to it. Raises CheckpointError, with nothing left behind and
        the other checkpoints untouched, if it cannot be written (disk full, no permission) or could not be read again.
        """
        path = Path(path)
        step = step_of(path)
        temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_state(temporary, checkpoint)
            if storage_options is not None:
                storage_options(temporary)
            _seal(temporary, step)
            if path.exists():  # a damaged one that the run has come past again
                path.rename(path.with_name(f"{_TEMPORARY}{path.name}-replaced-{os.getpid()}"))
            temporary.rename(path)
            sync(path.parent)
            remove_temporaries(path.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {path}: {_reason(error)}; the earlier checkpoints are untouched: "
                "make room or mend the permissions, then run the same command again"
            ) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint folder onto the CPU; nothing is ever unpickled, whatever ``weights_only`` says.

        Called on every rank: raises CheckpointError if the ranks were not given the same checkpoint.
        """
        path = Path(path)
        for rank, other in enumerate(gather_objects(str(path))):
            if other != str(path):
                raise CheckpointError(f"rank {rank} would resume from {other}, this rank from {path}: start again")
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        state["state_dict"] = load_file(path / "adapter.safetensors")
        if "ema" in state:
            state["ema"]["weights"] = load_file(path / "ema.safetensors")
        return state

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint folder; a crash half-way leaves a temporary, never half a checkpoint."""
        path = Path(path)
        doomed = path.with_name(f"{_TEMPORARY}{path.name}-removed-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies in ``folder``."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name says; raise CheckpointError for any other name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            f"{path} is no name for a checkpoint: they are folders such as step-00001000, made by the "
            "Checkpointing callback alone"
        )
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, valid or not, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of)


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless every file of the checkpoint is as its manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: manifest.json is missing or unreadable") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {version}, and this version of ipa-train reads {FORMAT}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != expected["size"] or _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is not the file that was written")


def newest_valid(folder: Path) -> Path | None:
    """Return the newest checkpoint whose hashes hold, None if there are no checkpoints at all.

    Every damaged one on the way is named in a warning. Raises CheckpointError if none is left.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            verify(path)
        except CheckpointError as error:
            _log.warning("%s; falling back to the one before", error)
        else:
            return path
    if checkpoints:
        raise CheckpointError(
            f"none of the {len(checkpoints)} checkpoints in {folder} is valid (see the warnings above): "
            "choose another run.name, or delete that folder to start over"
        )
    return None


def prune(folder: Path, *, keep_last: int, keep_every: int | None = None, best: int | None = None) -> None:
    """Delete all but the ``keep_last`` newest checkpoints, multiples of ``keep_every`` steps, and step ``best``."""
    io = AdapterCheckpointIO()
    for path in list_checkpoints(folder)[:-keep_last]:
        if (keep_every is None or step_of(path) % keep_every) and step_of(path) != best:
            io.remove_checkpoint(path)


def point_to_best(folder: Path, step: int) -> None:
    """Make ``folder/best`` a link to the checkpoint of ``step``; whoever looks finds the old or the new one."""
    link = folder / BEST
    target = Path(checkpoint_path(folder, step).name)
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = folder / f"{_TEMPORARY}{BEST}-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(link)


def remove_temporaries(folder: Path) -> None:
    """Delete what interrupted saves left in ``folder``; only for the process that owns the run."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)


def _write_state(folder: Path, checkpoint: dict[str, Any]) -> None:
    state = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    _save_tensors(checkpoint["state_dict"], folder / "adapter.safetensors")
    if "ema" in state:
        _save_tensors(state["ema"]["weights"], folder / "ema.safetensors")
        state["ema"] = {key: value for key, value in state["ema"].items() if key != "weights"}
    try:
        with (folder / "state.pt").open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch hides the system's error behind one of its zip writer
        raise OSError(_reason(error)) from error
    try:  # Better to hear of a value that cannot be read again now than at the resume; mmap leaves the tensors unread.
        torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"the state to save holds a {kind[1] if kind else 'value'} that could not be read again without "
            "unpickling: callbacks, modules and data modules must keep to str, int, float, list, dict and tensors"
        ) from error


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def _seal(folder: Path, step: int) -> None:
    """Write the manifest and flush everything, so that the rename to come is the last thing that can be missing."""
    files = sorted(folder.iterdir())
    entries = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1) + "\n")
    for file in (*files, manifest):
        follow_umask(file)
        sync(file)
    sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """Return the system's own words where a library has buried them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).split("\n")[0]
