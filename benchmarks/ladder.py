"""The cases of the step's benchmark: from the tutorial's step to ours, one change at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.contenders import AutocastStep, OurStep, Setting, for_reference, make_batch
from benchmarks.reference_step import ReferenceStep
from ipa_train.bases import UNetBase

REFERENCE, REFERENCE_CACHED = "reference, online encoders", "reference, cached features"
OURS, OURS_ONLINE = "ours (fused optimizer), cached features", "ours, online encoders"
COMPILED = ", compiled"


@dataclass(frozen=True)
class Case:
    """One way to run a step."""

    prepare: Callable[[], None]
    step: Callable[[], None]
    counted_as: str | None = None
    """The case that does the same arithmetic where it can be counted; None: itself."""


def make_cases(
    setting: Setting,
    ours: OurStep,
    reference: ReferenceStep | AutocastStep,
    batch_size: int,
    *,
    compiled: str,
    every_rung: bool,
) -> dict[str, Case]:
    """By name, in the order of the table.

    Args:
        setting: what is trained, and where.
        ours: our step.
        reference: the reference step.
        batch_size: of all cases.
        compiled: also run ours compiled so (``blocks`` or ``whole``), or ``none``.
        every_rung: the rungs between the reference and ours too.
    """
    online, cached = (make_batch(setting, ours.training, batch_size, cached=c) for c in (False, True))
    questions = [for_reference(setting, ours.training, batch) for batch in (online, cached)]

    def reference_case(question: Any, *, lean: bool) -> Case:
        return Case(partial(reference.be_lean, lean), partial(reference.step, question))

    def our_case(batch: Any, counted_as: str | None = None, **options: Any) -> Case:
        return Case(partial(ours.run_as, **options), partial(ours.step, batch), counted_as)

    cases = {
        REFERENCE: reference_case(questions[0], lean=False),
        REFERENCE_CACHED: reference_case(questions[1], lean=False),
    }
    if every_rung:
        cases["reference, cached, lean"] = reference_case(questions[1], lean=True)
        if isinstance(ours.training.base, UNetBase):
            plain = {"own_forward": False, "fused": False}
            cases["bf16 weights"] = our_case(cached, channels_last=False, **plain)
            cases["+ channels_last"] = our_case(cached, **plain)
            cases["+ our forward"] = our_case(cached, fused=False)
        else:
            cases["bf16 weights"] = our_case(cached, fused=False)
    cases[OURS] = our_case(cached)
    if compiled != "none":
        cases[OURS + COMPILED] = our_case(cached, OURS, compiled=compiled)
    cases[OURS_ONLINE] = our_case(online)
    if compiled != "none":
        cases[OURS_ONLINE + COMPILED] = our_case(online, OURS_ONLINE, compiled=compiled)
    return cases
