"""Face adapters: the released sizes, and a LoRA that comes and goes with the image prompt."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import FacePlusProjector, FaceProjector, IPAdapter
from ipa_train.bases import adapter_sites
from ipa_train.bases.tiny import randomise
from ipa_train.bases.unet import unet_attention_sites, unet_low_rank_sites
from ipa_train.errors import ConfigError
from tests.adapter.test_adapter import predict
from tests.official import SD15_UNET, SDXL_UNET


def face_adapter(base, *, projector=FaceProjector, lora_rank=8):
    sizes = {"feature_dim": 24, "context_dim": base.context_dim}
    if projector is FacePlusProjector:
        sizes["hidden_dim"] = 40
    return IPAdapter(projector=projector(**sizes), sites=adapter_sites(base, lora_rank=lora_rank))


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("unet", "faceid", "faceid_plus", "tensors", "branches"),
    [
        (SD15_UNET, 3_675_648, 33_581_568, 288, 44_679_168),
        (SDXL_UNET, 8_926_208, 217_125_888, 1260, 526_581_760),
    ],
    ids=["sd15", "sdxl"],
)
def test_parameter_counts_are_the_released_ones(unet, faceid, faceid_plus, tensors, branches):
    with torch.device("meta"):
        model = UNet2DConditionModel(**unet)
        sites = unet_attention_sites(model) + unet_low_rank_sites(model, 128)
        context_dim = unet["cross_attention_dim"]
        adapter = IPAdapter(projector=FaceProjector(feature_dim=512, context_dim=context_dim), sites=sites)
        plus = FacePlusProjector(feature_dim=512, hidden_dim=1280, context_dim=context_dim)
    assert num_parameters(adapter.projector) == faceid
    assert num_parameters(plus) == faceid_plus
    assert len(list(adapter.branches.parameters())) == tensors
    assert num_parameters(adapter.branches) == branches


@torch.no_grad()
def test_a_new_lora_changes_nothing_and_a_trained_one_does(base):
    plain = face_adapter(base, lora_rank=0)
    with_lora = face_adapter(base)
    with_lora.load_state_dict(with_lora.state_dict() | plain.state_dict())
    features = torch.randn(2, 24)
    plain.attach(adapter_sites(base))
    expected = predict(base, plain(features))
    plain.detach()
    with_lora.attach(adapter_sites(base, lora_rank=8))
    # Attentions under a LoRA run by their own processors, others by joined products.
    torch.testing.assert_close(predict(base, with_lora(features)), expected, rtol=1e-4, atol=1e-5)
    for name, weight in with_lora.named_parameters():
        if "attn1" in name and name.endswith("up.weight"):
            weight.normal_()
    assert not torch.allclose(predict(base, with_lora(features)), expected, rtol=0.01), "self-attentions count too"


@torch.no_grad()
def test_the_lora_is_off_where_the_adapter_is(base):
    """Without image tokens and at scale 0 the base is kept bit for bit; at all other scales the LoRA acts in full."""
    before = predict(base, None)
    adapter = randomise(face_adapter(base), seed=1).attach(adapter_sites(base, lora_rank=8))
    tokens = adapter(torch.randn(2, 24))
    assert torch.equal(predict(base, None), before)
    adapter.scale = 1e-12
    assert not torch.allclose(predict(base, tokens), before, rtol=0.01)
    adapter.scale = 0.0
    assert torch.equal(predict(base, tokens), before)


@torch.no_grad()
def test_the_lora_acts_in_full_unless_all_sites_are_off(base):
    adapter = randomise(face_adapter(base), seed=1).attach(adapter_sites(base, lora_rank=8))
    tokens, before = adapter(torch.randn(2, 24)), predict(base, None)
    names = [site.name for site in base.attention_sites()]
    assert list(adapter.scales) == names, "a LoRA has no weight of its own"
    adapter.scales = {names[0]: 1e-12}
    little = predict(base, tokens)
    adapter.scale = 1e-12
    torch.testing.assert_close(predict(base, tokens), little)
    assert not torch.allclose(little, before, rtol=0.01)
    adapter.scales = {}
    assert torch.equal(predict(base, tokens), before)


def test_detach_is_the_inverse_of_attach(base):
    processors, keys = base.unet.attn_processors, list(base.state_dict())
    adapter = face_adapter(base).attach(adapter_sites(base, lora_rank=8))
    assert not any(a is b for a, b in zip(base.unet.attn_processors.values(), processors.values(), strict=True))
    assert list(base.state_dict()) == keys, "the base must not own adapter weights"
    adapter.detach()
    assert all(a is b for a, b in zip(base.unet.attn_processors.values(), processors.values(), strict=True))


@pytest.mark.parametrize("projector", [FaceProjector, FacePlusProjector])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_gives_the_same_gradients(base, projector, checkpointing):
    sites = adapter_sites(base, lora_rank=8)
    adapter = randomise(face_adapter(base, projector=projector), seed=1).attach(sites)
    features = [torch.randn(2, 24), torch.randn(2, 17, 40)][: len(projector.feature_kinds)]

    def gradients():
        adapter.zero_grad()
        # Over one token, as the middle block of smaller pictures has it, queries have no gradient.
        predict(base, adapter(*features), size=16).square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    plain = gradients()
    Acceleration(checkpointing=checkpointing).apply(base)
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)
    assert all(g.abs().max() > 0 for g in plain)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="num_tokens must be at least 1, got 0"):
        FaceProjector(feature_dim=4, context_dim=8, num_tokens=0)
    with pytest.raises(ConfigError, match="hidden_dim must be at least 1, got 0"):
        FacePlusProjector(feature_dim=4, hidden_dim=0, context_dim=8)
