"""Rank, world and the two collectives that training needs, with or without a process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ipa_train.errors import UserError

# In the order in which launchers set them: torchrun, Lightning's own launcher, srun.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_distributed() -> bool:
    """Whether a process group of more than one process exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, known from the environment even before the process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)


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
