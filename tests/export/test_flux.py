"""The exported file, loaded by diffusers' Flux pipelines in either layout, is the adapter that was trained."""

import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from ipa_train.adapter import ImageTokens, IPAdapter, LinearProjector
from ipa_train.bases import Flux
from ipa_train.bases.flux import flux_attention_sites
from ipa_train.bases.tiny import randomise, tiny_pipeline
from ipa_train.errors import ExportError
from ipa_train.eval.generate import generate, to_pil
from ipa_train.export import to_interchange, write_export
from ipa_train.export.file import nested
from ipa_train.export.xlabs import from_xlabs, is_xlabs, to_xlabs
from tests.eval.test_generate import difference
from tests.export.conftest import random_adapter
from tests.export.parity import picture, relative_error

RED = Image.new("RGB", (32, 32), "red")


@pytest.fixture
def exported(flux, image_encoder, tmp_path):
    """A function from a layout to the path of the file of a random adapter in it."""

    def write(layout="interchange", seed=5):
        adapter = randomise(random_adapter(flux, image_encoder, "linear"), seed=seed)
        path = write_export(tmp_path / f"{layout}{seed}", adapter, flux.attention_sites())[0]
        if layout == "xlabs":
            save_file(to_xlabs(load_file(path)), path)
        return path.with_suffix(".bin") if layout == "bin" else path

    return write


def load(pipe, files, encoder):
    """Let the pipeline load adapters by its own means."""
    pipe.load_ip_adapter(
        [str(file.parent) for file in files],
        weight_name=[file.name for file in files],
        image_encoder_pretrained_model_name_or_path=str(encoder),
        image_encoder_dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    defaults = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 32, "output_type": "np"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **defaults | options).images


@pytest.mark.parametrize("layout", ["interchange", "bin", "xlabs"])
@torch.no_grad()
def test_tokens_and_denoiser_equal_the_training_graph(layout, flux, tiny_flux, image_encoder, exported):
    adapter = random_adapter(flux, image_encoder, "linear")
    pipe = load(FluxPipeline.from_pretrained(tiny_flux[0]), [exported(layout)], tiny_flux[1])

    images = [picture(1)[0], torch.zeros(1, 3, 32, 32, dtype=torch.uint8)]
    embeds = [pipe.prepare_ip_adapter_image_embeds(to_pil(image), None, "cpu", 1)[0] for image in images]
    theirs = [pipe.transformer.encoder_hid_proj([x])[0][:, 0] for x in embeds]
    null = image_encoder.null_features("pooled", flux.null_image("pooled"))
    own = [adapter(image_encoder.encode(images[0], "pooled")), adapter(null)]
    for a, b in zip(own, theirs, strict=True):
        assert relative_error(a.states, b) < 1e-5

    noisy, text = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(2)), ["a house", ""]
    prompt, pooled, text_ids = pipe.encode_prompt(text, max_sequence_length=32)
    velocity = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, 2, 16, 8, 12),
        timestep=torch.tensor([0.7, 0.7]),
        guidance=torch.ones(2),
        pooled_projections=pooled,
        encoder_hidden_states=prompt,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
        joint_attention_kwargs={"ip_adapter_image_embeds": [torch.cat(embeds)]},
    ).sample
    velocity = pipe._unpack_latents(velocity, 64, 96, 8)
    adapter.attach(flux.attention_sites())
    conditions = torch.tensor([700.0, 700.0]), flux.encode_text(text)
    for a, b in zip(flux.predict(noisy, *conditions, ImageTokens.cat(own)), velocity, strict=True):
        assert relative_error(a, b) < 1e-5
    assert relative_error(flux.predict(noisy, *conditions, None), velocity) > 1e-2


@torch.no_grad()
def test_sixteen_tokens_as_in_xlabs_second_version():
    """Loaders tell them from 4 by the real width of the tokens alone."""
    transformer = tiny_pipeline("flux").transformer
    transformer = FluxTransformer2DModel.from_config({**transformer.config, "joint_attention_dim": 4096})
    randomise(transformer, seed=0)
    sites = flux_attention_sites(transformer)
    projector = LinearProjector(feature_dim=24, context_dim=4096, num_tokens=16)
    adapter = randomise(IPAdapter(projector=projector, sites=sites), seed=5)
    generator = torch.Generator().manual_seed(0)
    features, patches, text = (torch.randn(s, generator=generator) for s in ((1, 24), (1, 24, 64), (1, 8, 4096)))
    inputs = {
        "hidden_states": patches,
        "encoder_hidden_states": text,
        "pooled_projections": torch.zeros(1, 32),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(24, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    adapter.attach(sites)
    own = transformer(**inputs, joint_attention_kwargs={"ip_hidden_states": adapter(features).states}).sample
    adapter.detach()
    transformer._load_ip_adapter_weights(nested(to_interchange(adapter, sites)))
    theirs = transformer(**inputs, joint_attention_kwargs={"ip_adapter_image_embeds": [features[:, None]]}).sample
    assert relative_error(own, theirs) < 1e-5


@pytest.mark.parametrize(("guidance", "guidance_scale"), [(None, 1.0), (3.5, 1.0), (None, 4.0)])
@torch.no_grad()
def test_pictures_during_training_are_those_of_the_export(guidance, guidance_scale, tiny_flux, image_encoder, exported):
    base = Flux.from_pretrained(str(tiny_flux[0]), dtype="float32", max_t5_tokens=32, guidance=guidance)
    adapter = random_adapter(base, image_encoder, "linear").attach(base.attention_sites())
    features = image_encoder.encode(picture(3)[0], "pooled")
    null = image_encoder.null_features("pooled", base.null_image("pooled"))
    (own,) = generate(
        base,
        adapter,
        [features],
        [null],
        ["a cat"],
        size=(64, 96),
        num_inference_steps=3,
        guidance_scale=guidance_scale,
    )
    adapter.detach()
    pipe = load(base.pipeline(), [exported()], tiny_flux[1])
    options = {"true_cfg_scale": guidance_scale, "negative_prompt": ""} if guidance_scale > 1 else {}
    options |= {"width": 96, "num_inference_steps": 3, "guidance_scale": base.guidance, "output_type": "pil"}
    (theirs,) = draw(pipe, ip_adapter_image=picture(3)[1], **options)
    assert difference(own, theirs) <= 1


def test_two_adapters_at_once_and_one_block_at_a_time(tiny_flux, exported):
    files = [exported(), exported(seed=6)]
    one, both, base = (FluxPipeline.from_pretrained(tiny_flux[0]) for _ in range(3))
    load(both, files, tiny_flux[1])
    base.set_progress_bar_config(disable=True)
    for scales, file in (([1.0, 0.0], files[0]), ([0.0, 1.0], files[1])):
        both.set_ip_adapter_scale(scales)
        single = draw(load(one, [file], tiny_flux[1]), ip_adapter_image=RED)
        assert (draw(both, ip_adapter_image=[RED, RED]) == single).all()
    with_both_blocks = single
    one.set_ip_adapter_scale([1.0, 0.0])
    with_one_block = draw(one, ip_adapter_image=RED)
    one.set_ip_adapter_scale(0.0)
    without = draw(one, ip_adapter_image=RED)
    assert (without == draw(base)).all()
    assert (with_one_block != without).any()
    assert (with_one_block != with_both_blocks).any()


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own ControlNet uses it
def test_works_with_another_base_and_in_the_other_pipelines(tiny_flux, exported):
    """A community model, picture to picture, inpainting and ControlNet."""
    pipe = tiny_pipeline("flux", seed=99)
    parts = pipe.components
    config = {k: v for k, v in pipe.transformer.config.items() if k not in ("patch_size", "out_channels")}
    controlnet = randomise(FluxControlNetModel.from_config({**config, "num_layers": 1, "num_single_layers": 1}), seed=3)
    blue, mask = Image.new("RGB", (64, 64), "blue"), Image.new("L", (64, 64), 255)
    pipelines = [
        (FluxPipeline(**parts), {}),
        (FluxImg2ImgPipeline(**parts), {"image": blue, "strength": 1.0}),
        (FluxInpaintPipeline(**parts), {"image": blue, "mask_image": mask, "strength": 1.0}),
        (FluxControlNetPipeline(**parts, controlnet=controlnet), {"control_image": blue}),
    ]
    for pipeline, options in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        without = draw(pipeline, **options)
        load(pipeline, [exported("bin")], tiny_flux[1])
        assert (draw(pipeline, ip_adapter_image=RED, **options) != without).any()
        pipeline.set_ip_adapter_scale(0.0)
        assert (draw(pipeline, ip_adapter_image=RED, **options) == without).all()
        pipeline.unload_ip_adapter()


def test_xlabs_names_and_back_are_the_same_file(exported):
    ours = load_file(exported())
    theirs = to_xlabs(ours)
    assert {"ip_adapter_proj_model.norm.bias", "double_blocks.1.processor.ip_adapter_double_stream_v_proj.bias"} <= set(
        theirs
    )
    assert (is_xlabs(theirs), is_xlabs(ours)) == (True, False)
    back = from_xlabs(theirs)
    assert back.keys() == ours.keys()
    assert all(back[name] is weight for name, weight in ours.items())


@pytest.mark.parametrize("variant", ["linear", "plus"])
def test_what_xlabs_layout_has_no_place_for_is_refused(variant, base, make_adapter):
    state = to_interchange(make_adapter(variant), base.attention_sites())
    with pytest.raises(ExportError, match=r"^(image_proj|ip_adapter)\.\S+ has no (place in|bias beside it, as) XLabs'"):
        to_xlabs(state)
    with pytest.raises(ExportError, match="has no place in XLabs' layout"):
        from_xlabs(state)
