import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from ipa_train.errors import ConfigError
from ipa_train.training.callbacks.metric_logging import MetricLogging
from ipa_train.training.stragglers import PATIENCE, OwnTime, Share, Stragglers
from ipa_train.training.throughput import Throughput
from tests.training.toy import Images, ToyTraining, make_trainer


def judge(stragglers, own, waited=None):
    """One log interval, given each rank's shares of its time."""
    shares = [Share(o, w, f"node{r}") for r, (o, w) in enumerate(zip(own, waited or [0.0] * len(own), strict=True))]
    return stragglers.judge(shares[0].own, shares[0].waited, lambda mine: shares)


def test_the_cost_is_what_the_slowest_takes_beyond_the_median_of_the_others():
    metrics = judge(Stragglers(max_fraction=0.1), [0.2, 0.3, 0.9, 0.4])
    assert metrics == {"perf/slowest_rank": 2.0, "perf/straggler_fraction": pytest.approx(0.6)}
    assert judge(Stragglers(max_fraction=0.1), [0.2, 0.5])["perf/straggler_fraction"] == pytest.approx(0.3)


def test_a_rank_that_stays_slow_is_named_once_with_machine_and_cause(caplog):
    stragglers = Stragglers(max_fraction=0.1)
    for interval in range(1, 2 * PATIENCE):
        judge(stragglers, [0.2, 0.2, 0.6], [0.1, 0.1, 0.1])
        assert len(caplog.records) == (interval >= PATIENCE)
    (record,) = caplog.records
    assert "rank 2 on node2" in record.getMessage()
    assert "60% of its time passes before its losses, 10% of it waiting for data (others: 20%, 10%)" in caplog.text
    assert "look at clocks, heat and other processes of that machine" in caplog.text


def test_waiting_for_data_is_told_from_working_slowly(caplog):
    stragglers = Stragglers(max_fraction=0.1)
    for _ in range(PATIENCE):
        judge(stragglers, [0.6, 0.2, 0.2], [0.5, 0.1, 0.1])
    assert "its data come late: look at the disk or network of that machine" in caplog.text


def test_ranks_that_take_turns_or_differ_little_are_no_stragglers(caplog):
    stragglers = Stragglers(max_fraction=0.1)
    slow = [0.2, 0.2, 0.2, 0.6]
    for interval in range(4 * PATIENCE):
        judge(stragglers, slow[interval % 4 :] + slow[: interval % 4])
        judge(Stragglers(max_fraction=0.1), [0.5, 0.5, 0.59])
    for interval in range(1, 3 * PATIENCE):
        judge(stragglers, [0.2, 0.6 if interval % PATIENCE else 0.2])
    assert not caplog.records


def test_of_a_rank_alone_there_is_nothing_to_say():
    assert judge(Stragglers(max_fraction=0.1), [0.9]) == {}


def test_the_option_is_checked():
    with pytest.raises(ConfigError, match=r"callbacks\.metric_logging\.max_straggler_fraction is 0"):
        MetricLogging(max_straggler_fraction=0)


class SlowImages(Images):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


class SlowForward(ToyTraining):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


class SlowElsewhere(Callback):
    def on_after_backward(self, *_):
        time.sleep(0.02)

    def on_train_batch_end(self, *_):
        time.sleep(0.02)


class Taken(Callback):
    """Measures as ``MetricLogging`` does, over the whole of a fit."""

    def __init__(self):
        self.throughput = Throughput()

    def on_train_start(self, trainer, *_):
        self.throughput.start(trainer)

    def on_before_backward(self, *_):
        self.throughput.reached_loss()

    def on_train_end(self, *_):
        self.interval = self.throughput.take()


@pytest.mark.parametrize(
    ("images", "module", "callback", "is_own"),
    [
        (SlowImages, ToyTraining, Callback, True),
        (Images, SlowForward, Callback, True),
        (Images, ToyTraining, SlowElsewhere, False),
    ],
)
def test_a_ranks_own_time_ends_at_the_loss(images, module, callback, is_own):
    taken = Taken()
    trainer = make_trainer(8, [taken, callback()], accumulate_grad_batches=2)
    trainer.fit(module(), images().loader())
    assert (taken.interval.own_seconds > 0.5 * taken.interval.seconds) == is_own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_own_clock_counts():
    """The host hands out the work at once; the time is that of the work."""
    device = torch.device("cuda", torch.cuda.current_device())
    own_time, x = OwnTime(device), torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    began = time.perf_counter()
    own_time.begin()
    for _ in range(50):
        x @ x
    own_time.end()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    assert own_time.take() == pytest.approx(seconds, rel=0.2)
    assert own_time.take() == 0
