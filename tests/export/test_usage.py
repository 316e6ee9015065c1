"""The lines to paste run as they are, and give plain diffusers the tokens of the training graph."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from ipa_train.adapter import IPAdapter, LinearProjector, Resampler, TimeResampler
from ipa_train.bases import load_base
from ipa_train.bases.tiny import randomise, tiny_image_encoder, tiny_pipeline
from ipa_train.bases.tiny_encoders import tiny_dino, tiny_siglip
from ipa_train.conditioning import (
    CLIPImageEncoder,
    DinoImageEncoder,
    FaceImageEncoder,
    SiglipImageEncoder,
    StoredEmbeddings,
)
from ipa_train.errors import ExportError
from ipa_train.export import write_export
from ipa_train.export.layouts import to_interchange
from ipa_train.export.usage import paste_lines

NOTES = Path(__file__).parents[2] / "docs" / "encoders.md"
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def run_lines(tiny_models, tmp_path, monkeypatch):
    """A function that runs lines as a user would, in a folder with the files they name; returns what they defined."""
    Image.fromarray(PIXELS).save(tmp_path / "image_prompt.png")
    np.save(tmp_path / "embedding.npy", np.linspace(-1, 1, 8, dtype=np.float16))
    monkeypatch.chdir(tmp_path)

    def run(lines, folder=tiny_models[0]):
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.default_sample_size = 4
        pipe.set_progress_bar_config(disable=True)
        defined = {"pipe": pipe}
        exec(compile(lines, "paste_lines", "exec"), defined)
        assert isinstance(defined["image"], Image.Image)
        return defined

    return run


@pytest.fixture
def encoders(tmp_path):
    models = {"dino": tiny_dino("dinov2_with_registers"), "siglip": tiny_siglip(), "clip": tiny_image_encoder()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return {
        "dino": DinoImageEncoder.from_pretrained(str(tmp_path / "dino"), dtype="float32", image_size=48, layer=-3),
        "siglip": SiglipImageEncoder.from_pretrained(str(tmp_path / "siglip"), dtype="float32"),
        "stored": StoredEmbeddings(dim=8, name='o"clock', normalize=True),
        "face": FaceImageEncoder.from_pretrained(str(tmp_path / "clip"), dtype="float32", dim=8, normalize=True),
        "clip": CLIPImageEncoder.from_pretrained(str(tmp_path / "clip"), dtype="float32"),
    }


def make_adapter(base, projector, feature_dim):
    projector = projector(feature_dim=feature_dim, context_dim=base.context_dim)
    return randomise(IPAdapter(projector=projector, sites=base.attention_sites()), seed=5)


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("dino", LinearProjector),
        ("dino", Resampler),
        ("siglip", LinearProjector),
        ("siglip", Resampler),
        ("stored", LinearProjector),
    ],
)
@torch.no_grad()
def test_lines_give_the_tokens_of_training(name, projector, encoders, base, run_lines, tmp_path):
    encoder, kind = encoders[name], projector.feature_kinds[0]
    adapter = make_adapter(base, projector, encoder.feature_dim(kind))
    write_export(tmp_path, adapter, base.attention_sites())
    defined = run_lines(paste_lines(encoder.identity(), kind))

    stored = name == "stored"
    pixels = None if stored else torch.from_numpy(PIXELS).permute(2, 0, 1)[None]
    embeddings = torch.from_numpy(np.load("embedding.npy"))[None] if stored else None
    features = encoder.encode(pixels, kind, embeddings=embeddings)
    own = adapter(torch.cat([encoder.null_features(kind), features])).states
    (theirs,) = defined["pipe"].unet.encoder_hid_proj([defined["both"]])
    assert ((own - theirs[:, 0]).norm() / own.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("family", "name", "projector"),
    [("flux", "dino", LinearProjector), ("flux", "stored", LinearProjector), ("sd3", "dino", TimeResampler)],
)
@torch.no_grad()
def test_lines_for_transformers_give_what_training_gives_them(family, name, projector, encoders, run_lines, tmp_path):
    tiny_pipeline(family).save_pretrained(tmp_path / "base")
    base, encoder, kind = load_base(str(tmp_path / "base"), dtype="float32"), encoders[name], projector.feature_kinds[0]
    write_export(tmp_path, make_adapter(base, projector, encoder.feature_dim(kind)), base.attention_sites())
    defined = run_lines(paste_lines(encoder.identity(), kind, family=family), tmp_path / "base")

    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)[None]
    features = encoder.encode(pixels, kind, embeddings=torch.from_numpy(np.load("embedding.npy"))[None])
    null = encoder.null_features(kind, base.null_image(kind))
    wanted = base.image_arguments(defined["pipe"], [features], [null], guided=True)
    if family == "sd3":
        torch.testing.assert_close(defined["both"], wanted["ip_adapter_image_embeds"])
    else:
        torch.testing.assert_close(defined["features"], wanted["ip_adapter_image_embeds"][0])
        torch.testing.assert_close(defined["null"], wanted["negative_ip_adapter_image_embeds"][0])


@torch.no_grad()
def test_lines_for_a_face_set_what_it_looks_like_too(encoders, base, run_lines, tmp_path):
    face = encoders["face"]
    state = to_interchange(make_adapter(base, Resampler, face.feature_dim("penultimate")), base.attention_sites())
    del state["image_proj.latents"]
    state = {k.replace("image_proj.", "image_proj.perceiver_resampler."): v for k, v in state.items()}
    sizes = {"proj.0": (16, 8), "proj.2": (4 * 64, 16)}
    for layer, shape in sizes.items():
        state |= {f"image_proj.{layer}.weight": torch.randn(shape), f"image_proj.{layer}.bias": torch.randn(shape[0])}
    state |= {"image_proj.norm.weight": torch.ones(64), "image_proj.norm.bias": torch.zeros(64)}
    save_file(state, tmp_path / "ip_adapter.safetensors")

    projection = run_lines(paste_lines(face.identity(), "pooled"))["pipe"].unet.encoder_hid_proj
    looks = projection.image_projection_layers[0].clip_embeds
    pixels = torch.from_numpy(PIXELS).permute(2, 0, 1)[None]
    own = torch.cat([face.null_features("penultimate"), face.encode(pixels, "penultimate")])
    torch.testing.assert_close(looks[:, 0], own, rtol=1e-5, atol=1e-5)


def test_what_the_loader_holds_needs_no_lines_and_what_is_unknown_gets_none(encoders):
    assert paste_lines(encoders["clip"].identity(), "pooled") == ""
    assert paste_lines({"name": "of an older file", "weights_sha256": "0"}, "pooled") == ""
    with pytest.raises(
        ExportError, match=r"'DinoImageEncodr' is none of this version\. Did you mean 'DinoImageEncoder'"
    ):
        paste_lines(encoders["dino"].identity() | {"encoder": "DinoImageEncodr"}, "pooled")


def test_the_lines_in_the_notes_are_these(encoders):
    identity = encoders["dino"].identity() | {"name": "facebook/dinov2-large", "layer": -2, "image_size": 224}
    assert f"```python\n{paste_lines(identity, 'pooled')}```" in NOTES.read_text()
