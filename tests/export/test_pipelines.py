"""One exported file in every kind of pipeline, on another base, beside another adapter, in parts of base or picture."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DDIMScheduler,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image

from ipa_train.adapter import ImageTokens, IPAdapter, blocks
from ipa_train.bases import Base, load_base
from ipa_train.bases.tiny import randomise, save_tiny_models
from ipa_train.conditioning import CLIPImageEncoder
from ipa_train.export import write_export
from tests.export.conftest import random_adapter
from tests.export.parity import (
    SIZE,
    embeds_of,
    load_in_diffusers,
    picture,
    predictions,
    relative_error,
    tokens_of,
)

PIXELS, IMAGE = picture(1)
SCENE = picture(4)[1].resize(SIZE)
LEFT_HALF = Image.new("L", SIZE, 0)
LEFT_HALF.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))


@dataclass
class Rig:
    """A training graph, its exported file in a pipeline, and the same pipeline without an adapter."""

    models: Any
    base: Base
    image_encoder: CLIPImageEncoder
    adapter: IPAdapter
    folder: Any
    loaded: Any
    plain: Any
    tokens: ImageTokens = field(init=False)

    def __post_init__(self):
        self.adapter.attach(self.base.attention_sites())
        with torch.no_grad():
            self.tokens = tokens_of(self.adapter, self.image_encoder, PIXELS)

    @property
    def training_graph(self):
        """As keyword arguments of a pipeline's call: the very tokens and processors of training."""
        return {"cross_attention_kwargs": {"ip_hidden_states": self.tokens.states}}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def rig(request, models_of, tmp_path_factory):
    models, folder = models_of[request.param], tmp_path_factory.mktemp("adapter")
    base = load_base(str(models[0]), dtype="float32")
    image_encoder = CLIPImageEncoder.from_pretrained(str(models[1]), dtype="float32")
    adapter = random_adapter(base, image_encoder, "linear")
    write_export(folder, adapter, base.attention_sites())
    return Rig(
        models, base, image_encoder, adapter, folder, load_in_diffusers(models, folder), load_in_diffusers(models)
    )


@pytest.fixture(autouse=True)
def scales_of_one(rig):
    rig.adapter.scale = 1.0
    rig.loaded.set_ip_adapter_scale(1.0)


def text2img(pipe, rig):
    return AutoPipelineForText2Image.from_pipe(pipe), {"height": SIZE[0], "width": SIZE[1]}


def img2img(pipe, rig):
    return AutoPipelineForImage2Image.from_pipe(pipe), {"image": SCENE, "strength": 0.7}


def inpaint(pipe, rig):
    return AutoPipelineForInpainting.from_pipe(pipe), {"image": SCENE, "mask_image": LEFT_HALF, "strength": 1.0}


def controlnet(pipe, rig):
    net = ControlNetModel.from_unet(rig.plain.unet, conditioning_embedding_out_channels=(8, 16, 16, 16))
    return AutoPipelineForText2Image.from_pipe(pipe, controlnet=randomise(net, seed=3)), {"image": SCENE}


def draw(rig, task, pipe, **options):
    pipe, task_options = task(pipe, rig)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **task_options,
        **options,
    ).images
    return torch.from_numpy(images)


@pytest.mark.parametrize("task", [text2img, img2img, inpaint, controlnet])
def test_every_kind_of_pipeline_draws_what_the_training_graph_draws_in_it(rig, task):
    with_image = draw(rig, task, rig.loaded, ip_adapter_image=IMAGE)
    assert relative_error(draw(rig, task, rig.base.pipeline(), **rig.training_graph), with_image) < 1e-5
    without = draw(rig, task, rig.plain)
    assert relative_error(with_image, without) > 1e-3
    rig.loaded.set_ip_adapter_scale(0.0)
    assert torch.equal(draw(rig, task, rig.loaded, ip_adapter_image=IMAGE), without)


@torch.no_grad()
def test_a_second_base_with_other_weights(rig, tmp_path):
    """The paper's custom models: the same architecture, trained further by others."""
    models = save_tiny_models(tmp_path, rig.models[0].name, seed=99)
    other, pipe = load_base(str(models[0]), dtype="float32"), load_in_diffusers((models[0], rig.models[1]), rig.folder)
    rig.adapter.detach().attach(other.attention_sites())
    own, theirs = predictions(other, rig.tokens, pipe, embeds_of(pipe, IMAGE))
    rig.adapter.detach().attach(rig.base.attention_sites())
    assert relative_error(own, theirs) < 1e-5
    assert relative_error(own, predictions(rig.base, rig.tokens, rig.loaded, embeds_of(rig.loaded, IMAGE))[0]) > 0.1


@torch.no_grad()
def test_two_adapters_at_once(rig, tmp_path):
    plus = random_adapter(rig.base, rig.image_encoder, "plus")
    write_export(tmp_path, plus, rig.base.attention_sites())
    pipe = load_in_diffusers(rig.models, rig.folder, tmp_path)
    embeds = embeds_of(pipe, IMAGE, IMAGE)
    pipe.set_ip_adapter_scale([1.0, 0.0])
    _, alone = predictions(rig.base, rig.tokens, rig.loaded, embeds_of(rig.loaded, IMAGE))
    own, first_of_two = predictions(rig.base, rig.tokens, pipe, embeds)
    assert torch.equal(first_of_two, alone)
    assert relative_error(own, first_of_two) < 1e-5
    pipe.set_ip_adapter_scale([1.0, 0.5])
    plus_tokens, text = tokens_of(plus, rig.image_encoder, PIXELS), torch.randn(2, 7, rig.base.context_dim)
    both_tokens = pipe.unet.encoder_hid_proj(embeds)
    for site in rig.base.attention_sites():
        states = torch.randn(2, 6, site.module.to_q.in_features)
        text_alone, first = site.module(states, text), site.module(states, text, ip_hidden_states=rig.tokens.states)
        second = plus.branch(site).processor(site)(site.module, states, text, ip_hidden_states=plus_tokens.states)
        both = pipe.unet.get_submodule(site.name)(states, (text, both_tokens))
        assert relative_error(first + 0.5 * (second - text_alone), both) < 1e-5


@pytest.mark.parametrize("part", [blocks.style, blocks.layout])
@torch.no_grad()
def test_scales_by_block(rig, part):
    theirs = {
        ("sd15", blocks.style): {"up": {"block_1": 0.7}},
        ("sd15", blocks.layout): {"down": {"block_2": 0.7}, "mid": 0.7},
        ("sdxl", blocks.style): {"up": {"block_0": [0.0, 0.7, 0.0]}},
        ("sdxl", blocks.layout): {"down": {"block_2": [0.0, 0.7]}},
    }
    embeds = embeds_of(rig.loaded, IMAGE)
    everywhere, _ = predictions(rig.base, rig.tokens, rig.loaded, embeds)
    rig.adapter.scales = part(rig.base.attention_sites(), 0.7)
    rig.loaded.set_ip_adapter_scale(theirs[rig.models[0].name, part])
    own, other = predictions(rig.base, rig.tokens, rig.loaded, embeds)
    assert relative_error(own, other) < 1e-5
    assert relative_error(own, everywhere) > 1e-3
    assert relative_error(own, predictions(rig.base, None, rig.loaded, embeds)[0]) > 1e-3


@torch.no_grad()
def test_several_image_prompts_are_tokens_in_a_row(rig):
    other_pixels, other_image = picture(2)
    tokens = [rig.tokens, tokens_of(rig.adapter, rig.image_encoder, other_pixels)]
    row = ImageTokens(torch.cat([part.states for part in tokens], dim=1))
    own, theirs = predictions(rig.base, row, rig.loaded, embeds_of(rig.loaded, [IMAGE, other_image]))
    assert relative_error(own, theirs) < 1e-5
    assert relative_error(own, predictions(rig.base, rig.tokens, rig.loaded, embeds_of(rig.loaded, IMAGE))[0]) > 1e-3


def test_an_image_prompt_for_a_region(rig):
    def masked(mask):
        masks = IPAdapterMaskProcessor().preprocess([mask], height=SIZE[0], width=SIZE[1])
        return draw(
            rig, text2img, rig.loaded, ip_adapter_image=IMAGE, cross_attention_kwargs={"ip_adapter_masks": [masks]}
        )

    without, everywhere = draw(rig, text2img, rig.plain), draw(rig, text2img, rig.loaded, ip_adapter_image=IMAGE)
    assert torch.equal(masked(Image.new("L", SIZE, 0)), without)
    assert torch.equal(masked(Image.new("L", SIZE, 255)), everywhere)
    half = masked(LEFT_HALF)
    assert relative_error(half, without) > 1e-3
    assert relative_error(half, everywhere) > 1e-3
