"""Flux: what it is told, what its adapter adds, and which folders are none."""

import json
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from transformers import CLIPImageProcessorPil

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import Flux, load_base
from ipa_train.bases.flux import flux_attention_sites
from ipa_train.bases.tiny import randomise, tiny_pipeline
from ipa_train.errors import ConfigError


def new_adapter(base):
    torch.manual_seed(0)
    projector = LinearProjector(feature_dim=24, context_dim=base.context_dim)
    return IPAdapter(projector=projector, sites=base.attention_sites())


def features():
    return torch.randn(2, 24, generator=torch.Generator().manual_seed(1))


def predict(base, image_tokens):
    latents = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    return base.predict(latents, torch.tensor([125.0, 1000.0]), base.encode_text(["a", "b"]), image_tokens)


def gradients(base, adapter):
    adapter.zero_grad()
    predict(base, adapter(features())).square().mean().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


@pytest.fixture
def schnell(tmp_path):
    """Folder of a Flux without guidance or shift."""
    pipeline = tiny_pipeline("flux")
    config = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.register_modules(
        transformer=randomise(FluxTransformer2DModel.from_config(config), seed=0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.save_pretrained(tmp_path / "schnell")
    return tmp_path / "schnell"


@pytest.mark.parametrize(("num_tokens", "parameters"), [(4, 490_874_880), (16, 528_672_768)])
def test_parameter_counts_are_those_of_xlabs_files(num_tokens, parameters):
    """On the real sizes of Flux and of CLIP-L."""
    with torch.device("meta"):
        sites = flux_attention_sites(FluxTransformer2DModel(num_single_layers=0))
        projector = LinearProjector(feature_dim=768, context_dim=4096, num_tokens=num_tokens)
        adapter = IPAdapter(projector=projector, sites=sites)
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert [site.index for site in sites] == list(range(19))


@torch.no_grad()
def test_without_image_or_at_scale_zero_the_base_is_kept_bit_for_bit(flux):
    before = predict(flux, None)
    adapter = new_adapter(flux).attach(flux.attention_sites())
    tokens = adapter(features())
    assert torch.equal(predict(flux, tokens), before), "training must start from the base"
    randomise(adapter, seed=5)
    assert torch.equal(predict(flux, None), before)
    assert not torch.allclose(predict(flux, tokens), before, rtol=0.01)
    adapter.scale = 0.0
    assert torch.equal(predict(flux, tokens), before)


def test_detach_is_the_inverse_of_attach(flux):
    processors, keys = flux.transformer.attn_processors, list(flux.state_dict())
    adapter = new_adapter(flux).attach(flux.attention_sites())
    assert list(flux.state_dict()) == keys, "the base must not own adapter weights"
    adapter.detach()
    assert all(a is b for a, b in zip(flux.transformer.attn_processors.values(), processors.values(), strict=True))


def test_from_zero_every_weight_learns_from_the_second_step_on(flux):
    adapter = new_adapter(flux).attach(flux.attention_sites())
    alive = {name for name, gradient in gradients(flux, adapter).items() if gradient.any()}
    assert alive == {name for name in adapter.state_dict() if "to_v_ip" in name}
    torch.optim.AdamW(adapter.parameters(), lr=1e-3).step()
    # A bias that all keys share shifts all of a query's scores alike, so softmax takes no notice of it.
    dead = {name for name, gradient in gradients(flux, adapter).items() if gradient.abs().max() < 1e-9}
    assert dead <= {name for name in adapter.state_dict() if name.endswith("to_k_ip.bias")}


def test_bf16_base_with_fp32_masters_follows_fp32(flux, tiny_flux):
    bf16 = Flux.from_pretrained(str(tiny_flux[0]), max_t5_tokens=32)
    Acceleration(checkpointing="full").apply(bf16)
    adapter = randomise(new_adapter(flux), seed=5)
    flat = []
    for base in (flux, bf16):
        adapter.attach(base.attention_sites())
        flat.append(torch.cat([gradient.flatten() for gradient in gradients(base, adapter).values()]))
        adapter.detach()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_gives_the_same_gradients(flux, checkpointing):
    adapter = randomise(new_adapter(flux), seed=5).attach(flux.attention_sites())
    plain = gradients(flux, adapter)
    Acceleration(checkpointing=checkpointing).apply(flux)
    for name, gradient in gradients(flux, adapter).items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("latent_size", [(64, 64), (128, 96)])
def test_timesteps_are_shifted_as_its_sampler_shifts_them(latent_size, flux, schnell):
    u = 1.0 - torch.arange(5) / 5
    for base in (flux, Flux.from_pretrained(str(schnell))):
        shift = base.timestep_shift(latent_size)
        sampled = base.sampler(5, latent_size).timesteps / 1000
        torch.testing.assert_close(sampled, shift * u / (1 + (shift - 1) * u))
    assert (shift, base.guidance) == (1.0, None), "schnell has neither"
    assert flux.timestep_shift((64, 64)) < flux.timestep_shift((128, 128))


@torch.no_grad()
def test_guidance_is_told_to_the_model_and_is_no_other_than_asked_for(flux, tiny_flux):
    other = Flux.from_pretrained(str(tiny_flux[0]), dtype="float32", max_t5_tokens=32, guidance=3.5)
    assert (flux.guidance, other.guidance) == (1.0, 3.5)
    assert not torch.allclose(predict(flux, None), predict(other, None), rtol=0.01)


def test_no_image_is_a_black_picture(flux, image_encoder):
    black = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(
        Image.new("RGB", (50, 40)), return_tensors="pt"
    ).pixel_values
    expected = image_encoder.model(black).image_embeds
    torch.testing.assert_close(image_encoder.null_features("pooled", flux.null_image("pooled")), expected)


def test_is_frozen_in_eval_mode_and_in_the_precision_asked_for(tiny_flux):
    base = load_base(str(tiny_flux[0]), dtype="bfloat16", vae_dtype="float32")
    base.train()
    assert not any(m.training for m in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    for part in (base.transformer, base.text_encoder, base.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    adapter = randomise(new_adapter(base), seed=5).attach(base.attention_sites())
    assert predict(base, adapter(features())).dtype == torch.float32
    assert base.size_multiple == 16
    assert base.encode_text(["", "a house"]).context.shape == (2, 512, 64)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("StableDiffusionPipeline", "this is a StableDiffusionPipeline: choose base=sd15 or base=sd21"),
        ("Flux2Pipeline", "this is a Flux2Pipeline: base=flux_dev or base=flux_schnell needs a FluxPipeline"),
        ("FluxImg2ImgPipeline", "cannot load this base"),
    ],
)
def test_wrong_folders_are_refused(pipeline, message, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(ConfigError, match=message):
        Flux.from_pretrained(str(tmp_path))


def test_models_that_see_more_than_noisy_latents_are_refused(tiny_flux, tmp_path):
    """FLUX.1 Fill and Control, whose pipelines have names that begin alike."""
    shutil.copytree(tiny_flux[0], tmp_path / "fill")
    pipeline = tiny_pipeline("flux")
    FluxTransformer2DModel.from_config({**pipeline.transformer.config, "in_channels": 384}).save_pretrained(
        tmp_path / "fill" / "transformer"
    )
    with pytest.raises(ConfigError, match="takes 384 channels, not the 64 of noisy latents alone"):
        Flux.from_pretrained(str(tmp_path / "fill"))


def test_options_that_do_not_go_with_the_model_are_refused(tiny_flux, schnell):
    with pytest.raises(ConfigError, match=r"base\.guidance=3\.5, but .* not guidance-distilled .* base\.guidance=null"):
        Flux.from_pretrained(str(schnell), guidance=3.5)
    for number in (0, 513):
        with pytest.raises(ConfigError, match=f"max_t5_tokens must be between 1 and 512, got {number}"):
            Flux.from_pretrained(str(tiny_flux[0]), max_t5_tokens=number)
