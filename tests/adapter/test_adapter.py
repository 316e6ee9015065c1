"""Attach and detach are inverses, scale 0 is the base, and the sizes are the released ones."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import IPAdapter, LinearProjector, MLPProjector, Resampler, TimeResampler, blocks
from ipa_train.bases import StableDiffusionXL, load_base
from ipa_train.bases.unet import unet_attention_sites
from ipa_train.errors import ConfigError
from tests.official import BIG_G, SD15_UNET, SD21_UNET, SDXL_UNET, VIT_H, XL_PLUS


@pytest.fixture(params=["sd15", "sdxl"])
def base(request, tiny_models, tiny_sdxl):
    """A fresh tiny base of each UNet family, in fp32."""
    folder = {"sd15": tiny_models, "sdxl": tiny_sdxl}[request.param][0]
    return load_base(str(folder), dtype="float32")


def linear_adapter(base):
    return IPAdapter(
        projector=LinearProjector(feature_dim=24, context_dim=base.context_dim), sites=base.attention_sites()
    )


def predict(base, image_tokens, size=8):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, size, size, generator=generator)
    return base.predict(latents, torch.tensor([10, 900]), base.encode_text(["a", "b"]), image_tokens)


@pytest.mark.parametrize(
    ("unet", "projector", "encoder", "options", "parameters"),
    [
        (SD15_UNET, LinearProjector, VIT_H, {}, 22_319_616),
        (SD15_UNET, Resampler, VIT_H, {}, 49_087_488),
        (SD15_UNET, MLPProjector, VIT_H, {}, 21_794_304),
        (SDXL_UNET, LinearProjector, BIG_G, {}, 351_285_248),
        (SDXL_UNET, LinearProjector, VIT_H, {}, 349_188_096),
        (SDXL_UNET, Resampler, VIT_H, XL_PLUS, 423_748_864),
        # Never released: the sum of their parts.
        (SDXL_UNET, MLPProjector, VIT_H, {}, 340_787_200 + (1280 + 1) * 1280 + (1280 + 1) * 2048 + 2 * 2048),
        (SD21_UNET, LinearProjector, VIT_H, {}, 2 * 1024 * 12_480 + (1024 + 1) * 4096 + 2 * 1024),
        (SD21_UNET, MLPProjector, BIG_G, {}, 2 * 1024 * 12_480 + (1664 + 1) * 1664 + (1664 + 1) * 1024 + 2 * 1024),
        (SD21_UNET, Resampler, VIT_H, {}, 2 * 1024 * 12_480 + 48_541_696),
    ],
)
def test_parameter_counts_are_the_released_ones(unet, projector, encoder, options, parameters):
    """On the real sizes (22,319,616 is the paper's count)."""
    with torch.device("meta"):
        sites = unet_attention_sites(UNet2DConditionModel(**unet))
        feature_dim, context_dim = encoder[projector.feature_kinds[0]], unet["cross_attention_dim"]
        projector = projector(feature_dim=feature_dim, context_dim=context_dim, **options)
        adapter = IPAdapter(projector=projector, sites=sites)
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert [site.index for site in sites] == list(range(1, 2 * len(sites), 2))
    assert len(sites) == (70 if unet is SDXL_UNET else 16)


def test_a_projector_of_another_family_is_refused(base, flux):
    time_resampler = TimeResampler(feature_dim=24, context_dim=64, dim=64, heads=1)
    for other in (base, flux):
        with pytest.raises(ConfigError, match=r"SD 3's attention alone: .* adapter=linear"):
            IPAdapter(projector=time_resampler, sites=other.attention_sites())
    plus = Resampler(feature_dim=24, context_dim=flux.context_dim)
    with pytest.raises(ConfigError, match=r"linear projector alone, and this is a Resampler: choose adapter=linear"):
        IPAdapter(projector=plus, sites=flux.attention_sites())


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


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_gives_the_same_gradients(base, checkpointing):
    adapter = linear_adapter(base).attach(base.attention_sites())
    features = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))

    def gradients():
        adapter.zero_grad()
        predict(base, adapter(features)).square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    plain = gradients()
    Acceleration(checkpointing=checkpointing).apply(base)
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)
    assert all(g.abs().max() > 0 for g in plain)


def test_scales_by_site(base):
    sites = base.attention_sites()
    adapter = linear_adapter(base).attach(sites)
    adapter.scales = {**blocks.style(sites, 0.5), **blocks.layout(sites)}
    by_block = {name.partition(".transformer_blocks")[0]: scale for name, scale in adapter.scales.items() if scale}
    if isinstance(base, StableDiffusionXL):
        assert by_block == {"down_blocks.2.attentions.1": 1.0, "up_blocks.0.attentions.1": 0.5}
    else:
        half = {f"up_blocks.1.attentions.{i}": 0.5 for i in range(3)}
        one = dict.fromkeys(["down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0"], 1.0)
        assert by_block == {**half, **one}
    assert adapter.scale == 1.0
    adapter.scale = 0.3
    assert set(adapter.scales.values()) == {0.3}
    with pytest.raises(ConfigError, match=r"scales: there is no site 'mid_blok'\."):
        adapter.scales = {"mid_blok": 1.0}
    assert set(adapter.scales.values()) == {0.3}
    with pytest.raises(ConfigError, match=r"lies in 'up_blocks\.9'"):
        blocks.in_blocks(sites, ["up_blocks.9"])
