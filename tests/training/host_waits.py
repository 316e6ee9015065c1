"""Where the host asks the device for a value: on CUDA it then waits for all that was asked of the device before."""

from contextlib import contextmanager

import torch
from lightning.pytorch.callbacks import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What returns a value to the host, or a tensor whose shape depends on values.
OPERATORS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}
METHODS = {"tolist", "numpy", "cpu"}
"""Which no operator shows on a CPU."""


class HostWaits(Callback):
    """Lists (phase, step, operator); a phase is ``forward``, ``update``, or ``end``, where callbacks have their say.

    Must be the first callback. What the forward does with tensors that lie on the host is not told apart here, so
    ``METHODS`` count outside of it alone; a step on the meta device, where no value can be had, shows them there.
    """

    def __init__(self):
        self.found, self.phase = [], None

    @contextmanager
    def watching(self):
        """Watch what is run within the block."""
        with _Operators(self), _Methods(self):
            yield self

    def note(self, name):
        if self.phase is not None:
            self.found.append((*self.phase, name))

    def on_train_batch_start(self, trainer, *_):
        self.phase = ("forward", trainer.global_step + 1)

    def on_before_zero_grad(self, trainer, *_):
        self.phase = ("update", trainer.global_step + 1)

    def on_train_batch_end(self, trainer, *_):
        self.phase = ("end", trainer.global_step)

    def on_train_end(self, *_):
        self.phase = None


class _Operators(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool for index in args[1] if isinstance(args[1], (list, tuple))
        )
        if name in OPERATORS or by_mask:
            self.waits.note(name)
        return func(*args, **kwargs or {})


class _Methods(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in METHODS and self.waits.phase is not None and self.waits.phase[0] != "forward":
            self.waits.note(name)
        return func(*args, **kwargs or {})
