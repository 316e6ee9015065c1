"""An exported face adapter in plain diffusers: projector, image attention, and the LoRA as peft's ``faceid_0``."""

import pytest
import torch
from diffusers import DiffusionPipeline

from ipa_train.adapter import FacePlusProjector, FaceProjector, ImageTokens, IPAdapter
from ipa_train.bases import adapter_sites, load_base
from ipa_train.bases.tiny import randomise
from ipa_train.eval.generate import generate
from ipa_train.export import read_adapter_file, to_interchange, write_export
from tests.export.parity import predictions, relative_error

FACE_DIM, HIDDEN_DIM = 20, 40
PLUS = {"feature_dim": FACE_DIM, "hidden_dim": HIDDEN_DIM}
VARIANTS = {
    "faceid": (FaceProjector, {"feature_dim": FACE_DIM}, 8),
    "faceid_portrait": (FaceProjector, {"feature_dim": FACE_DIM, "num_tokens": 16}, 0),
    "faceid_plus": (FacePlusProjector, PLUS, 8),
    "faceid_plus_v2": (FacePlusProjector, {**PLUS, "shortcut": True}, 8),
}


def exported(variant, base, folder):
    """A random adapter and its sites; its file lies in ``folder``."""
    projector, sizes, lora_rank = VARIANTS[variant]
    sites = adapter_sites(base, lora_rank=lora_rank)
    adapter = IPAdapter(projector=projector(**sizes, context_dim=base.context_dim), sites=sites)
    for name, weight in randomise(adapter, seed=5).named_parameters():
        if name.endswith("_lora.up.weight"):  # of the size that training gives it, so that the picture stays one
            weight.data.mul_(0.3)
    write_export(folder, adapter, sites)
    return adapter, sites


def features(adapter):
    """Null and image features of each kind that the projector reads, each of one picture."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"pooled": (1, FACE_DIM), "penultimate": (1, 17, HIDDEN_DIM)}
    image = [torch.randn(shapes[kind], generator=generator) for kind in adapter.projector.feature_kinds]
    null = [torch.zeros_like(x) if x.ndim == 2 else 0.1 * x.flip(-1) for x in image]
    return null, image


def load_in_diffusers(model, folder, variant, null, image):
    """A pipeline with the adapter, told what files do not say; and the embeddings that it takes."""
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    embeds = [torch.stack(pair) for pair in zip(null, image, strict=True)]
    if len(embeds) == 2:
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds = embeds[1]
        projection.shortcut = variant == "faceid_plus_v2"
    return pipe, embeds[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("models", ["tiny_models", "tiny_sd21", "tiny_sdxl"])
@torch.no_grad()
def test_tokens_and_denoiser_equal_the_training_graph(models, variant, request, tmp_path):
    model = request.getfixturevalue(models)[0]
    base = load_base(str(model), dtype="float32")
    adapter, sites = exported(variant, base, tmp_path)
    null, image = features(adapter)
    pipe, embeds = load_in_diffusers(model, tmp_path, variant, null, image)
    lora_rank = VARIANTS[variant][2]
    assert getattr(pipe.unet, "peft_config", {}).keys() == ({"faceid_0"} if lora_rank else set())

    both = ImageTokens.cat([adapter(*null), adapter(*image)])
    (tokens,) = pipe.unet.encoder_hid_proj([embeds])
    for own, theirs in zip(both.states, tokens.flatten(1, 2), strict=True):
        assert relative_error(own, theirs) < 1e-5

    adapter.attach(sites)
    for scale in (1.0, 0.4):
        adapter.scale = scale
        pipe.set_ip_adapter_scale(scale)
        own, theirs = predictions(base, both, pipe, [embeds])
        for half, their_half in zip(own, theirs, strict=True):
            assert relative_error(half, their_half) < 1e-5
    if lora_rank:
        pipe.set_adapters("faceid_0", 0.0)
        _, without = predictions(base, both, pipe, [embeds])
        assert relative_error(without, theirs) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_pictures_during_training_are_those_of_the_export(variant, base, tiny_models, tmp_path):
    adapter, sites = exported(variant, base, tmp_path)
    null, image = features(adapter)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    adapter.attach(sites)
    (own,) = generate(base, adapter, image, null, ["a cat"], size=(64, 64), seed=7, **options)
    pipe, embeds = load_in_diffusers(tiny_models[0], tmp_path, variant, null, image)
    theirs = pipe(
        "a cat",
        ip_adapter_image_embeds=[embeds],
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(7),
        **options,
    ).images[0]
    a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (own, theirs))
    assert (a - b).abs().max() <= 1


def test_a_file_has_the_released_names_and_reads_back(base, tmp_path):
    adapter, sites = exported("faceid_plus", base, tmp_path)
    for name in ("ip_adapter.safetensors", "ip_adapter.bin"):
        state, _ = read_adapter_file(tmp_path / name)
        assert all(torch.equal(state[name], weight) for name, weight in to_interchange(adapter, sites).items())
    layers = {f"to_{layer}_lora.{part}.weight" for layer in ("q", "k", "v", "out") for part in ("down", "up")}
    wanted = {f"ip_adapter.{n}.{layer}" for n in range(32) for layer in layers}
    wanted |= {f"ip_adapter.{n}.to_{x}_ip.weight" for n in range(1, 32, 2) for x in "kv"}
    assert {name for name in state if name.startswith("ip_adapter.")} == wanted
    resampler = {f"image_proj.perceiver_resampler.{name}.weight" for name in ("proj_in", "proj_out", "norm_out")}
    assert resampler | {"image_proj.proj.0.weight", "image_proj.proj.2.bias", "image_proj.norm.weight"} < state.keys()
