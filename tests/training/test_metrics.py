import pytest
import torch

from ipa_train.training.metrics import RunningMeans


def alone(values):
    return values


def test_means_are_over_samples_not_over_batches():
    means = RunningMeans()
    means.update("loss", torch.tensor([1.0, 2.0, 3.0]))
    means.update("loss", torch.tensor([10.0]))
    assert means.compute_and_reset(alone) == {"loss": 4.0}


def test_an_empty_group_is_left_out_and_comes_back():
    means = RunningMeans()
    losses = torch.tensor([1.0, 3.0])
    for quarter in range(2):
        means.update(f"loss_t{quarter}", losses, where=torch.tensor([0, 0]) == quarter)
    assert means.compute_and_reset(alone) == {"loss_t0": 2.0}
    means.update("loss_t1", losses, where=torch.tensor([False, True]))
    assert means.compute_and_reset(alone) == {"loss_t1": 3.0}


def test_rates_come_from_booleans():
    means = RunningMeans()
    means.update("dropped", torch.tensor([True, False, False, True]))
    assert means.compute_and_reset(alone) == {"dropped": 0.5}


def test_what_is_not_finite_does_not_spoil_the_rest():
    means = RunningMeans()
    means.update("loss", torch.tensor([float("nan"), 2.0, float("inf")]))
    assert means.compute_and_reset(alone) == {"loss": 2.0}


def test_small_losses_are_not_lost_in_a_long_sum():
    means = RunningMeans()
    means.update("loss", torch.tensor([1e8]))
    for _ in range(100):
        means.update("loss", torch.tensor([0.1]))
    assert means.compute_and_reset(alone)["loss"] == pytest.approx((1e8 + 10) / 101, rel=1e-12)


def test_one_reduction_for_all_names():
    calls = []
    means = RunningMeans()
    means.update("a", torch.ones(2))
    means.add("b", 6.0, 3.0)
    assert means.compute_and_reset(lambda values: calls.append(values.shape) or 2 * values) == {"a": 1.0, "b": 2.0}
    assert calls == [(2, 2)]
    assert RunningMeans().compute_and_reset(alone) == {}


def test_gradients_are_not_kept_alive():
    means = RunningMeans()
    means.update("loss", torch.ones(2, requires_grad=True) * 2)
    assert not any(values.requires_grad for rows in means._values.values() for values, _ in rows)
