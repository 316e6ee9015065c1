"""Every family of image encoders: read as its own processor and model are, frozen, and refused in one line."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ipa_train.bases.tiny import tiny_image_encoder
from ipa_train.bases.tiny_encoders import tiny_dino, tiny_siglip, tiny_siglip2
from ipa_train.conditioning import (
    CLIPImageEncoder,
    DinoImageEncoder,
    FaceImageEncoder,
    SiglipImageEncoder,
    StoredEmbeddings,
)
from ipa_train.errors import ConfigError

CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}


def dino_processor():
    return BitImageProcessorPil(**CROP, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)


# Of each family: our class, a tiny model, and the processor that its published models come with.
FAMILIES = {
    "clip": (CLIPImageEncoder, tiny_image_encoder, lambda: CLIPImageProcessorPil(**CROP)),
    "siglip": (SiglipImageEncoder, tiny_siglip, lambda: SiglipImageProcessorPil(**SQUARE)),
    "siglip2": (SiglipImageEncoder, tiny_siglip2, lambda: Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)),
    **{
        name: (DinoImageEncoder, lambda name=name: tiny_dino(name), dino_processor)
        for name in ("dinov2", "dinov2_with_registers", "dinov3_vit")
    },
}
NUM_STATES = {"clip": 17, "siglip": 16, "siglip2": 16, "dinov2": 17, "dinov2_with_registers": 21, "dinov3_vit": 21}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    for name, (_, model, _) in FAMILIES.items():
        model().save_pretrained(folder / name)
    return folder


@pytest.fixture
def load(folders):
    def make(family, **options):
        kind = FAMILIES[family][0]
        sizes = {"image_size": 32} if kind is DinoImageEncoder else {}
        return kind.from_pretrained(str(folders / family), **{"dtype": "float32"} | sizes | options)

    return make


def picture(height=32, width=32):
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear")
    return smooth.round().to(torch.uint8)


def as_pil(pixels):
    return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def pooled_of(output):
    return output.image_embeds if "image_embeds" in output else output.pooler_output


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_the_familys_own_processor_and_model(family, load):
    _, make_model, processor = FAMILIES[family]
    encoder, model = load(family), make_model()
    into_last_layer = []
    layers = [m for m in model.modules() if type(m).__name__.endswith(("EncoderLayer", "Layer"))]
    layers[-1].register_forward_pre_hook(lambda _, args: into_last_layer.append(args[0]))
    output = model(**processor()(as_pil(picture()), return_tensors="pt"))
    pooled, hidden = (encoder.encode(picture(), kind) for kind in ("pooled", "penultimate"))
    torch.testing.assert_close(pooled, pooled_of(output), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, into_last_layer[0], rtol=1e-5, atol=1e-5)
    assert pooled.shape == (1, encoder.feature_dim("pooled"))
    assert hidden.shape == (1, NUM_STATES[family], encoder.feature_dim("penultimate"))


@pytest.mark.parametrize("kind", ["pooled", "penultimate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_is_zeros_mean_grey_or_black(family, kind, load):
    encoder = load(family)
    features = encoder.encode(picture(), kind)
    zero, grey, black = (encoder.null_features(kind, null) for null in ("zero_features", "zero_pixels", "black_image"))
    assert torch.equal(zero, torch.zeros_like(features))
    assert torch.equal(black, encoder.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), kind))
    mean = encoder.encode((encoder.mean * 255).round().to(torch.uint8).expand(1, 3, 32, 32), kind)
    assert relative_error(grey, mean) < 0.2 * relative_error(grey, black)
    assert torch.equal(encoder.null_features(kind), zero if kind == "pooled" else grey)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_frozen_stays_in_eval_mode_and_its_identity_is_plain(family, load):
    encoder = load(family).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    identity = encoder.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["name"], identity["image_size"], identity["layer"]) == (family, 32, -2)
    assert load(family, dtype="bfloat16").identity() == identity


def test_only_what_diffusers_loaders_can_hold_says_so(load):
    loaders = {family: load(family).identity()["diffusers_loader"] for family in FAMILIES}
    assert loaders == {family: [] for family in FAMILIES} | {"clip": ["unet", "flux"], "siglip": ["sd3"]}
    assert load("siglip", layer=-1).identity()["diffusers_loader"] == []


@pytest.mark.parametrize("family", ["siglip", "siglip2", "dinov2", "dinov3_vit"])
def test_another_layer_may_be_read(family, load):
    first, penultimate = load(family, layer=-4), load(family)
    assert first.identity()["layer"] == -4
    assert not torch.allclose(*(e.encode(picture(), "penultimate") for e in (first, penultimate)))
    assert torch.equal(*(e.encode(picture(), "pooled") for e in (first, penultimate)))
    for layer in (0, -5):
        with pytest.raises(ConfigError, match=rf"image_encoder\.layer must be from -1, .* to -4.*got {layer}"):
            load(family, layer=layer)


def test_dino_sees_pictures_of_any_whole_number_of_patches(load):
    assert load("dinov2", image_size=48).encode(picture(), "penultimate").shape == (1, 37, 40)
    with pytest.raises(ConfigError, match=r"image_encoder\.image_size=50 must be a multiple of 8"):
        load("dinov2", image_size=50)


def test_a_siglip_without_head_has_no_pooled_features(tmp_path):
    tiny_siglip(head=False).save_pretrained(tmp_path)
    encoder = SiglipImageEncoder.from_pretrained(str(tmp_path), dtype="float32")
    assert encoder.encode(picture(), "penultimate").shape == (1, 16, 40)
    for ask in (encoder.feature_dim, encoder.null_features, lambda kind: encoder.encode(picture(), kind)):
        with pytest.raises(ConfigError, match="no pooling head, so it gives no pooled features"):
            ask("pooled")


def test_the_image_half_of_a_whole_model_will_do(load, folders, tmp_path):
    vision = load("siglip")
    text = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    config = SiglipConfig(vision_config=vision.model.config.to_dict(), text_config=text)
    whole = SiglipModel(config)
    whole.vision_model.load_state_dict(vision.model.state_dict())
    whole.save_pretrained(tmp_path)
    found = SiglipImageEncoder.from_pretrained(str(tmp_path), dtype="float32").identity()
    assert found["weights_sha256"] == vision.identity()["weights_sha256"]


@torch.no_grad()
def test_in_sd3_clips_processor_crops_as_training_does_and_siglips_squashes(load):
    """What docs/encoders.md tells users of SD 3 to put into the pipeline, on a picture that is not square."""
    encoder, pixels = load("siglip"), picture(48, 80)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    own = encoder.encode(pixels, "penultimate")

    def error(processor):
        inputs = processor(as_pil(pixels), return_tensors="pt").pixel_values
        theirs = encoder.model(inputs, output_hidden_states=True).hidden_states[-2]
        return relative_error(own, theirs)

    assert error(CLIPImageProcessorPil(**CROP, **half)) < 0.01
    assert error(SiglipImageProcessorPil(**SQUARE)) > 0.05


@pytest.mark.parametrize(
    ("encoder", "family", "message"),
    [
        (
            CLIPImageEncoder,
            "siglip",
            "a 'siglip_vision_model' model; choose image_encoder=siglip_so400m for it",
        ),
        (CLIPImageEncoder, "dinov3_vit", "a 'dinov3_vit' model; choose image_encoder=dinov3_large"),
        (SiglipImageEncoder, "clip", "a 'clip_vision_model' model; choose image_encoder=vit_h"),
        (DinoImageEncoder, "siglip2", "a 'siglip2_vision_model' model; choose image_encoder=siglip2_so400m"),
    ],
)
def test_a_model_of_another_family_is_refused(encoder, family, message, folders):
    refused(encoder, folders / family, message)


@pytest.mark.parametrize("encoder", [CLIPImageEncoder, SiglipImageEncoder, DinoImageEncoder])
def test_what_is_no_whole_model_is_refused(encoder, folders, tmp_path):
    family = next(name for name, (kind, *_) in FAMILIES.items() if kind is encoder)
    refused(encoder, tmp_path, "cannot load an image encoder: .* Give a folder that holds config.json")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders / family / name).read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(encoder, tmp_path, "cannot load an image encoder")
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    refused(encoder, tmp_path, r"\d+ weights are missing, e\.g\. ")


def refused(encoder, folder, message):
    with pytest.raises(ConfigError, match=message) as error:
        encoder.from_pretrained(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_stored_embeddings_are_passed_on():
    embeddings = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float16)
    assert StoredEmbeddings(dim=2).encode(None, "pooled", embeddings=embeddings).tolist() == embeddings.tolist()
    unit = StoredEmbeddings(dim=2, normalize=True).encode(None, "pooled", embeddings=embeddings)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    sequence = StoredEmbeddings(dim=2, num_tokens=3, name="palette")
    assert sequence.embedding_shape == (3, 2)
    assert sequence.null_features("penultimate", "black_image").tolist() == torch.zeros(1, 3, 2).tolist()
    with pytest.raises(ConfigError, match=r"'palette' is a sequence of width 2, and this adapter reads one vector"):
        sequence.feature_dim("pooled")
    with pytest.raises(ConfigError, match=r"'palette' must have shape \(3, 2\) in every sample .*got \(2,\)"):
        sequence.encode(None, "penultimate", embeddings=embeddings)
    with pytest.raises(ConfigError, match="got none"):
        sequence.encode(None, "penultimate")
    with pytest.raises(ConfigError, match=r"image_encoder\.dim must be at least 1, got 0"):
        StoredEmbeddings(dim=0)
    with pytest.raises(ConfigError, match=r"image_encoder\.name is empty"):
        StoredEmbeddings(name="")


def test_a_face_is_who_it_is_and_what_it_looks_like(load, folders):
    face = FaceImageEncoder.from_pretrained(str(folders / "clip"), dtype="float32", dim=8, normalize=True).train()
    clip, embeddings = load("clip"), torch.full((1, 8), 5.0)
    assert (face.image_size, face.embedding_shape, face.training, face.clip.training) == (32, (8,), False, False)
    assert (face.feature_dim("pooled"), face.feature_dim("penultimate")) == (8, 40)
    torch.testing.assert_close(face.encode(picture(), "pooled", embeddings=embeddings).norm(), torch.tensor(1.0))
    assert torch.equal(face.encode(picture(), "penultimate"), clip.encode(picture(), "penultimate"))
    assert torch.equal(face.null_features("penultimate"), clip.null_features("penultimate"))
    assert not face.null_features("pooled").any()
    with pytest.raises(ConfigError, match="looks at pictures, and none are given"):
        face.encode(None, "penultimate", embeddings=embeddings)
