"""Rank, world and the two collectives that training needs, with or without a process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.nn.parallel import DistributedDataParallel

from ipa_train.errors import UserError
from ipa_train.runtime.launch import launched_rank


def is_distributed() -> bool:
    """Whether a process group of more than one process exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, known from the environment even before the process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return launched_rank()


def record_collectives(folder: Path) -> None:
    """Have the process groups to come keep a record of their last collectives, unless the user has said otherwise.

    NCCL writes it, as ``folder/collectives-rank<N>``, when one times out: it shows which rank did not take part.
    """
    major, minor = map(int, torch.__version__.split(".")[:2])
    renamed = (major, minor) >= (2, 9)  # since when the old names give a warning
    settings = {
        "TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE"
        if renamed
        else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{folder.absolute()}/collectives-rank",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def limit_collectives(minutes: float) -> None:
    """Have every collective that lasts longer raise, or end the process where a GPU does it; not the start of groups.

    Ranks may have to wait long for the first one, which indexes the shards.
    """
    for group in list(_world.pg_map):
        _set_pg_timeout(timedelta(minutes=minutes), group)


def leave_frozen_to_each_rank(module: nn.Module) -> None:
    """Have DDP send the trained weights alone: frozen ones, and buffers, every rank has read from the same files.

    It would else send all weights at the start, and all buffers again before every forward.
    """
    frozen = [name for name, weight in module.named_parameters() if not weight.requires_grad]
    buffers = [name for name, _ in module.named_buffers()]
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(module, frozen + buffers)  # type: ignore[no-untyped-call]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return ``values`` summed over all ranks (in place); every rank must call it with the same shape."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's ``value``, by rank. For rare events: it waits for all ranks and for the host."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def failing_alike() -> Iterator[None]:
    """A block of which every rank raises the UserError that one raised, the lowest if several did; all must enter it.

    For what one rank does for all, or each does by itself: the others would else wait for it in their next collective.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    failure = next((of_rank for of_rank in gather_objects(failure) if of_rank is not None), None)
    if failure is not None:
        raise failure
