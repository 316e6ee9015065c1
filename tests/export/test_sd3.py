"""SD 3 adapters: the exported file, loaded by plain diffusers, is the adapter that was trained."""

import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from ipa_train.adapter import ImageTokens, IPAdapter, TimeResampler
from ipa_train.bases import StableDiffusion3
from ipa_train.bases.tiny import randomise, tiny_pipeline
from ipa_train.eval.generate import generate
from ipa_train.export import write_export


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """Folder of a tiny SigLIP vision encoder, with the preprocessor file that this loader reads."""
    folder = tmp_path_factory.mktemp("siglip")
    config = SiglipVisionConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    randomise(SiglipVisionModel(config), seed=11).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def sd3(tiny_sd3):
    return StableDiffusion3.from_pretrained(str(tiny_sd3), dtype="float32")


@pytest.fixture
def adapter(sd3):
    torch.manual_seed(0)
    projector = TimeResampler(feature_dim=40, context_dim=sd3.context_dim, num_tokens=5, dim=128, heads=2)
    return randomise(IPAdapter(projector=projector, sites=sd3.attention_sites()), seed=5)


def load_in_diffusers(base, adapter_folder, encoder, weight_name="ip_adapter.safetensors", **options):
    pipe = StableDiffusion3Pipeline.from_pretrained(base)
    pipe.load_ip_adapter(
        str(adapter_folder), weight_name=weight_name, subfolder="", image_encoder_folder=str(encoder), **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture():
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(pixels.numpy())


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("weight_name", "strict"),
    [("ip_adapter.safetensors", True), ("ip_adapter.safetensors", False), ("ip_adapter.bin", True)],
)
@torch.no_grad()
def test_tokens_and_denoiser_equal_the_training_graph(weight_name, strict, sd3, adapter, tiny_sd3, siglip, tmp_path):
    write_export(tmp_path, adapter, sd3.attention_sites())
    pipe = load_in_diffusers(tiny_sd3, tmp_path, siglip, weight_name, low_cpu_mem_usage=not strict)
    adapter.attach(sd3.attention_sites())
    embeds = pipe.prepare_ip_adapter_image_embeds(picture(), None, "cpu", 1, do_classifier_free_guidance=True)
    features = embeds[1:]
    null_features = torch.zeros_like(features)  # what base.null_image says
    timesteps = torch.tensor([700.25, 700.25])

    states, time_embedding = pipe.transformer.image_proj(embeds, timesteps)
    own = ImageTokens.cat([adapter(f, timesteps=timesteps[:1]) for f in (null_features, features)])
    for half in (0, 1):
        assert relative_error(own.states[half], states[half]) < 1e-5
    assert relative_error(own.time_embedding, time_embedding) < 1e-5

    noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    text = sd3.encode_text(["", "a house"])
    theirs = pipe.transformer(
        noisy,
        text.context,
        text.pooled,
        timesteps,
        joint_attention_kwargs={"ip_adapter_image_embeds": embeds},
    ).sample
    prediction, without = sd3.predict(noisy, timesteps, text, own), sd3.predict(noisy, timesteps, text, None)
    for half in (0, 1):
        assert relative_error(prediction[half], theirs[half]) < 1e-5
        assert relative_error(without[half], theirs[half]) > 1e-2


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_pictures_during_training_are_those_of_the_export(dynamic, sd3, adapter, tiny_sd3, siglip, tmp_path):
    """At the scale that is trained, which is the one that diffusers sets: nobody has to know it."""
    write_export(tmp_path, adapter, sd3.attention_sites())
    pipe = load_in_diffusers(tiny_sd3, tmp_path, siglip)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=dynamic)
    sd3.scheduler = pipe.scheduler
    adapter.attach(sd3.attention_sites())
    features = pipe.encode_image(picture(), "cpu")
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    nothing = torch.zeros_like(features)
    (own,) = generate(sd3, adapter, [features], [nothing], ["a cat"], size=(64, 96), seed=7, **options)
    theirs = pipe(
        "a cat",
        ip_adapter_image=picture(),
        height=64,
        width=96,
        generator=torch.Generator().manual_seed(7),
        **options,
    ).images[0]
    a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (own, theirs))
    assert (a - b).abs().max() <= 1


@torch.no_grad()
def test_works_with_another_base_and_in_the_other_pipelines(sd3, adapter, siglip, tmp_path):
    """A community model, picture to picture, inpainting and ControlNet; at scale 0 each is the base bit for bit."""
    write_export(tmp_path, adapter, sd3.attention_sites())
    family = "sd35m" if sd3.transformer.config.dual_attention_layers else "sd3"
    pipe = tiny_pipeline(family, seed=99)
    parts = pipe.components
    controlnet = randomise(
        SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_extra_conditioning_channels=0), seed=3
    )
    blue, mask = Image.new("RGB", (64, 64), "blue"), Image.new("L", (64, 64), 255)
    pipelines = [
        (StableDiffusion3Pipeline(**parts), {}),
        (StableDiffusion3Img2ImgPipeline(**parts), {"image": blue, "strength": 1.0}),
        (StableDiffusion3InpaintPipeline(**parts), {"image": blue, "mask_image": mask, "strength": 1.0}),
        (StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet), {"control_image": blue}),
    ]
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    for pipeline, more in pipelines:
        pipeline.set_progress_bar_config(disable=True)

        def draw(pipeline=pipeline, more=more, **image):
            torch.manual_seed(0)  # the ControlNet pipeline draws the control image's latents without its generator
            return pipeline("a cat", generator=torch.Generator().manual_seed(0), **options, **more, **image).images

        without = draw()
        pipeline.load_ip_adapter(
            str(tmp_path), weight_name="ip_adapter.safetensors", subfolder="", image_encoder_folder=str(siglip)
        )
        assert (draw(ip_adapter_image=picture()) != without).any()
        pipeline.set_ip_adapter_scale(0.0)
        assert (draw(ip_adapter_image=picture()) == without).all()
        pipeline.unload_ip_adapter()
