"""The options of acceleration, and what they do to a base."""

from collections.abc import Callable
from typing import Any, get_args

import torch

from ipa_train.acceleration.checkpointing import RUNS, Checkpointing
from ipa_train.acceleration.compilation import Compile, compiled, require_compilers
from ipa_train.acceleration.float8 import to_float8
from ipa_train.bases.base import Base, Block
from ipa_train.errors import ConfigError, did_you_mean

AUTO = "auto"


class AcceleratedBlock:
    """Runs a block in another way; holds the block itself, so that it can be run plainly again."""

    def __init__(self, block: Block, run: Callable[..., Any]) -> None:
        self.block, self.run = block, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.run(self.block, *args, **kwargs)


class Acceleration:
    """How a base's denoiser runs. Sample grids are drawn through it too.

    Args:
        checkpointing: what is computed again in the backward, to save memory: nothing (``none``), all but convolutions
            and attention (``selective``), or all of each block (``full``). ``auto`` is the first of them that fits: it
            is ``none`` until :meth:`choose_checkpointing` is called.
        compile: nothing, each kind of block once (``blocks``), or the whole forward (``whole``).
        cuda_graphs: record the compiled kernels once and replay them, for pictures of one size; on a GPU.
        float8: hold the weights of the blocks' frozen linear layers in 8 bits, and multiply in them.

    Raises:
        ConfigError: an unknown choice, choices that exclude each other, or a machine without what they need.
    """

    def __init__(
        self,
        *,
        checkpointing: str = "none",
        compile: str = "none",
        cuda_graphs: bool = False,
        float8: bool = False,
    ) -> None:
        for option, value, choices in (
            ("checkpointing", checkpointing, (AUTO, *get_args(Checkpointing))),
            ("compile", compile, get_args(Compile)),
        ):
            if value not in choices:
                raise ConfigError(f"acceleration.{option}={value!r} is unknown.{did_you_mean(value, choices)}")
        if cuda_graphs and compile == "none":
            raise ConfigError(
                "acceleration.cuda_graphs=true replays compiled kernels: add acceleration.compile=blocks."
            )
        if cuda_graphs and not torch.cuda.is_available():
            raise ConfigError("acceleration.cuda_graphs=true needs a GPU, and there is none: leave it out.")
        if compile != "none":
            require_compilers()
        self.is_automatic = checkpointing == AUTO
        self.checkpointing = "none" if self.is_automatic else checkpointing
        self.compile = compile
        self.cuda_graphs, self.float8 = cuda_graphs, float8

    def apply(self, base: Base) -> None:
        """Make ``base`` run so, in place of what an earlier call set; float8 alone cannot be undone.

        Adapters are attached before: the layers under a LoRA are left in their precision.

        Raises:
            ConfigError: float8 on a device or base that has no use for it.
        """
        if self.float8:
            to_float8(base)
        self._wrap(base)

    def choose_checkpointing(self, base: Base, fits: Callable[[], bool]) -> str:
        """Apply to ``base`` the policy that computes least again and of which ``fits()`` holds, and return its name.

        ``full`` where none fits. Only where ``checkpointing`` is ``auto``; else the one that was set is returned.
        """
        if self.is_automatic:
            for self.checkpointing in get_args(Checkpointing):  # from the fastest to the smallest
                self._wrap(base)
                if fits():
                    break
        return self.checkpointing

    def _wrap(self, base: Base) -> None:
        run = RUNS[self.checkpointing]  # type: ignore[index]
        if self.compile == "blocks":
            run = compiled(run, cuda_graphs=self.cuda_graphs)
        plain = self.checkpointing == self.compile == "none" or (
            self.checkpointing == "none" and self.compile == "whole"
        )

        def wrap(block: Block) -> Block:
            block = block.block if isinstance(block, AcceleratedBlock) else block
            return block if plain else AcceleratedBlock(block, run)

        base.wrap_blocks(wrap)
        vars(base).pop("predict", None)
        predict = base.predict
        if self.compile == "whole":
            predict = compiled(predict, cuda_graphs=self.cuda_graphs)
        if self.cuda_graphs:
            predict = _as_one_step(predict)
        if self.compile == "whole" or self.cuda_graphs:
            base.predict = predict  # type: ignore[method-assign]


def _as_one_step(predict: Callable[..., Any]) -> Callable[..., Any]:
    """Say where a step begins: a replay overwrites what the step before it returned, but nothing of its own step.

    Without it each block of a forward without gradients would count as a step, and overwrite the skip connections.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return predict(*args, **kwargs)

    return step
