"""Loading, and the same forward as diffusers' own pipeline parts."""

import json
import shutil

import pytest
import torch

from ipa_train.bases import StableDiffusion
from ipa_train.errors import ConfigError


def test_epsilon_and_v_prediction_come_from_the_folder(base, tiny_sd21):
    assert base.prediction_type == "epsilon"
    assert StableDiffusion.from_pretrained(str(tiny_sd21[0])).prediction_type == "v_prediction"


def test_is_frozen_in_eval_mode_and_in_the_precision_asked_for(tiny_models):
    base = StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="bfloat16", vae_dtype="float32")
    base.train()
    assert not any(m.training for m in base.modules())
    assert not any(p.requires_grad for p in base.parameters())
    assert {p.dtype for p in base.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pictures_are_rounded_once(tiny_models, dtype):
    """To the precision of the VAE, after they are brought to -1..1."""
    vae = StableDiffusion.load_vae(str(tiny_models[0]), dtype=dtype)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    seen = []
    vae.model.encoder.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.encode(pixels)
    assert torch.equal(seen[0], (pixels.double() / 127.5 - 1).to(vae.dtype))


def test_latents_are_scaled_and_text_is_padded(base):
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    posterior = base.vae.encode(pixels)
    raw = base.vae.model.encode(pixels.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(posterior.mean, raw.mean * base.vae.model.config.scaling_factor)
    assert base.encode_text(["", "a house"]).context.shape == (2, 77, 64)


def test_wrong_folders_are_refused(tiny_models, tmp_path):
    with pytest.raises(ConfigError, match=r"no model_index\.json there; give the folder of a diffusers pipeline"):
        StableDiffusion.from_pretrained(str(tmp_path))
    shutil.copy(tiny_models[0] / "model_index.json", tmp_path)
    with pytest.raises(ConfigError, match="cannot load this base"):
        StableDiffusion.from_pretrained(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ConfigError, match="this is a FluxPipeline: choose base=flux"):
        StableDiffusion.from_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"dtype='float23' is not a precision\. Did you mean 'float32'"):
        StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="float23")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"prediction_type": "sample"}, "its scheduler predicts sample; known are epsilon and v_prediction"),
        ({"_class_name": "EDMEulerScheduler", "beta_start": None}, "its scheduler is a EDMEulerScheduler"),
    ],
)
def test_noise_of_another_kind_is_refused(changed, complaint, tiny_models, tmp_path):
    """Not taken for v-prediction, nor for a schedule of DDIM's own defaults."""
    folder = shutil.copytree(tiny_models[0], tmp_path / "base")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(ConfigError, match=complaint):
        StableDiffusion.from_pretrained(str(folder))


def test_an_unreachable_hub_id_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="neither a local folder nor a hub id that can be reached") as error:
        StableDiffusion.from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)
