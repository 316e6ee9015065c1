import pytest
import torch
from torch import nn

from ipa_train.errors import CheckpointError, ConfigError
from ipa_train.training.ema import AdapterEMA


def set_weights(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_follows_the_recursion():
    model = nn.Linear(2, 3)
    ema = AdapterEMA(decay=0.75, warmup=False)
    expected = None
    for value in (1.0, 5.0, -3.0, 2.0):
        set_weights(model, value)
        ema.update(model.named_parameters())
        expected = value if expected is None else 0.75 * expected + 0.25 * value
    torch.testing.assert_close(ema.weights["weight"], torch.full((3, 2), expected))
    torch.testing.assert_close(ema.weights["bias"], torch.full((3,), expected))


def test_warm_up_forgets_the_start_faster():
    model = nn.Linear(1, 1)
    slow, warm = AdapterEMA(decay=0.9999, warmup=False), AdapterEMA(decay=0.9999)
    for value in (0.0, *[1.0] * 50):
        set_weights(model, value)
        slow.update(model.named_parameters())
        warm.update(model.named_parameters())
    assert slow.weights["bias"].item() < 0.01
    assert warm.weights["bias"].item() > 0.9


def test_applied_swaps_in_and_restores_every_bit_even_after_an_error():
    model = nn.Linear(4, 4)
    ema = AdapterEMA(decay=0.5)
    ema.update(model.named_parameters())
    average = {name: w.clone() for name, w in ema.weights.items()}
    with torch.no_grad():
        model.weight.mul_(1 / 3)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fail_inside():
        with ema.applied(model.named_parameters()):
            torch.testing.assert_close(dict(model.state_dict()), average, rtol=0, atol=0)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    torch.testing.assert_close(dict(model.state_dict()), trained, rtol=0, atol=0)
    torch.testing.assert_close(ema.weights, average, rtol=0, atol=0)


def test_before_the_first_update_the_average_is_the_weights():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with AdapterEMA().applied(model.named_parameters()):
        torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_a_restored_average_goes_on_as_if_never_saved():
    model = nn.Linear(3, 3)
    ema, restored = AdapterEMA(decay=0.9), AdapterEMA(decay=0.9)
    ema.update(model.named_parameters())
    restored.load_state_dict(ema.state_dict())
    set_weights(model, 0.3)
    for average in (ema, restored):
        average.update(model.named_parameters())
    torch.testing.assert_close(restored.state_dict(), ema.state_dict(), rtol=0, atol=0)


def test_an_average_of_another_adapter_is_refused():
    ema = AdapterEMA()
    ema.update(nn.Linear(2, 2, bias=False).named_parameters())
    with pytest.raises(CheckpointError, match="'bias'"):
        ema.update(nn.Linear(2, 2).named_parameters())


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5])
def test_decay_is_checked(decay):
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        AdapterEMA(decay=decay)
