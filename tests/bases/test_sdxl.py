"""Loading, what the UNet is told beside the caption, and which VAE in which precision."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel

from ipa_train.bases import MicroConditioning, StableDiffusion, StableDiffusionXL
from ipa_train.bases.families import load_base
from ipa_train.bases.tiny import tiny_vae
from ipa_train.errors import ConfigError


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl):
    return StableDiffusionXL.from_pretrained(str(tiny_sdxl[0]), dtype="float32")


def same_texts(ours, context, pooled):
    return torch.equal(ours.context, context) and torch.equal(ours.pooled, pooled)


@torch.no_grad()
def test_text_is_that_of_the_pipeline(sdxl):
    context, null_context, pooled, null_pooled = sdxl.pipeline().encode_prompt(["a house", "b"])
    assert same_texts(sdxl.encode_text(["a house", "b"]), context, pooled)
    assert same_texts(sdxl.null_text(2), null_context, null_pooled)
    assert not null_context.any()
    assert sdxl.encode_text([""]).context.any(), "text dropped in training is the empty caption, not zeros"


@torch.no_grad()
def test_a_folder_may_want_the_empty_caption_to_be_guided_away_from(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl[0], tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    base = StableDiffusionXL.from_pretrained(str(folder), dtype="float32")
    _, null_context, _, null_pooled = base.pipeline().encode_prompt(["a house"])
    assert same_texts(base.null_text(1), null_context, null_pooled)
    assert null_context.any()


@torch.no_grad()
def test_the_unet_is_told_the_size_and_crop(sdxl):
    noisy, timesteps, text = torch.randn(2, 4, 8, 12), torch.tensor([500, 500]), sdxl.encode_text(["a", "b"])
    micro = MicroConditioning(*(torch.tensor(x) for x in ([[70, 96], [64, 98]], [[3, 0], [0, 1]], [[64, 96]] * 2)))
    time_ids = torch.tensor([[70, 96, 3, 0, 64, 96], [64, 98, 0, 1, 64, 96]])
    conditions = {"text_embeds": text.pooled, "time_ids": time_ids}
    theirs = sdxl.unet(noisy, timesteps, text.context, added_cond_kwargs=conditions).sample
    torch.testing.assert_close(sdxl.predict(noisy, timesteps, text, None, micro), theirs)
    untold = sdxl.predict(noisy, timesteps, text, None)
    assert not torch.allclose(untold, theirs, rtol=0.01)
    uncropped = MicroConditioning.uncropped((64, 96), 2, torch.device("cpu"))
    assert torch.equal(untold, sdxl.predict(noisy, timesteps, text, None, uncropped))


def test_is_frozen_in_eval_mode_and_the_vae_in_fp32(tiny_sdxl):
    base = StableDiffusionXL.from_pretrained(str(tiny_sdxl[0]), dtype="bfloat16")
    base.train()
    assert not any(m.training for m in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    for part in (base.unet, base.text_encoder, base.text_encoder_2):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe("a", height=64, width=64, num_inference_steps=1).images) == 1
    assert base.vae.dtype == torch.float32, "the pipeline's precision is its own"


def test_another_vae_runs_in_the_precision_of_the_unet(tiny_sdxl, tmp_path):
    tiny_vae(seed=5).save_pretrained(tmp_path / "vae")
    options = {"path": str(tiny_sdxl[0]), "vae_path": str(tmp_path / "vae"), "dtype": "bfloat16"}
    vae = StableDiffusionXL.load_vae(**options)
    assert vae.dtype == torch.bfloat16
    assert StableDiffusionXL.load_vae(**options, vae_dtype="float16").dtype == torch.float16
    assert vae.identity() == StableDiffusionXL.from_pretrained(**options).vae.identity()
    assert vae.identity() != StableDiffusionXL.load_vae(str(tiny_sdxl[0])).identity()
    with pytest.raises(ConfigError, match=r"base\.vae_path=.*nothing: no such folder"):
        StableDiffusionXL.load_vae(**{**options, "vae_path": str(tmp_path / "nothing")})
    other = tiny_vae(seed=5)
    other.register_to_config(scaling_factor=0.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"base\.vae_path=.*other: its scaling_factor is 0\.5, and that of the base"):
        StableDiffusionXL.load_vae(**{**options, "vae_path": str(tmp_path / "other")})


def test_sampling_follows_the_noise_schedule_without_clipping(sdxl):
    """The folder's own sampler is Euler, whose config says nothing of clipping; DDIM clips unless told."""
    sampler = sdxl.sampler(4, (8, 8))
    assert not sampler.config.clip_sample
    assert torch.equal(sampler.alphas_cumprod, sdxl.schedule.alphas_cumprod)
    assert len(sampler.timesteps) == 4


def test_folders_of_other_families_are_refused_both_ways(tiny_sdxl, tiny_models):
    with pytest.raises(ConfigError, match=r"this is a StableDiffusionXLPipeline: choose base=sdxl"):
        StableDiffusion.from_pretrained(str(tiny_sdxl[0]))
    with pytest.raises(ConfigError, match=r"this is a StableDiffusionPipeline: choose base=sd15"):
        StableDiffusionXL.from_pretrained(str(tiny_models[0]))
    assert isinstance(load_base(str(tiny_sdxl[0])), StableDiffusionXL)


def test_other_pipelines_of_the_family_hold_the_same_models(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl[0], tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    for load in (StableDiffusionXL.from_pretrained, load_base):
        assert isinstance(load(str(folder)), StableDiffusionXL)


def test_a_unet_for_inpainting_is_refused(tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl[0], tmp_path / "sdxl")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    UNet2DConditionModel.from_config({**unet.config, "in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match="its UNet takes 9 channels, not the 4 of noisy latents alone"):
        StableDiffusionXL.from_pretrained(str(folder))
