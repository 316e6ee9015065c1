"""Draws are Philox, and depend on (seed, position, purpose) alone."""

import numpy as np
import pytest
import torch

from ipa_train.runtime.seeding import Draws, philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_published_vectors(counter, key, words, array):
    """kat_vectors of Random123, philox4x32-10."""
    c = array([counter])
    assert tuple(w.item() for w in philox(c, c, c, c, (key, key))) == words


def test_a_sample_draws_the_same_in_any_batch():
    whole = Draws(7, torch.arange(100, 164)).normal("noise", (4, 8, 8))
    parts = torch.cat([Draws(7, p).normal("noise", (4, 8, 8)) for p in torch.arange(100, 164).split(5)])
    assert torch.equal(whole, parts)


def test_seeds_positions_and_purposes_differ():
    draw = Draws(1, torch.tensor([2])).uniform("a", (64,))
    for other in (
        Draws(2, torch.tensor([2])).uniform("a", (64,)),
        Draws(1, torch.tensor([3])).uniform("a", (64,)),
        Draws(1, torch.tensor([2])).uniform("b", (64,)),
        Draws(1, torch.tensor([2 + 2**32])).uniform("a", (64,)),
        Draws(1 + 2**32, torch.tensor([2])).uniform("a", (64,)),
    ):
        assert (draw != other).all()


def test_moments():
    draws = Draws(0, torch.arange(64))
    normal, uniform = draws.normal("n", (4, 32, 32)), draws.uniform("u", (4096,))
    assert normal.mean().abs() < 0.01
    assert normal.std() == pytest.approx(1.0, abs=0.01)
    assert (normal**4).mean() == pytest.approx(3.0, abs=0.1)
    assert uniform.mean() == pytest.approx(0.5, abs=0.005)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert torch.corrcoef(normal.flatten(1)).fill_diagonal_(0).abs().max() < 0.1
