"""Choosing by what is measured: the best checkpoint, and when a run has stopped getting better."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from ipa_train.errors import ConfigError
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.callbacks.early_stopping import EarlyStopping
from ipa_train.training.callbacks.image_use import ImageUse
from ipa_train.training.checkpoint import list_checkpoints, newest_valid, remove_temporaries, step_of, verify
from ipa_train.training.measuring import publish
from tests.training.toy import Stream, ToyTraining, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")


class Scores(Callback):
    """Measures what it is told to, one value for each step; None: nothing at this step."""

    metric_names = ("val/score",)

    def __init__(self, values):
        self.values = values

    def on_train_batch_end(self, trainer, *_):
        if (value := self.values[trainer.global_step - 1]) is not None:
            publish(trainer, {"val/score": value})


def fit(folder, values, *callbacks, resume=False, max_steps=None):
    """Train for as many steps as there are values; the scores come before the others, as in a run."""
    start = newest_valid(folder) if resume else None
    trainer = make_trainer(max_steps or len(values), [Scores(values), *callbacks])
    loader = torch.utils.data.DataLoader(Stream(step_of(start) if start else 0), batch_size=None)
    trainer.fit(module := ToyTraining(), loader, ckpt_path=start)
    return trainer, module


def keeping(folder, mode="max"):
    return Checkpointing(folder=str(folder), every_steps=4, keep_last=1, keep_best="val/score", best_mode=mode)


def steps(folder):
    return [step_of(path) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(("mode", "best"), [("max", 3), ("min", 5)])
def test_the_best_step_is_saved_and_stays(tmp_path, mode, best):
    fit(tmp_path, [1.0, None, 5.0, 4.0, 0.5, 2.0, float("nan"), 3.0], keeping(tmp_path, mode))
    assert steps(tmp_path) == [best, 8]
    assert (tmp_path / "best").resolve() == tmp_path / f"step-{best:08d}"
    verify(tmp_path / "best")


@pytest.mark.parametrize("interrupted", range(1, 8))
def test_a_resumed_run_finds_the_same_best(tmp_path, interrupted):
    values = [1.0, None, 5.0, 4.0, 0.5, 6.0, 2.0, 3.0]
    fit(tmp_path / "whole", values, keeping(tmp_path / "whole"))
    fit(tmp_path / "parts", values, keeping(tmp_path / "parts"), max_steps=interrupted)
    fit(tmp_path / "parts", values, keeping(tmp_path / "parts"), resume=True)
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole") == [6, 8]
    ours, theirs = (load_file(tmp_path / name / "best" / "adapter.safetensors") for name in ("parts", "whole"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_another_metric_begins_anew(tmp_path):
    fit(tmp_path, [9.0, 1.0], keeping(tmp_path))
    values = [None, None, 3.0, 2.0]
    fit(tmp_path, values, keeping(tmp_path, mode="min"), resume=True)
    assert (tmp_path / "best").resolve().name == "step-00000004"


def test_a_link_that_was_being_made_is_cleared_away(tmp_path):
    (tmp_path / ".tmp-best-1").symlink_to("step-00000004")
    remove_temporaries(tmp_path)
    assert not list(tmp_path.iterdir())


def stopping(**options):
    return EarlyStopping(**{"metric": "val/score", "patience": 2} | options)


@pytest.mark.parametrize(
    ("values", "options", "stopped"),
    [
        ([1.0, 2.0, 1.0, None, 2.0, 9.0], {}, 5),
        ([1.0, 2.0, 1.0, 3.0, 2.0, 9.0], {}, 6),
        ([3.0, 2.0, 2.5, 1.0, 2.0, 3.0], {"mode": "min"}, 6),
        ([1.0, 1.1, 1.2, 9.0], {"min_delta": 0.5}, 3),
        ([1.0, float("nan"), float("nan"), 9.0], {}, 3),
        ([5.0, 4.0, 3.0, 2.0], {"metric": None}, 4),
    ],
)
def test_a_run_stops_when_it_gets_no_better(tmp_path, values, options, stopped):
    trainer, _ = fit(tmp_path, values, stopping(**options), keeping(tmp_path))
    assert trainer.global_step == stopped
    assert steps(tmp_path)[-1] == stopped


def test_patience_is_kept_over_a_resume_and_a_stopped_run_stays_stopped(tmp_path, caplog):
    values = [5.0, 4.0, 4.5, 4.0, 9.0, 9.5]
    fit(tmp_path, values, stopping(patience=3), keeping(tmp_path), max_steps=2)
    trainer, _ = fit(tmp_path, values, stopping(patience=3), keeping(tmp_path), resume=True)
    assert trainer.global_step == 4
    assert "stopped early at step 4: val/score was not better than 5.0 3 times in a row" in caplog.text
    trainer, _ = fit(tmp_path, values, stopping(patience=3), keeping(tmp_path), resume=True)
    assert trainer.global_step == 4
    trainer, _ = fit(tmp_path, values, stopping(patience=4), keeping(tmp_path), resume=True)
    assert trainer.global_step == 6


def test_a_metric_that_nothing_measures_is_named():
    callbacks = [ImageUse(), Scores([])]
    for watcher, option in (
        (Checkpointing(folder="x", keep_best="val/gap_othr"), "checkpointing.keep_best"),
        (EarlyStopping(metric="val/gap_othr"), "early_stopping.metric"),
    ):
        with pytest.raises(ConfigError, match=rf"callbacks\.{option}=val/gap_othr: .* Did you mean 'val/gap_other'"):
            watcher.require_measured(callbacks)
    EarlyStopping(metric="val/score").require_measured(callbacks)
    with pytest.raises(ConfigError, match="Allowed: val/score"):
        EarlyStopping(metric="val/gap_other").require_measured([ImageUse(every_steps=0), Scores([])])


@pytest.mark.parametrize(("options", "message"), [({"patience": 0}, "patience"), ({"min_delta": -1.0}, "min_delta")])
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=rf"callbacks\.early_stopping\.{message} must be at least"):
        EarlyStopping(metric="val/score", **options)
