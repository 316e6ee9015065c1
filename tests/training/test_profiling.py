"""A trace that other programs can read, of the steps that were asked for."""

import json

import pytest

from ipa_train.errors import ConfigError
from ipa_train.training.callbacks.profiling import Profiling
from tests.training.test_callbacks import fit


def test_the_steps_asked_for_are_recorded(tmp_path):
    fit(5, Profiling(folder=str(tmp_path), first_step=2, num_steps=2), accumulate_grad_batches=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps-2-3.json", "steps-2-3.txt"]
    names = [event.get("name") for event in json.loads((tmp_path / "steps-2-3.json").read_text())["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert names.count("aten::gelu") == 2 * 2, "each micro-batch of two steps has one"
    table = (tmp_path / "steps-2-3.txt").read_text()
    assert "aten::addmm" in table
    assert "Self CPU" in table


def test_a_shorter_run_writes_what_there_is_or_says_that_there_is_nothing(tmp_path, caplog):
    fit(2, Profiling(folder=str(tmp_path), first_step=2, num_steps=5))
    assert (tmp_path / "steps-2-2.json").exists()
    assert "nothing was recorded" not in caplog.text
    fit(2, Profiling(folder=str(tmp_path / "late"), first_step=3))
    assert not (tmp_path / "late").exists()
    assert "first_step=3: this start ended before, at step 2" in caplog.text


def test_off_by_default_and_out_of_range(tmp_path):
    fit(1, Profiling(folder=str(tmp_path / "off")))
    assert not (tmp_path / "off").exists()
    with pytest.raises(ConfigError, match=r"callbacks.profiling.first_step must be 1 or more, got 0"):
        Profiling(folder=str(tmp_path), first_step=0)
