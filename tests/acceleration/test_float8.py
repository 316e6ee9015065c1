"""Frozen layers in 8 bits: which ones, how far off, and how many bytes."""

import pytest
import torch
from torch import nn

from ipa_train.acceleration import Acceleration
from ipa_train.acceleration.float8 import Float8Linear
from ipa_train.adapter import FaceProjector, IPAdapter, LinearProjector
from ipa_train.bases import StableDiffusion, adapter_sites
from ipa_train.bases.tiny import randomise
from ipa_train.errors import ConfigError


@pytest.fixture
def bf16(tiny_models):
    return StableDiffusion.from_pretrained(str(tiny_models[0]))


def loss_and_gradients(base, adapter):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = base.predict(latents, torch.tensor([10, 900]), base.encode_text(["a", "b"]), adapter(torch.ones(2, 24)))
    loss = (loss - latents).square().mean()
    adapter.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in adapter.parameters()])


def off(a, b):
    return (a - b).norm() / b.norm()


def test_a_layer_and_its_gradient_follow_the_plain_ones():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).requires_grad_(False)
    linear.weight *= torch.logspace(-3, 3, 48)[:, None]  # rows of all sizes: each has a scale of its own
    x, y_grad = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 48)
    results = []
    for layer in (linear, Float8Linear(linear)):
        y = layer(x)
        results.append((y.detach(), torch.autograd.grad(y, x, y_grad)[0]))
    (y, dx), (y8, dx8) = results
    assert (off(y8, y) < 0.05, off(dx8, dx) < 0.1) == (True, True)
    assert (y8 - y).norm(dim=(0, 1)).div(y.norm(dim=(0, 1))).max() < 0.1, "small rows are kept as well as large ones"


def test_training_follows_bf16(bf16):
    projector = LinearProjector(feature_dim=24, context_dim=bf16.context_dim)
    adapter = randomise(IPAdapter(projector=projector, sites=bf16.attention_sites()), seed=1)
    adapter.attach(bf16.attention_sites())
    loss, gradients = loss_and_gradients(bf16, adapter)
    Acceleration(float8=True, checkpointing="selective").apply(bf16)
    loss8, gradients8 = loss_and_gradients(bf16, adapter)
    assert abs(loss8 - loss) < 0.01 * loss
    assert off(gradients8, gradients) < 0.2
    assert not torch.equal(gradients8, gradients)


def test_only_frozen_layers_of_blocks_are_held_in_8_bits(bf16):
    sites = adapter_sites(bf16, lora_rank=8)
    IPAdapter(projector=FaceProjector(feature_dim=24, context_dim=bf16.context_dim), sites=sites).attach(sites)
    Acceleration(float8=True).apply(bf16)
    held = {path for path, module in bf16.unet.named_modules() if isinstance(module, Float8Linear)}
    assert held, "feed-forward layers at least"
    assert all(".ff.net." in path for path in held), (
        "layers under a LoRA and those of the timestep keep their precision"
    )
    layer = bf16.unet.get_submodule(min(held))
    assert sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if n == "weight") == (
        layer.in_features * layer.out_features
    )


def test_a_base_in_another_precision_is_refused(base):
    with pytest.raises(ConfigError, match=r"float8=true needs base\.dtype=bfloat16, got float32"):
        Acceleration(float8=True).apply(base)
