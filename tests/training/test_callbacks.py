import contextlib
import csv
import time
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import SimpleProfiler

from ipa_train.errors import ConfigError, DataError, TrainingError
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.callbacks.gradient_guard import GradientGuard
from ipa_train.training.callbacks.metric_logging import MetricLogging
from ipa_train.training.callbacks.preemption import Preemption
from ipa_train.training.callbacks.watchdog import Watchdog
from ipa_train.training.checkpoint import newest_valid
from ipa_train.training.csv_log import CSVLog
from ipa_train.training.status_line import StatusLine, describe
from tests.training.toy import FUSED_ADAMW, Images, Stream, ToyTraining, make_trainer

OPTIMIZERS = {
    "fused AdamW": FUSED_ADAMW,
    "AdamW": torch.optim.AdamW,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "fused SGD": partial(torch.optim.SGD, momentum=0.9, fused=True),
}


def fit(max_steps, *callbacks, data=None, module=None, **options):
    module = module or ToyTraining()
    trainer = make_trainer(max_steps, callbacks, **options)
    trainer.fit(module, (data or Images()).loader())
    return module, trainer


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Recorder(Callback):
    """Weights and optimizer state after every step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *_):
        state = trainer.optimizers[0].state_dict()["state"]
        self.states.append(
            [t.clone() for t in (*module.adapter.parameters(), *(v for s in state.values() for v in s.values()))]
        )


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gradient_clip_val", [None, 1.0])
def test_an_update_that_is_not_finite_changes_nothing_and_is_named(caplog, optimizer, gradient_clip_val):
    recorder = Recorder()
    module = ToyTraining(optimizer=OPTIMIZERS[optimizer])
    options = {"data": Images(poison=[9]), "gradient_clip_val": gradient_clip_val}
    fit(4, GradientGuard(), recorder, module=module, **options)
    one, two, three, four = recorder.states
    assert not equal(one, two)
    assert equal(two, three), "the skipped update changed weights or moments"
    assert not equal(three, four)
    assert "step 3 skipped" in caplog.text
    assert "rank 0: shard/0008, shard/0009, shard/0010, shard/0011" in caplog.text


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_whose_first_update_is_not_finite_goes_on_from_where_it_began(optimizer):
    recorder, module = Recorder(), ToyTraining(optimizer=OPTIMIZERS[optimizer])
    before = [p.clone() for p in module.adapter.parameters()]
    fit(2, GradientGuard(), recorder, module=module, data=Images(poison=[0]))
    first, second = recorder.states
    assert equal(before, first[: len(before)])
    assert not equal(first[: len(before)], second[: len(before)])
    assert all(t.isfinite().all() and t.abs().max() < 10 for t in second)


def test_the_average_follows_a_skipped_update_alike_wherever_it_is_skipped():
    averages = []
    for optimizer in ("fused AdamW", "AdamW"):
        module = ToyTraining(optimizer=OPTIMIZERS[optimizer])
        fit(4, GradientGuard(), module=module, data=Images(poison=[9]))
        averages.append(module.ema.weights)
    torch.testing.assert_close(*averages)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_too_many_in_a_row_stop_the_run_and_name_the_samples(optimizer):
    poison = [1, *range(8, 20)]  # steps 1, then 3 to 5
    module = ToyTraining(optimizer=OPTIMIZERS[optimizer])
    with pytest.raises(TrainingError, match=r"3 times in a row, at last at step 5 \(rank 0: shard/0016"):
        fit(10, GradientGuard(max_in_a_row=3), module=module, data=Images(poison=poison))


@pytest.mark.parametrize("log_every_n_steps", [1, 2, 4])
def test_they_are_counted_across_log_intervals(log_every_n_steps):
    poison = [0, *range(12, 24)]  # steps 1, then 4 to 6
    with pytest.raises(TrainingError, match="3 times in a row, at last at step 6") as error:
        fit(99, GradientGuard(max_in_a_row=3), data=Images(poison=poison), log_every_n_steps=log_every_n_steps)
    assert "shard/0020" in str(error.value)
    assert "shard/0019" not in str(error.value)


class EndAt(Callback):
    """Ends training after a step, in one of the ways in which it can end."""

    def __init__(self, step, way):
        self.step, self.way = step, way

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            if self.way is None:
                trainer.should_stop = True
            else:
                raise self.way


@pytest.mark.parametrize("way", [None, DataError("no more"), KeyboardInterrupt()])
def test_every_skipped_step_of_an_interval_is_reported_also_where_training_ends_in_it(caplog, way):
    data = Images(poison=[5, 8, 13])
    ending = contextlib.nullcontext() if way is None else pytest.raises((DataError, SystemExit))
    with ending:
        fit(99, GradientGuard(), EndAt(5, way), data=data, log_every_n_steps=3)
    said = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert [line.split(":")[0] for line in said] == ["step 2 skipped", "step 3 skipped", "step 4 skipped"]
    assert [line.split("shard/")[1][:4] for line in said] == ["0004", "0008", "0012"]


def test_the_sample_is_named_when_it_is_not_in_the_last_micro_batch(caplog):
    recorder = Recorder()
    fit(2, GradientGuard(), recorder, data=Images(poison=[1]), accumulate_grad_batches=2)
    whole = list(ToyTraining().adapter.parameters())
    assert equal(recorder.states[1][: len(whole)], whole)
    assert not equal(recorder.states[3][: len(whole)], whole)
    assert "step 1 skipped: its gradients were not finite (rank 0: shard/0000, shard/0001" in caplog.text
    assert "shard/0004" not in caplog.text


def test_the_norm_is_the_one_before_clipping(tmp_path):
    log = CSVLog(path=str(tmp_path / "metrics.csv"))
    options = {"logger": log, "log_every_n_steps": 1}
    fit(1, GradientGuard(), MetricLogging(progress=False), gradient_clip_val=1e-9, **options)
    module = ToyTraining()
    batch = Images()[0]
    module.training_step(batch, 0)
    x = batch.content.pixels.flatten(1).float() / 255
    (module.adapter(x) - module.base(x)).square().mean().backward()
    norm = torch.stack([p.grad.norm() for p in module.adapter.parameters()]).norm().item()
    assert float(rows(log.path)[0]["train/grad_norm"]) == pytest.approx(norm, rel=1e-6)


def test_an_interrupted_run_has_the_csv_of_an_uninterrupted_one(tmp_path):
    def run(folder, max_steps, start=0, resume=None):
        log = CSVLog(path=str(folder / "metrics.csv"))
        callbacks = [GradientGuard(), MetricLogging(progress=False), Checkpointing(folder=str(folder), every_steps=4)]
        trainer = make_trainer(max_steps, callbacks, logger=log, log_every_n_steps=2)
        loader = torch.utils.data.DataLoader(Stream(start), batch_size=None)
        trainer.fit(ToyTraining(), loader, ckpt_path=resume)
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(log.path)]

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 6)
    (tmp_path / "parts" / "step-00000006" / "state.pt").unlink()  # so that step 6 comes, and is logged, a second time
    resume = newest_valid(tmp_path / "parts")
    assert resume.name == "step-00000004"
    assert run(tmp_path / "parts", 8, start=4, resume=resume) == whole
    assert [row["step"] for row in whole] == ["2", "4", "6", "8"]
    assert whole[0]["train/lr"] != whole[1]["train/lr"]


def test_an_interval_is_logged_once_with_accumulation_and_at_the_end(tmp_path):
    log = CSVLog(path=str(tmp_path / "metrics.csv"))
    callbacks = [GradientGuard(), MetricLogging(progress=False)]
    fit(5, *callbacks, logger=log, log_every_n_steps=2, accumulate_grad_batches=3)
    assert [row["step"] for row in rows(log.path)] == ["2", "4", "5"]
    assert {row["train/skipped_steps"] for row in rows(log.path)} == {"0.0"}


class Slow(Images):
    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)


class SlowCallback(Callback):
    def on_train_batch_end(self, *_):
        time.sleep(0.05)


@pytest.mark.parametrize(("data", "callback", "waits"), [(Slow, Callback, True), (Images, SlowCallback, False)])
def test_only_the_loader_counts_as_waiting_for_data(tmp_path, data, callback, waits):
    log = CSVLog(path=str(tmp_path / "metrics.csv"))
    _, trainer = fit(6, MetricLogging(progress=False), callback(), data=data(), logger=log, log_every_n_steps=3)
    row = rows(log.path)[-1]
    assert (float(row["perf/data_wait_fraction"]) > 0.5) == waits
    assert float(row["perf/images_per_second"]) > 0
    assert float(row["perf/peak_memory_gib"]) > 0.01
    assert type(trainer.profiler).__name__ == "PassThroughProfiler"


def test_the_users_profiler_still_sees_everything():
    profiler = SimpleProfiler()
    fit(3, MetricLogging(progress=False), profiler=profiler, log_every_n_steps=1)
    durations = profiler.recorded_durations
    assert len(durations["run_training_batch"]) == 3
    assert len(durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 3


def test_the_console_shows_one_line_per_interval(caplog):
    caplog.set_level("INFO", "ipa_train")
    fit(4, GradientGuard(), MetricLogging(progress=False), log_every_n_steps=2)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("ipa_train")]
    assert len(lines) == 2
    assert lines[0].startswith("step 2/4: loss ")
    for part in ("grad ", "lr ", "img/s", "data wait", "peak"):
        assert part in lines[0]


def test_the_bar_counts_steps_from_where_the_run_resumed(capsys):
    status = StatusLine(progress=True)
    status.start(90, 100)
    for step in (91, 91, 92):
        status.advance(step)
    status.show(92, {"train/loss": 0.5})
    status.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "92/100" in last
    assert "loss 0.5000" in last


def test_rare_troubles_show_only_when_there_are_some():
    assert describe({"train/loss": 1.0, "train/skipped_steps": 0.0}) == "loss 1.0000"
    assert "skipped 10%" in describe({"train/skipped_steps": 0.1})


def test_options_are_checked():
    with pytest.raises(ConfigError, match="max_in_a_row is 0"):
        GradientGuard(max_in_a_row=0)


@pytest.mark.filterwarnings("ignore")
def test_a_wandb_run_goes_on_under_its_id_without_a_network(tmp_path, monkeypatch):
    """Two starts of one run directory: the same id, and two offline records of that one run."""
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    for max_steps in (2, 4):
        logger = WandbLogger(save_dir=tmp_path, offline=True, id="0a1b2c3d", resume="allow", project="test")
        fit(max_steps, MetricLogging(progress=False), logger=logger, log_every_n_steps=1)
        assert logger.version == "0a1b2c3d"
        assert logger.experiment.id == "0a1b2c3d"
        logger.experiment.finish()
        time.sleep(1.1)  # the folders carry a time in seconds
    records = sorted((tmp_path / "wandb").glob("offline-run-*-0a1b2c3d/run-0a1b2c3d.wandb"))
    assert len(records) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preemption(every_steps=0), r"preemption\.every_steps must be 1 or more, got 0"),
        (lambda: Watchdog(collective_timeout_minutes=0), r"collective_timeout_minutes must be above 0, got 0"),
        (
            lambda: Watchdog(timeout_minutes=10),
            r"timeout_minutes must be above collective_timeout_minutes \(10\), got 10",
        ),
    ],
)
def test_stops_refuse_what_cannot_work(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
