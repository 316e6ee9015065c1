import csv
import re
import socket

import pytest

from ipa_train.training.callbacks.gradient_guard import GradientGuard
from tests.training.ranks import run_ranks
from tests.training.toy import Images, ToyTraining, make_trainer


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_models):
    """The folder of the run, and what each of two gloo processes saw."""
    root = tmp_path_factory.mktemp("two_ranks")
    return root, run_ranks("two_ranks.py", root, *tiny_models)


def alone(max_steps, poison=()):
    """Sums of the weights that one process ends with."""
    module = ToyTraining()
    make_trainer(max_steps, [GradientGuard()]).fit(module, Images(batch_size=8, poison=poison).loader())
    return [p.sum().item() for p in module.adapter.parameters()]


def test_ranks_send_each_other_what_is_trained_alone(two_ranks):
    assert all(saw["sends_the_adapter_alone"] for saw in two_ranks[1])


def test_means_are_over_the_samples_of_all_ranks_in_one_reduction(two_ranks):
    for saw in two_ranks[1]:
        assert saw["means"] == {"loss": 3.0, "only_on_one": 5.0}
        assert saw["num_reductions"] == 1
        assert saw["gathered"] == [0, 1]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both(two_ranks):
    root, (first, second) = two_ranks
    assert first["weights"] == second["weights"]
    with (root / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["train/skipped_steps"]) for row in rows] == [0, 1, 0, 0]
    assert "step 2 skipped: its gradients were not finite (rank 1: shard/0012" in first["stderr"]
    assert "skipped" not in second["stderr"]


def test_the_host_waits_at_checkpoints_and_log_steps_alone_also_among_ranks(two_ranks):
    for saw in two_ranks[1]:
        assert saw["waits"] == [["end", 2], ["end", 3]]


def test_no_collective_of_any_group_lasts_longer_than_allowed(two_ranks):
    for saw in two_ranks[1]:
        assert len(saw["timeout_minutes"]) >= 2, "the default group, and that of the agreement"
        assert set(saw["timeout_minutes"]) == {7}


def test_a_slow_rank_is_named_with_its_machine_and_changes_nothing(two_ranks):
    root, (first, second) = two_ranks
    with (root / "slow" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # In the second step DDP settles its buckets, and all ranks wait for each other in the forward.
    assert {row["perf/slowest_rank"] for row in rows if row["step"] != "2"} == {"1.0"}
    assert float(rows[-1]["perf/straggler_fraction"]) > 0.1
    (warning,) = re.findall(r"rank 1 on (\S+) has held the others up .*its data come late", first["stderr"])
    assert warning == socket.gethostname()
    assert "held the others up" not in second["stderr"]
    assert (
        first["weights_beside_a_slow_rank"] == second["weights_beside_a_slow_rank"] == pytest.approx(alone(8), abs=1e-5)
    )


def test_two_ranks_train_like_one_with_the_same_global_batch(two_ranks):
    assert two_ranks[1][0]["weights"] == pytest.approx(alone(4, poison=[12]), abs=1e-5)


def test_rank_0_alone_writes_whole_checkpoints(two_ranks):
    root, saw = two_ranks
    for one in saw:
        assert one["checkpoints"] == ["step-00000000", "step-00000002", "step-00000004"]
    assert not list((root / "run" / "checkpoints").glob(".tmp-*"))


def test_ranks_that_would_resume_from_different_checkpoints_stop(two_ranks):
    for saw in two_ranks[1]:
        assert "would resume from" in saw["other_checkpoint"]


def test_a_save_that_fails_on_rank_0_stops_both_with_its_reason(two_ranks):
    for saw in two_ranks[1]:
        assert "No space left on device" in saw["full_disk"]


def test_too_many_skipped_updates_stop_both_and_name_rank_and_samples(two_ranks):
    first, second = (saw["not_finite"] for saw in two_ranks[1])
    assert first == second
    assert "2 times in a row, at last at step 3" in first
    assert "rank 0: shard/0016" in first
