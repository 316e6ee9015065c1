"""SD 3: text and shift as the pipeline has them, the base untouched by an idle adapter, gradients, what is refused."""

import json
import logging
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import AttentionSite, ImageTokens, IPAdapter, LinearProjector, TimeResampler
from ipa_train.adapter.joint_attention import JointImageAttention
from ipa_train.bases import StableDiffusion3, load_base
from ipa_train.bases.sd3 import sd3_attention_sites
from ipa_train.bases.tiny import tiny_pipeline
from ipa_train.cli.main import main
from ipa_train.errors import ConfigError
from tests.official import SD35_LARGE, SD35_MEDIUM

CAPTIONS = ["a house", "a red car on a road"]


@pytest.fixture
def sd3(tiny_sd3):
    return StableDiffusion3.from_pretrained(str(tiny_sd3), dtype="float32")


def adapter_for(base, **options):
    torch.manual_seed(0)
    projector = TimeResampler(
        feature_dim=40, context_dim=base.context_dim, **{"num_tokens": 8, "dim": 64, "heads": 1} | options
    )
    return IPAdapter(projector=projector, sites=base.attention_sites())


def predict(base, image_tokens, timesteps=(10.5, 900.0)):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return base.predict(latents, torch.tensor(timesteps), base.encode_text(CAPTIONS), image_tokens)


def make_tokens(adapter, timesteps=(10.5, 900.0)):
    features = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1))
    return adapter(features, timesteps=torch.tensor(timesteps))


@pytest.mark.parametrize(
    ("config", "num_sites", "parameters"), [(SD35_LARGE, 38, 797_925_888), (SD35_MEDIUM, 37, None)]
)
def test_sites_and_parameters_are_the_released_ones(config, num_sites, parameters):
    with torch.device("meta"):
        sites = sd3_attention_sites(SD3Transformer2DModel(**config))
        dim = config["caption_projection_dim"]
        adapter = IPAdapter(projector=TimeResampler(feature_dim=1152, context_dim=dim), sites=sites)
    assert [site.index for site in sites] == list(range(num_sites))
    if parameters is not None:
        assert sum(p.numel() for p in adapter.parameters()) == parameters


def test_second_attentions_are_numbered_after_the_first_of_their_block():
    names = [site.name for site in sd3_attention_sites(tiny_pipeline("sd35m").transformer)]
    assert [name.removeprefix("transformer_blocks.") for name in names] == [
        *("0.attn", "0.attn2", "1.attn", "1.attn2", "2.attn"),
    ]


@torch.no_grad()
def test_text_is_the_pipelines(sd3):
    context, null_context, pooled, null_pooled = sd3.pipeline().encode_prompt(CAPTIONS, None, None)
    text, null_text = sd3.encode_text(CAPTIONS), sd3.null_text(2)
    for own, theirs in (
        (text.context, context),
        (text.pooled, pooled),
        (null_text.context, null_context),
        (null_text.pooled, null_pooled),
    ):
        assert torch.equal(own, theirs)


@torch.no_grad()
@pytest.mark.parametrize("left_out", ["by the folder", "by the option"])
def test_without_t5_its_tokens_are_zeros_as_in_the_pipeline(left_out, tmp_path, caplog):
    pipeline = tiny_pipeline("sd3")
    if left_out == "by the folder":
        pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        base = StableDiffusion3.from_pretrained(str(tmp_path), dtype="float32", t5=left_out == "by the folder")
    assert ("has no third text encoder (T5)" in caplog.text) == (left_out == "by the folder")
    context, _, pooled, _ = base.pipeline().encode_prompt(CAPTIONS, None, None)
    text = base.encode_text(CAPTIONS)
    assert torch.equal(text.context, context)
    assert torch.equal(text.pooled, pooled)
    assert not text.context[:, 77:].any()


def test_length_of_t5_can_be_chosen(tmp_path):
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    assert (
        StableDiffusion3.from_pretrained(str(tmp_path), max_t5_tokens=64).encode_text([""]).context.shape[1] == 77 + 64
    )
    with pytest.raises(ConfigError, match=r"base\.max_t5_tokens must be between 1 and 512, got 513"):
        StableDiffusion3.from_pretrained(str(tmp_path), max_t5_tokens=513)


@pytest.mark.parametrize("shift_type", ["exponential", "linear"])
def test_shift_is_that_of_the_sampler(shift_type, sd3):
    """Training's timesteps are shifted as the pipeline's are, static or growing with the picture."""
    assert sd3.timestep_shift((64, 64)) == 3.0
    sd3.scheduler.register_to_config(use_dynamic_shifting=True, time_shift_type=shift_type)
    small, large = sd3.timestep_shift((32, 32)), sd3.timestep_shift((128, 128))
    if shift_type == "exponential":
        assert (small, large) == pytest.approx((math.exp(0.5), math.exp(1.15)))
    for size, shift in (((32, 32), small), ((128, 128), large)):
        u = torch.linspace(1.0, 1e-3, 5)
        torch.testing.assert_close(sd3.sampler(5, size).sigmas[:-1], shift * u / (1 + (shift - 1) * u))


def test_is_frozen_in_eval_mode_and_in_the_precision_asked_for(tiny_sd3):
    base = load_base(str(tiny_sd3), dtype="bfloat16", vae_dtype="float32")
    assert isinstance(base, StableDiffusion3)
    base.train()
    assert not any(m.training for m in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    for part in (base.transformer, base.text_encoder, base.text_encoder_2, base.text_encoder_3):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    adapter = adapter_for(base).attach(base.attention_sites())
    prediction = predict(base, make_tokens(adapter))
    assert prediction.dtype == torch.float32
    prediction.square().mean().backward()
    assert {(p.dtype, p.grad.dtype) for p in adapter.parameters()} == {(torch.float32, torch.float32)}
    assert base.size_multiple == 16
    assert base.null_image("penultimate") == base.null_image("pooled") == "zero_features"


@torch.no_grad()
def test_an_idle_adapter_keeps_the_base_bit_for_bit_and_leaves_no_trace(sd3):
    before, keys, processors = predict(sd3, None), list(sd3.state_dict()), sd3.transformer.attn_processors
    adapter = adapter_for(sd3).attach(sd3.attention_sites())
    tokens = make_tokens(adapter)
    assert torch.equal(predict(sd3, None), before)
    assert not torch.allclose(predict(sd3, tokens), before, rtol=1e-3)
    adapter.scale = 0.0
    assert torch.equal(predict(sd3, tokens), before)
    assert list(sd3.state_dict()) == keys, "the base must not own adapter weights"
    adapter.detach()
    assert all(a is b for a, b in zip(sd3.transformer.attn_processors.values(), processors.values(), strict=True))


@torch.no_grad()
def test_training_starts_near_the_base(sd3):
    """The latents' own values are part of the added attention, so this takes more than zero image values."""
    adapter = adapter_for(sd3).attach(sd3.attention_sites())
    before = predict(sd3, None)

    def change():
        return ((predict(sd3, make_tokens(adapter)) - before).norm() / before.norm()).item()

    start = change()
    assert 0.0 < start < 0.06
    for site in sd3.attention_sites():
        adapter.branch(site).norm_k.weight.fill_(1.0)
        adapter.branch(site).norm_ip_k.weight.fill_(1.0)
    assert change() > 2 * start, "zero values alone do not keep the base"


@torch.no_grad()
def test_at_the_start_attention_falls_to_the_image_tokens_at_full_size():
    """With the widths of 3.5 large and the latents of 1024 pixels, whose values are 1 here; those of tokens are 0."""
    torch.manual_seed(0)
    projector = TimeResampler(feature_dim=1152, context_dim=2432)
    branch = JointImageAttention(hidden_dim=128, context_dim=2432, time_dim=projector.time_dim, head_dim=64)
    branch.start_near_the_base()
    tokens = projector.tokens(torch.randn(1, 729, 1152), timesteps=torch.tensor([500.0]))
    query, key = torch.randn(2, 1, 2, 4096, 64)
    share = branch(query, key, torch.ones_like(key), tokens.states, tokens.time_embedding)
    assert share.mean() < 0.05


@torch.no_grad()
def test_attention_without_query_norms_is_kept_bit_for_bit():
    """SD 3 medium, unlike 3.5, does not normalise queries and keys."""
    attention = JointTransformerBlock(64, 4, 16, qk_norm=None).attn
    states, text = torch.randn(2, 9, 64), torch.randn(2, 5, 64)
    before = attention(states, text)
    projector = TimeResampler(feature_dim=8, context_dim=64, dim=64, heads=1)
    site = AttentionSite("attn", 0, 64, 64, attention, JointImageAttention)
    attention.set_processor(JointImageAttention.for_site(site, projector).processor(site))
    assert all(torch.equal(a, b) for a, b in zip(attention(states, text), before, strict=True))


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_every_weight_learns_and_checkpointing_changes_nothing(sd3, checkpointing):
    adapter = adapter_for(sd3).attach(sd3.attention_sites())

    def gradients():
        adapter.zero_grad()
        target = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
        (predict(sd3, make_tokens(adapter)) - target).square().mean().backward()
        return {name: p.grad.clone() for name, p in adapter.named_parameters()}

    plain = gradients()
    Acceleration(checkpointing=checkpointing).apply(sd3)
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name
        assert gradient.abs().max() > 0, name


def test_what_does_not_fit_is_refused(sd3, tiny_models, tiny_sd3, tmp_path):
    with pytest.raises(ConfigError, match="this is a StableDiffusionPipeline: choose base=sd15"):
        StableDiffusion3.from_pretrained(str(tiny_models[0]))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(ConfigError, match="cannot load this base"):
        StableDiffusion3.from_pretrained(str(tmp_path), t5=False)
    with pytest.raises(ConfigError, match=r"a LinearProjector gives others: choose adapter=sd3\."):
        IPAdapter(projector=LinearProjector(feature_dim=8, context_dim=64), sites=sd3.attention_sites())
    with pytest.raises(ConfigError, match=r"makes other tokens at each timestep: give it `timesteps=`"):
        adapter_for(sd3)(torch.randn(2, 16, 40))


def test_tokens_know_the_timestep(sd3):
    adapter = adapter_for(sd3)
    early, late = make_tokens(adapter, (900.0, 900.0)), make_tokens(adapter, (10.0, 10.0))
    assert isinstance(early, ImageTokens)
    assert early.states.shape == (2, 8, 64)
    assert not torch.allclose(early.time_embedding, late.time_embedding)
    assert not torch.allclose(early.states, late.states)


def test_pictures_larger_than_its_table_of_positions_are_refused_before_a_run(tiny_sd3, tmp_path, capfd):
    overrides = ["base=sd3", f"base.path={tiny_sd3}", "base.dtype=float32", "base.max_t5_tokens=32", "run.name=x"]
    overrides += [f"run.path={tmp_path / 'run'}", "data.shards=x", "trainer=cpu"]
    for options in (["data.resolution=272"], ["data.resolution=240", "data.bucket_step=16"]):
        assert main(["train", *overrides, *options]) == 2
        assert "and this base takes 256: set a lower one" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
