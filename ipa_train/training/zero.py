"""DeepSpeed's ZeRO, stages 1 and 2, with the checkpoints that all other strategies have."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ipa_train.errors import ConfigError
from ipa_train.training.module import AdapterTraining


class ZeRO(DeepSpeedStrategy):
    """Every process holds all weights, and its part of the optimizer's moments (stage 1) and gradients (stage 2).

    Args:
        stage: 1 or 2.

    Raises:
        ConfigError: another stage, or no DeepSpeed.
    """

    def __init__(self, *, stage: int = 2) -> None:
        if stage not in (1, 2):
            raise ConfigError(
                f"trainer.strategy.stage must be 1 or 2, got {stage}: for a base that does not fit one GPU choose "
                "trainer=fsdp2."
            )
        if find_spec("deepspeed") is None:
            raise ConfigError("trainer=deepspeed needs the package 'deepspeed': pip install 'ipa-train[deepspeed]'.")
        super().__init__(
            stage=stage,
            precision_plugin=_AsItIs("32-true"),
            logging_batch_size_per_gpu=1,  # of DeepSpeed's own log; ours counts images
        )

    lightning_restore_optimizer = True

    def require_fitting(self, trainer: Trainer, module: AdapterTraining, *, is_here: bool) -> None:
        """Refuse what does not go together with it, and a machine without CUDA where the run ``is_here``.

        Raises:
            ConfigError: no CUDA, steps of several micro-batches, or an optimizer whose state is not a number for each
                weight.
        """
        if is_here and not isinstance(trainer.accelerator, CUDAAccelerator):
            raise ConfigError("trainer=deepspeed needs CUDA GPUs, and this run has none: choose trainer=ddp.")
        if (count := trainer.accumulate_grad_batches) > 1:
            raise ConfigError(
                f"trainer=deepspeed takes steps of one micro-batch, and this run has {count}: set "
                "data.batch_size=null, or choose trainer=ddp."
            )
        optimizer = module.make_optimizer(module.adapter.parameters())
        if not isinstance(optimizer, Adam):
            raise ConfigError(
                f"trainer=deepspeed shares out the moments of torch's Adam and AdamW, and this run has "
                f"{type(optimizer).__name__}: choose optimizer=adamw."
            )

    def setup(self, trainer: Trainer) -> None:
        """Have DeepSpeed send no weights at the start: every process has read or drawn the same.

        It would send the frozen ones too, and can send none that lie in channels_last.
        """
        assert self.lightning_module is not None
        for weight in self.lightning_module.parameters():
            weight.ds_optim_param = True  # its mark for weights that it leaves to each process
        super().setup(trainer)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Through the checkpoint folders of all strategies, as rank 0 writes them."""
        super(DeepSpeedStrategy, self).save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """From the checkpoint folders of all strategies."""
        loaded: dict[str, Any] = super(DeepSpeedStrategy, self).load_checkpoint(*args, **kwargs)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, and the copy of its part that each process updates."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
        self.optimizers[0].refresh_fp32_params()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as one process would have it: called by all, as each gives its part."""
        inner: Optimizer = self.optimizers[0].optimizer
        (group,) = inner.param_groups
        (part,) = group["params"]
        state = inner.state.get(part, {})
        split = [key for key, value in state.items() if _is_split(value, part)]
        whole = {key: value for key, value in state.items() if key not in split}
        trained = self._trained()
        states = {
            number: {key: value.clone() if isinstance(value, Tensor) else value for key, value in whole.items()}
            | {key: weight.get_full_hp_param(key).cpu() for key in split}
            for number, weight in enumerate(trained)
        }
        return {
            "state": states if state else {},
            "param_groups": [{**group, "params": list(range(len(trained)))}],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of what :meth:`optimizer_state` gave."""
        (saved,) = checkpoint["optimizer_states"]
        zero = self.optimizers[0]
        (group,) = zero.optimizer.param_groups
        (saved_group,) = saved["param_groups"]
        group |= {key: value for key, value in saved_group.items() if key != "params"}
        if not saved["state"]:  # of step 0
            return
        (part,) = group["params"]
        trained = self._trained()
        zero.optimizer.state[part] = {
            key: torch.zeros_like(part) if _is_split(value, trained[0]) else value.to(part.device)
            for key, value in saved["state"][0].items()
        }
        zero._lazy_init_hp_params_optimizer_state()
        for number, weight in enumerate(trained):
            for key, value in saved["state"][number].items():
                if _is_split(value, weight):
                    weight.set_full_hp_param(value.to(part.device), key)

    def _trained(self) -> list[Any]:
        """The weights in the order of the optimizer, to which DeepSpeed has given methods to gather their state."""
        assert self.lightning_module is not None
        return list(self.lightning_module.adapter.parameters())


class _AsItIs(DeepSpeedPrecision):
    """Leaves the frozen models in the precision they have; DeepSpeed's own would make them fp32, or the adapter not."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data


def _is_split(value: object, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """L2 norm of all gradients that an optimizer steps by, also of those of which this process has a part."""
    if not shares_gradients(optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)
    norm: Tensor = optimizer.scaled_global_norm()  # type: ignore[attr-defined]
    return norm.where(norm >= 0, torch.nan)  # -1 is DeepSpeed's word for one that is not finite


def shares_gradients(optimizer: Optimizer) -> bool:
    """Whether it is DeepSpeed's, which has its part of the gradients, and skips by itself those that are not finite."""
    return hasattr(optimizer, "scaled_global_norm")
