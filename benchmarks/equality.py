"""Whether our step computes what the reference computes: loss and all gradients of the adapter, on the same batch."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Setting, for_reference, given_draws, make_batch, make_reference, make_training
from benchmarks.reference_step import Given
from ipa_train.conditioning import ConditionDropout

Result = tuple[float, list[Tensor]]
"""Loss, and the gradients in the order of the adapter's parameters."""
MAX_FP32 = 1e-5
"""Relative L2 distance of all gradients together, and relative distance of the loss."""
MAX_BF16_RATIO = 1.1
"""Our distance from the reference in fp32, over that of the reference's own bf16."""


@dataclass(frozen=True)
class Equality:
    """Relative distances from the reference in fp32."""

    loss_fp32: float
    gradients_fp32: float
    gradients_bf16: float
    reference_gradients_bf16: float

    @property
    def bf16_ratio(self) -> float:
        return self.gradients_bf16 / self.reference_gradients_bf16

    @property
    def holds(self) -> bool:
        return max(self.loss_fp32, self.gradients_fp32) <= MAX_FP32 and self.bf16_ratio <= MAX_BF16_RATIO

    def __str__(self) -> str:
        return (
            f"Against the reference in fp32, relative: our fp32 loss {self.loss_fp32:.1e}, gradients "
            f"{self.gradients_fp32:.1e} (at most {MAX_FP32:.0e}); bf16 gradients {self.gradients_bf16:.2e}, those of "
            f"the reference's own bf16 {self.reference_gradients_bf16:.2e} (ratio {self.bf16_ratio:.2f}, at most "
            f"{MAX_BF16_RATIO})."
        )


def compare(setting: Setting, batch_size: int) -> Equality:
    """Run both in fp32 and in bf16, with encoders online; the models of one of the four lie in memory at a time."""
    setting = replace(setting, dropout=ConditionDropout(text_rate=0.25, image_rate=0.25, both_rate=0.25))
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    (our_loss, ours), (reference_loss, reference) = _both(setting, batch_size, torch.float32)
    (_, ours_bf16), (_, reference_bf16) = _both(setting, batch_size, torch.bfloat16)
    torch.backends.cudnn.allow_tf32 = tf32
    return Equality(
        loss_fp32=abs(our_loss - reference_loss) / abs(reference_loss),
        gradients_fp32=distance(ours, reference),
        gradients_bf16=distance(ours_bf16, reference),
        reference_gradients_bf16=distance(reference_bf16, reference),
    )


def require_equal(setting: Setting, batch_size: int) -> Equality:
    """Print what :func:`compare` finds; end the program if the two differ by more than they may."""
    found = compare(setting, batch_size)
    print(found, flush=True)
    if not found.holds:
        sys.exit("The two steps do not compute the same: nothing is timed.")
    return found


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    squares = [(a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True)]
    return float((sum(squares) / sum(b.double().square().sum() for b in expected)) ** 0.5)


def _both(setting: Setting, batch_size: int, precision: torch.dtype) -> tuple[Result, Result]:
    """Ours, and the reference's on the same question."""
    ours, initial, question, given = _ours(setting, batch_size, precision)
    reference = make_reference(setting, initial, precision=precision)
    return ours, _result(reference.loss(question, given), reference.trained)


def _ours(setting: Setting, batch_size: int, precision: torch.dtype) -> tuple[Result, Any, Any, Given]:
    """Also what the reference needs: the weights, the batch as it takes it, and the random numbers."""
    training = make_training(setting, dtype=precision)
    batch = make_batch(setting, training, batch_size, cached=False)
    result = _result(training.training_step(batch, 0), list(training.adapter.parameters()))
    return result, training.adapter.state_dict(), for_reference(setting, training, batch), given_draws(training, batch)


def _result(loss: Tensor, trained: Sequence[nn.Parameter]) -> Result:
    loss.backward()
    return loss.item(), [weight.grad.cpu() for weight in trained if weight.grad is not None]
