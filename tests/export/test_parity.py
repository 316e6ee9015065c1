"""The exported file, loaded by plain diffusers, is the adapter that was trained."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ipa_train.adapter import ImageTokens
from ipa_train.bases import StableDiffusion
from ipa_train.bases.tiny import tiny_pipeline
from ipa_train.eval.generate import generate
from ipa_train.export import write_export

VARIANTS = ["linear", "plus", "full"]


def load_in_diffusers(models, folder, **options):
    pipe = StableDiffusionPipeline.from_pretrained(models[0], safety_checker=None)
    pipe.load_ip_adapter(
        str(folder), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=str(models[1]), **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["sd15", "sd21"])
@torch.no_grad()
def test_tokens_and_denoiser_equal_the_training_graph(
    family, variant, strict, tiny_models, tiny_sd21, image_encoder, make_adapter, tmp_path
):
    models = tiny_models if family == "sd15" else tiny_sd21
    base = StableDiffusion.from_pretrained(str(models[0]), dtype="float32")
    adapter = make_adapter(variant, for_base=base)
    write_export(tmp_path, adapter, base.attention_sites())
    pipe = load_in_diffusers(models, tmp_path, low_cpu_mem_usage=not strict)

    kind = adapter.projector.feature_kinds[0]
    image = picture(1)
    pil = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    (embeds,) = pipe.prepare_ip_adapter_image_embeds([pil], None, "cpu", 1, do_classifier_free_guidance=True)
    (tokens,) = pipe.unet.encoder_hid_proj([embeds])
    null_tokens, image_tokens = tokens[:, 0]
    own_tokens = adapter(image_encoder.encode(image, kind))
    assert relative_error(own_tokens.states[0], image_tokens) < 1e-5
    assert relative_error(adapter(image_encoder.null_features(kind)).states[0], null_tokens) < 1e-5

    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    timesteps, text = torch.tensor([700, 700]), base.encode_text(["a", "a house"])
    both = ImageTokens.cat([adapter(image_encoder.null_features(kind)), own_tokens])
    adapter.attach(base.attention_sites())
    own = base.predict(noisy, timesteps, text, both)
    conditions = {"image_embeds": [embeds]}
    theirs = pipe.unet(noisy, timesteps, text.context, added_cond_kwargs=conditions).sample
    assert relative_error(own, theirs) < 1e-5
    assert relative_error(base.predict(noisy, timesteps, text, None), theirs) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pictures_during_training_are_those_of_the_export(
    variant, base, tiny_models, image_encoder, make_adapter, tmp_path
):
    adapter = make_adapter(variant)
    write_export(tmp_path, adapter, base.attention_sites())
    adapter.attach(base.attention_sites())
    image = picture(3)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    kind = adapter.projector.feature_kinds[0]
    features, null_features = image_encoder.encode(image, kind), image_encoder.null_features(kind)
    (own,) = generate(base, adapter, [features], [null_features], ["a cat"], size=(64, 64), seed=7, **options)
    theirs = load_in_diffusers(tiny_models, tmp_path)(
        "a cat",
        ip_adapter_image=Image.fromarray(image[0].permute(1, 2, 0).numpy()),
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(7),
        **options,
    ).images[0]
    pixels = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (own, theirs))
    a, b = pixels
    assert (a - b).abs().max() <= 1


def test_scale_zero_is_the_base_pipeline_bit_for_bit(base, tiny_models, make_adapter, tmp_path):
    write_export(tmp_path, make_adapter("linear"), base.attention_sites())
    pipe = load_in_diffusers(tiny_models, tmp_path)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}

    def draw(pipeline, **more):
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **options, **more).images

    image = Image.new("RGB", (32, 32), "red")
    with_image = draw(pipe, ip_adapter_image=image)
    pipe.set_ip_adapter_scale(0.0)
    without = StableDiffusionPipeline.from_pretrained(tiny_models[0], safety_checker=None)
    without.set_progress_bar_config(disable=True)
    assert (draw(pipe, ip_adapter_image=image) == draw(without)).all()
    assert (with_image != draw(without)).any()


def test_loads_onto_another_base_of_the_same_family(base, tiny_models, make_adapter, tmp_path):
    """A community model: the same architecture with other weights."""
    write_export(tmp_path, make_adapter("plus"), base.attention_sites())
    pipe = tiny_pipeline("sd15", seed=99)
    pipe.load_ip_adapter(
        str(tmp_path), subfolder="", weight_name="ip_adapter.bin", image_encoder_folder=str(tiny_models[1])
    )
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (32, 32), "red")
    pictures = pipe("a cat", ip_adapter_image=image, height=64, width=64, num_inference_steps=2).images
    assert len(pictures) == 1
