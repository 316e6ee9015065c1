"""The paper's baselines are what they are called, and are no adapters that a loader could take."""

import pytest
import torch

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import adapter_sites
from ipa_train.errors import ConfigError, ExportError
from ipa_train.export import from_interchange, to_interchange, write_export
from tests.adapter.test_adapter import predict


def baseline(base, attention, **options):
    sites = adapter_sites(base, attention=attention)
    return IPAdapter(
        projector=LinearProjector(feature_dim=24, context_dim=base.context_dim), sites=sites, **options
    ).attach(sites)


@pytest.mark.parametrize("attention", ["concatenated", "image_only"])
@torch.no_grad()
def test_the_unet_reads_image_tokens_as_it_reads_text(base, attention):
    """As a plain diffusers UNet that is handed another context."""
    generator = torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 900])
    text = base.encode_text(["a", "b"])
    before = base.predict(latents, timesteps, text, None)
    adapter = baseline(base, attention)
    tokens = adapter(torch.randn(2, 24))
    own = base.predict(latents, timesteps, text, tokens)
    assert torch.equal(base.predict(latents, timesteps, text, None), before)
    adapter.scale = 0.0
    assert torch.equal(base.predict(latents, timesteps, text, tokens), before)
    adapter.detach()
    context = torch.cat([text.context, tokens.states], dim=1) if attention == "concatenated" else tokens.states
    torch.testing.assert_close(own, base.unet(latents, timesteps, context).sample, rtol=1e-4, atol=1e-5)
    assert {name.partition(".")[0] for name in adapter.state_dict()} == {"projector"}


def test_a_trained_denoiser_is_part_of_the_state(base):
    adapter = baseline(base, "image_only", denoiser=base.denoiser)
    assert {f"denoiser.{name}" for name in base.unet.state_dict()} < set(adapter.state_dict())
    predict(base, adapter(torch.randn(2, 24))).square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    assert all(p.grad is None for part in (base.vae, base.text_encoder) for p in part.parameters())


@pytest.mark.parametrize(
    ("attention", "fine_tuned", "why"),
    [
        ("concatenated", False, "separate keys and values"),
        ("image_only", False, "in place of the text"),
        ("decoupled", True, "all of the denoiser is trained"),
    ],
)
def test_baselines_are_not_exported(base, tmp_path, attention, fine_tuned, why):
    adapter = baseline(base, attention, denoiser=base.denoiser if fine_tuned else None)
    with pytest.raises(ExportError, match=f"no interchange form: .*{why}"):
        write_export(tmp_path, adapter, adapter_sites(base, attention=attention))
    assert not list(tmp_path.iterdir())


def test_baselines_do_not_start_from_adapter_files(base):
    decoupled, sites = baseline(base, "decoupled"), adapter_sites(base, attention="concatenated")
    state = to_interchange(decoupled, base.attention_sites())
    with pytest.raises(ExportError, match="no interchange form"):
        from_interchange(state, baseline(base, "concatenated"), sites, source="a.safetensors")


def test_transformers_have_none_of_this(flux):
    for attention in ("concatenated", "image_only"):
        with pytest.raises(ConfigError, match=f"attention={attention} needs the cross-attention of a UNet"):
            adapter_sites(flux, attention=attention)
    with pytest.raises(ConfigError, match=r"adapter\.sites\.lora_rank=4: a LoRA goes with adapters of UNets"):
        adapter_sites(flux, lora_rank=4)


def test_what_cannot_attach_is_refused(base):
    with pytest.raises(ConfigError, match=r"adapter\.sites\.lora_rank must be at least 0 \(none\), got -1"):
        adapter_sites(base, lora_rank=-1)
