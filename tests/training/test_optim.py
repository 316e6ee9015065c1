import itertools

import pytest
import torch

from ipa_train.errors import ConfigError
from ipa_train.training.optim import LRSchedule


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear"])
def test_warm_up_rises_to_one_without_a_step_at_zero(shape):
    schedule = LRSchedule(shape=shape, warmup_steps=4)
    factors = [schedule.factor(step, 20) for step in range(5)]
    assert factors[0] > 0
    assert factors == sorted(factors)
    assert factors[4] == 1.0


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_decays_to_the_final_fraction_and_stays(shape):
    schedule = LRSchedule(shape=shape, warmup_steps=10, final_fraction=0.1)
    factors = [schedule.factor(step, 110) for step in range(10, 130)]
    assert factors[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors))
    assert factors[50] == pytest.approx(0.55)
    assert factors[100:] == pytest.approx([0.1] * 20)


def test_the_optimizer_follows_and_a_resumed_one_too():
    def build():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        return optimizer, LRSchedule(shape="linear", warmup_steps=2).build(optimizer, 10)

    def advance(optimizer, scheduler, steps):
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return rates

    optimizer, scheduler = build()
    whole = advance(optimizer, scheduler, 10)
    schedule = LRSchedule(shape="linear", warmup_steps=2)
    assert whole == pytest.approx([0.5 * schedule.factor(step, 10) for step in range(10)])

    optimizer, scheduler = build()
    first = advance(optimizer, scheduler, 4)
    states = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = build()
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert first + advance(optimizer, scheduler, 6) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "cosin"}, "Did you mean 'cosine'"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"shape": "linear", "final_fraction": 1.5}, r"final_fraction is 1\.5"),
        ({"final_fraction": 0.5}, "no effect"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        LRSchedule(**options)


def test_a_decay_needs_an_end():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        LRSchedule(shape="cosine").build(optimizer, -1)
