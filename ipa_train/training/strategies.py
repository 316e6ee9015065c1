"""How the processes of a run share its work; under every strategy a checkpoint is the same folder.

Steps are the same as well, up to the order of sums, so that a run may go on under another one.
"""

import warnings

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ipa_train.acceleration import Acceleration
from ipa_train.bases import Base
from ipa_train.errors import ConfigError
from ipa_train.training.module import AdapterTraining
from ipa_train.training.zero import ZeRO


class DDP(DDPStrategy):
    """Every process holds everything; the adapter's gradients are averaged while the backward goes on.

    Args:
        compress_gradients: send them in bf16, half the bytes. Each is rounded to 8 bits of mantissa before and after
            the sum; moments and weights stay fp32.
    """

    def __init__(self, *, compress_gradients: bool = False) -> None:
        super().__init__()
        self.compress_gradients = compress_gradients

    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA alone, and says nothing elsewhere.
        if self.compress_gradients:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, _send_in_bf16)


def _send_in_bf16(state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    # torch refuses its hook by name where there is no CUDA; gloo sums bf16 too.
    return bf16_compress_hook(None, bucket)  # type: ignore[arg-type]


class ShardedBase(DDP):
    """DDP, with the frozen denoiser shared out among the devices of a node: FSDP2 for what is not trained.

    Each device holds its part of every block and gathers a block's weights just before it runs, in the forward and
    again in the backward. Frozen weights have no gradients, so nothing else is sent for them, and nothing at all
    between nodes. The adapter, and with it optimizer, average and checkpoints, is as under DDP. Blocks move to the
    device one by one, so the denoiser need not fit there whole; every process still reads it into the host's memory.
    """

    def model_to_device(self) -> None:
        """Share out the blocks, then move all the rest."""
        mesh = init_device_mesh(
            self.root_device.type, (self.num_nodes, self.num_processes), mesh_dim_names=("node", "device")
        )["device"]
        for part in self._parts():
            fully_shard(part, mesh=mesh)
        super().model_to_device()
        # It warns of blocks that return views, for those who would then change these in place; here nothing does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def teardown(self) -> None:
        """Let go of gathered weights first: a sample grid, or an error within a block, leaves some."""
        for part in self._parts():
            if isinstance(part, FSDPModule):
                part.reshard()
        super().teardown()

    def _parts(self) -> list[nn.Module]:
        assert self.lightning_module is not None
        base: Base = self.lightning_module.base
        return [*base.blocks, base.denoiser]  # the last one takes what is in no block

    def require_fitting(self, base: Base, acceleration: Acceleration) -> None:
        """Refuse what does not go together with it.

        Raises:
            ConfigError: one device, a base whose forward reads weights past its blocks, or kernels that hold on to
                weights.
        """
        if self.num_processes < 2:
            raise ConfigError(
                "trainer=fsdp2 shares out the base among the devices of a node, and this run has one: set "
                "trainer.devices to 2 or more, or leave it out."
            )
        if not base.blocks:
            raise ConfigError(
                f"trainer=fsdp2 shares out a base block by block, and the forward of {base.pipeline_class} joins "
                "weights of many blocks: choose trainer=ddp (UNets fit one GPU)."
            )
        for option, plain in (("compile", "none"), ("cuda_graphs", False), ("float8", False)):
            if (value := getattr(acceleration, option)) != plain:
                raise ConfigError(
                    f"acceleration.{option}={value} does not go with trainer=fsdp2, whose weights come and go: leave "
                    "one of them out."
                )


def base_shards(trainer: Trainer) -> int:
    """Among how many devices the denoiser is shared out; 1 where each holds it whole."""
    return trainer.strategy.num_processes if isinstance(trainer.strategy, ShardedBase) else 1


def require_fitting(
    trainer: Trainer, module: AdapterTraining, acceleration: Acceleration, *, is_here: bool = True
) -> None:
    """Refuse a strategy that this run cannot have, on this machine where it ``is_here``.

    Raises:
        ConfigError: with the reason.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ShardedBase):
        strategy.require_fitting(module.base, acceleration)
    elif isinstance(strategy, ZeRO):
        strategy.require_fitting(trainer, module, is_here=is_here)
    elif not isinstance(strategy, (DDPStrategy, SingleDeviceStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} has checkpoints of its own: choose trainer=ddp, fsdp2 or "
            "deepspeed."
        )
