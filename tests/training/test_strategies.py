from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from ipa_train.bases.tiny import tiny_pipeline
from tests.training.ranks import run_ranks
from tests.training.strategy_ranks import LEARNING_RATE

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, tiny_flux, tiny_models):
    """The folder of the runs, and what each of two gloo processes saw."""
    root, sd3 = tmp_path_factory.mktemp("strategies"), tmp_path_factory.mktemp("sd3")
    tiny_pipeline("sd35m").save_pretrained(sd3)
    return root, run_ranks("strategy_ranks.py", root, *tiny_flux, sd3, tiny_models[0], DS_ACCELERATOR="cpu")


def test_compressed_gradients_are_those_of_ddp_rounded_to_bf16(two_ranks):
    for saw in two_ranks[1]:
        plain, compressed = torch.tensor(saw["plain"]), torch.tensor(saw["compressed"])
        error = (compressed - plain).norm() / plain.norm()
        # Half a unit of the 8-bit mantissa, once before the sum and once after.
        assert 2**-13 < error < 2 * 2**-8, "0 were no compression at all"
    first, second = (saw["compressed"] for saw in two_ranks[1])
    assert first == second


def test_sharding_leaves_each_rank_half_of_the_base(two_ranks):
    for saw in two_ranks[1]:
        assert saw["sharded"] == ["DTensor"]
        assert saw["share"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("sharded_sharded", "ddp"),
        ("sharded_ddp", "ddp"),
        ("sd3_sharded", "sd3_ddp"),
        pytest.param("zero1_zero2", "ddp", marks=needs_deepspeed),
        pytest.param("zero1_ddp", "ddp", marks=needs_deepspeed),
        pytest.param("finetune_zero2", "finetune_ddp", marks=needs_deepspeed),
    ],
)
def test_whatever_the_strategy_training_and_checkpoints_are_the_same(two_ranks, way, expected):
    ours, ddp = (sorted((two_ranks[0] / name).glob("step-*"))[-1] for name in (way, expected))
    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in ddp.iterdir())
    for name in (file.name for file in ddp.glob("*.safetensors")):
        # What these biases add to all scores alike softmax takes away: their gradient is rounding, and nothing else.
        weights, expected = (
            {key: w for key, w in load_file(path / name).items() if not key.endswith("to_k_ip.bias")}
            for path in (ours, ddp)
        )
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            # To a hundredth of a step of Adam, which makes much of what rounding does to small gradients.
            assert (weight - expected[key]).norm() < 0.01 * LEARNING_RATE * weight.numel() ** 0.5, key
    state, expected = (torch.load(path / "state.pt", weights_only=True)["optimizer_states"] for path in (ours, ddp))
    assert state[0]["param_groups"] == expected[0]["param_groups"]
    moments, expected = (
        {f"{number}.{key}": root(x, key) for number, of in s[0]["state"].items() for key, x in of.items()}
        for s in (state, expected)
    )
    assert moments.keys() == expected.keys()
    for key, x in expected.items():
        assert (moments[key] - x).norm() < 1e-3 * x.norm() + 1e-8, key


def root(moment, key):
    """In the units of the gradient, so that one bound holds for both moments."""
    return moment.sqrt() if key.endswith("_sq") else moment


@needs_deepspeed
def test_zero_skips_what_is_not_finite_as_ddp_does(two_ranks):
    for saw in two_ranks[1]:
        assert saw["zero_poisoned"] == pytest.approx(saw["ddp_poisoned"], rel=1e-5)
