"""The forward that training runs is the UNet's own, on the same weights, and lets gradients be summed early."""

import copy

import pytest
import torch
from torch import nn

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import StableDiffusionXL
from ipa_train.bases.tiny import randomise
from ipa_train.bases.unet_forward import UNetForward


@pytest.fixture(params=["sd15", "sdxl"])
def unet_base(request, base, tiny_sdxl):
    return base if request.param == "sd15" else StableDiffusionXL.from_pretrained(str(tiny_sdxl[0]), dtype="float32")


def adapter_on(base):
    sites = base.attention_sites()
    projector = LinearProjector(feature_dim=24, context_dim=base.context_dim)
    return randomise(IPAdapter(projector=projector, sites=sites), seed=5).attach(sites)


def outcome(base, adapter, size):
    """Prediction and gradients."""
    generator = torch.Generator().manual_seed(0)
    latents, features = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 24, generator=generator)
    adapter.zero_grad()
    text = base.encode_text(["a", "b"])
    prediction = base.predict(latents, torch.tensor([10, 900]), text, adapter(features))
    prediction.square().mean().backward()
    return prediction.detach(), torch.cat([p.grad.flatten() for p in adapter.parameters()])


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (11, 13)], ids=str)
def test_predictions_and_gradients_are_those_of_the_models_own_forward(unet_base, size):
    adapter = adapter_on(unet_base)
    found = outcome(unet_base, adapter, size)
    unet_base._forward = None
    assert_equal(found, outcome(unet_base, adapter, size))


def test_weights_are_held_once_and_followed_wherever_they_go(base):
    adapter = adapter_on(base)
    expected = outcome(base, adapter, (8, 8))
    attention = base.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    assert attention.to_q.weight.untyped_storage().data_ptr() == attention.to_v.weight.untyped_storage().data_ptr()
    base.unet.to(torch.float64).to(torch.float32)
    assert_equal(outcome(base, adapter, (8, 8)), expected)
    attention.to_q.weight.data = 2 * attention.to_q.weight
    assert (outcome(base, adapter, (8, 8))[0] - expected[0]).norm() > 1e-3 * expected[0].norm()


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(base):
    def prediction(of):
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return of.predict(latents, torch.tensor([10, 900]), of.encode_text(["a", "b"]), None)

    before = prediction(base)
    twin = copy.deepcopy(base)
    for weight in twin.unet.parameters():
        weight.mul_(1.1)
    assert not torch.allclose(prediction(twin), before)
    assert torch.equal(prediction(base), before)


def test_gradients_of_late_sites_are_done_before_early_blocks_are(base):
    """What lets their sum over the ranks overlap the rest of the backward."""
    adapter, done = adapter_on(base), []
    for site in base.attention_sites():
        weight = adapter.branch(site).to_k_ip.weight
        weight.register_post_accumulate_grad_hook(lambda _, name=site.name: done.append(name))

    def watch(module, inputs, output):
        output.register_hook(lambda _: done.append("early block"))

    base.unet.down_blocks[0].resnets[1].norm1.register_forward_hook(watch)
    outcome(base, adapter, (16, 16))
    assert len(done) == len(adapter.branches) + 1
    before = done[: done.index("early block")]
    assert {name for name in before if name.startswith("up_blocks")} == {n for n in done if n.startswith("up_blocks")}


def test_other_architectures_run_by_their_own_forward(base):
    assert UNetForward.fits(base.unet)
    base.unet.mid_block.resnets[0].nonlinearity = nn.ReLU()
    assert not UNetForward.fits(base.unet)
