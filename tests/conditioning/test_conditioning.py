"""Drop rates, and "no image" as diffusers has it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from ipa_train.conditioning import CLIPImageEncoder
from ipa_train.conditioning.dropout import ConditionDropout
from ipa_train.errors import ConfigError
from ipa_train.runtime.seeding import Draws


def test_drop_rates_over_100k_draws():
    dropped = ConditionDropout().draw(Draws(0, torch.arange(100_000)))
    both = dropped.text & dropped.image
    for mask, rate in ((both, 0.05), (dropped.text & ~both, 0.05), (dropped.image & ~both, 0.05)):
        assert mask.float().mean() == pytest.approx(rate, abs=0.003)


def test_dropped_conditions_are_replaced():
    dropped = ConditionDropout(text_rate=0.0, image_rate=0.0, both_rate=1.0).draw(Draws(0, torch.arange(2)))
    assert dropped.captions(["a", "b"]) == ["", ""]
    null = torch.full((1, 3), 7.0), torch.full((1, 4, 5), 8.0)
    pooled, states = dropped.image_features([torch.zeros(2, 3), torch.zeros(2, 4, 5)], null)
    assert torch.equal(pooled, null[0].expand(2, 3))
    assert torch.equal(states, null[1].expand(2, 4, 5))


def test_rates_must_make_sense():
    with pytest.raises(ConfigError, match=r"dropout\.text_rate must be between 0 and 1, got 2"):
        ConditionDropout(text_rate=2.0)
    with pytest.raises(ConfigError, match="add up to at most 1"):
        ConditionDropout(text_rate=0.5, image_rate=0.4, both_rate=0.2)


@pytest.mark.parametrize("kind", ["pooled", "penultimate"])
def test_features_and_no_image_equal_the_pipelines(tiny_models, image_encoder, kind):
    """encode_image of a real pipeline, on a picture already of the encoder's size (so that no resize is involved)."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny_models[0], safety_checker=None)
    from transformers import CLIPImageProcessorPil

    pipe.image_encoder = image_encoder.model
    pipe.feature_extractor = CLIPImageProcessorPil.from_pretrained(tiny_models[1])
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    features, null = pipe.encode_image(image, "cpu", 1, output_hidden_states=kind == "penultimate")
    torch.testing.assert_close(image_encoder.encode(pixels, kind), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image_encoder.null_features(kind), null, rtol=1e-5, atol=1e-5)


def test_a_wrong_encoder_folder_is_refused(tiny_models, tmp_path):
    with pytest.raises(ConfigError, match=r"image_encoder\.path=.*text_encoder.*'clip_text_model'"):
        CLIPImageEncoder.from_pretrained(str(tiny_models[0] / "text_encoder"))
    with pytest.raises(ConfigError, match=r"image_encoder\.path=.*cannot load an image encoder"):
        CLIPImageEncoder.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_encoder_is_the_same_in_any_precision_of_file_and_use(dtype, tiny_models, image_encoder, tmp_path):
    name, model = tiny_models[1].name, CLIPVisionModelWithProjection.from_pretrained(tiny_models[1])
    model.half().save_pretrained(tmp_path / name)
    for folder in (tiny_models[1], tmp_path / name):
        encoder = CLIPImageEncoder.from_pretrained(str(folder), dtype=dtype)
        assert encoder.model.dtype == getattr(torch, dtype)
        assert encoder.identity() == image_encoder.identity()
    with torch.no_grad():
        model.float().visual_projection.weight[0, 0] += 0.01
    model.save_pretrained(tmp_path / "other")
    other = CLIPImageEncoder.from_pretrained(str(tmp_path / "other"), dtype=dtype)
    assert other.identity()["weights_sha256"] != image_encoder.identity()["weights_sha256"]
