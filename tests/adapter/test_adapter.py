"""Attach and detach are inverses, scale 0 is the base, and the sizes are the released ones."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from ipa_train.adapter import IPAdapter, LinearProjector, MLPProjector, Resampler
from ipa_train.bases.unet import unet_attention_sites

SD15_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
VIT_H = {"pooled": 1024, "penultimate": 1280}


def linear_adapter(base):
    return IPAdapter(
        projector=LinearProjector(feature_dim=24, context_dim=base.context_dim), sites=base.attention_sites()
    )


def predict(base, image_tokens):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return base.predict(latents, torch.tensor([10, 900]), base.encode_text(["a", "b"]), image_tokens)


@pytest.mark.parametrize(
    ("projector", "parameters"),
    [(LinearProjector, 22_319_616), (Resampler, 49_087_488), (MLPProjector, 21_794_304)],
)
def test_parameter_counts_are_the_released_ones(projector, parameters):
    """On the real SD 1.5 and ViT-H sizes (22,319,616 is the paper's count for linear)."""
    with torch.device("meta"):
        sites = unet_attention_sites(UNet2DConditionModel(**SD15_UNET))
        adapter = IPAdapter(
            projector=projector(feature_dim=VIT_H[projector.feature_kinds[0]], context_dim=768), sites=sites
        )
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert [site.index for site in sites] == list(range(1, 32, 2))


@torch.no_grad()
def test_without_image_or_at_scale_zero_the_base_is_kept_bit_for_bit(base):
    before = predict(base, None)
    adapter = linear_adapter(base).attach(base.attention_sites())
    tokens = adapter(torch.randn(2, 24))
    assert torch.equal(predict(base, None), before)
    assert not torch.allclose(predict(base, tokens), before, rtol=0.01)
    adapter.scale = 0.0
    assert torch.equal(predict(base, tokens), before)


def test_detach_is_the_inverse_of_attach(base):
    processors = base.unet.attn_processors
    keys = list(base.state_dict())
    adapter = linear_adapter(base).attach(base.attention_sites())
    assert list(base.state_dict()) == keys, "the base must not own adapter weights"
    adapter.detach()
    assert all(a is b for a, b in zip(base.unet.attn_processors.values(), processors.values(), strict=True))


def test_keys_and_values_start_as_the_text_ones(base):
    adapter = linear_adapter(base)
    for site, branch in zip(base.attention_sites(), adapter.branches.values(), strict=True):
        assert torch.equal(branch.to_k_ip.weight, site.module.to_k.weight)
        assert torch.equal(branch.to_v_ip.weight, site.module.to_v.weight)


def test_gradient_checkpointing_gives_the_same_gradients(base):
    adapter = linear_adapter(base).attach(base.attention_sites())
    features = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))

    def gradients():
        adapter.zero_grad()
        predict(base, adapter(features)).square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    plain = gradients()
    base.unet.enable_gradient_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert all(g.abs().max() > 0 for g in plain)
