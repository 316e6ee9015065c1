"""Compiled steps are plain ones, and blocks of one kind are compiled once, however many there are."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ipa_train.acceleration import Acceleration, acceleration
from ipa_train.acceleration.compilation import compiled
from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases.tiny import randomise

SQUARE, WIDE, TALL = (16, 16), (8, 24), (32, 16)


def loss_and_gradients(base, adapter, size):
    adapter.zero_grad()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, *size, generator=generator)
    tokens = adapter(torch.randn(2, 24, generator=generator))
    loss = base.predict(latents, torch.tensor([10.0, 900.0]), base.encode_text(["a", "b"]), tokens).square().mean()
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in adapter.parameters())])


def attached(base):
    projector = LinearProjector(feature_dim=24, context_dim=base.context_dim)
    return randomise(IPAdapter(projector=projector, sites=base.attention_sites()), seed=5).attach(
        base.attention_sites()
    )


def assert_close(a, b):
    assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.filterwarnings("ignore")  # torch's own, of tracing
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_kinds_are_compiled_once_for_a_size_and_once_for_all_others(flux, monkeypatch, checkpointing):
    adapter = attached(flux)
    plain = {size: loss_and_gradients(flux, adapter, size) for size in (SQUARE, WIDE, TALL)}
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        acceleration, "compiled", lambda run, cuda_graphs: compiled(run, cuda_graphs=cuda_graphs, backend=counter)
    )
    Acceleration(compile="blocks", checkpointing=checkpointing).apply(flux)
    counts = []
    for size in (SQUARE, WIDE, TALL, SQUARE):
        assert_close(loss_and_gradients(flux, adapter, size), plain[size])
        counts.append(counter.frame_count)
    blocks = len(flux.transformer.transformer_blocks) + len(flux.transformer.single_transformer_blocks)
    assert counts[0] < blocks / 2
    assert counts == [counts[0], *[2 * counts[0]] * 3]


@pytest.mark.full_size
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_machine_code_gives_the_same_loss_and_gradients(flux, compile):
    adapter = attached(flux)
    plain = loss_and_gradients(flux, adapter, SQUARE)
    Acceleration(compile=compile).apply(flux)
    assert_close(loss_and_gradients(flux, adapter, SQUARE), plain)
