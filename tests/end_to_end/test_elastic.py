"""A run that goes on with another number of processes is the same run."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from ipa_train.cli.main import main
from tests.end_to_end.conftest import loss_curve, run_ranks
from tests.end_to_end.recorder import recorded

STARTS = ((4, 2), (2, 5), (3, 7))
"""Ranks, and the step at which they stop."""
TOLERANCE = 1e-5
"""Relative. Gradients of so many ranks are summed in another order: 1e-7 of each in fp32, of which Adam, that divides
them by their size, makes 2e-6 within these steps."""


@pytest.fixture
def command(train_command, tmp_path):
    def command(name, steps):
        recorder = "+callbacks.recorder._target_=tests.end_to_end.recorder.Recorder"
        folder = f"+callbacks.recorder.folder={tmp_path / 'seen' / name}"
        options = ["data.global_batch_size=12", "acceleration.checkpointing=none", recorder, folder]
        return train_command(name, f"trainer.max_steps={steps}", *options)

    (tmp_path / "seen").mkdir()
    return command


def test_4_ranks_then_2_then_3_are_one_run(command, tmp_path):
    """No sample is lost or repeated in more than an epoch; weights, average and moments are those of one process."""
    last = STARTS[-1][1]
    assert main(command("alone", last)) == 0
    for world_size, steps in STARTS:
        run_ranks(command("elastic", steps), world_size)

    seen = recorded(tmp_path / "seen" / "elastic")
    assert list(itertools.chain(*(sorted(seen[step]) for step in range(1, last + 1)))) == list(range(12 * last))
    assert seen == recorded(tmp_path / "seen" / "alone"), "nor does the order within a step change"

    alone, elastic = (tmp_path / name / "checkpoints" / f"step-{last:08d}" for name in ("alone", "elastic"))
    curve = loss_curve(tmp_path / "elastic")
    assert curve.keys() == set(range(1, last + 1))
    for step, loss in loss_curve(tmp_path / "alone").items():
        assert float(curve[step]) == pytest.approx(float(loss), rel=1e-5)
    for file in ("adapter.safetensors", "ema.safetensors"):
        assert distance(load_file(elastic / file), load_file(alone / file)) < TOLERANCE
    assert distance(optimizer_state(elastic), optimizer_state(alone)) < TOLERANCE
    earlier = optimizer_state(elastic.with_name(f"step-{STARTS[-2][1]:08d}"))
    assert distance(earlier, optimizer_state(alone)) > 1000 * TOLERANCE, "a tolerance that steps do not get below"


def optimizer_state(checkpoint):
    (optimizer,) = torch.load(checkpoint / "state.pt", weights_only=True)["optimizer_states"]
    return {f"{number}.{key}": value for number, of in optimizer["state"].items() for key, value in of.items()}


def distance(tensors, expected):
    """Relative L2 distance, the largest of all tensors."""
    return max(((tensors[name] - x).norm() / x.norm()).item() for name, x in expected.items())
