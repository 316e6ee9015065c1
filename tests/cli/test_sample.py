"""`ipa sample` with adapters of every family: pictures, embeddings, several image prompts, masks."""

import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ipa_train.adapter import FacePlusProjector, FaceProjector, IPAdapter, LinearProjector, TimeResampler
from ipa_train.bases import adapter_sites, load_base
from ipa_train.bases.tiny import randomise, save_tiny_models
from ipa_train.bases.tiny_encoders import tiny_dino, tiny_siglip
from ipa_train.cli.main import main
from ipa_train.conditioning import CLIPImageEncoder, DinoImageEncoder, StoredEmbeddings
from ipa_train.eval.generate import generate
from ipa_train.export import write_export


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny bases and encoders, and the files a user has: two pictures, two masks, two embeddings."""
    root = tmp_path_factory.mktemp("sample")
    for family in ("sd15", "sd21", "sdxl", "sd3", "flux"):
        save_tiny_models(root, family)
    tiny_siglip().save_pretrained(root / "siglip")
    tiny_dino().save_pretrained(root / "dino")
    for name, colour in (("red", "red"), ("blue", "blue"), ("black", "black"), ("white", "white")):
        Image.new("RGB", (64, 64), colour).save(root / f"{name}.png")
    for i in range(2):
        np.save(root / f"{i}.npy", np.linspace(-1, 1 + i, 8, dtype=np.float16))
    return root


@pytest.fixture
def sample(folders, tmp_path):
    """A function from an adapter's projector, and the words of a command, to the pictures drawn."""

    def draw(
        family, projector, *words, encoder="image_encoder", metadata=None, lora_rank=0, out="out", size="32", **sizes
    ):
        base = load_base(str(folders / family), dtype="float32")
        sites = adapter_sites(base, lora_rank=lora_rank)
        torch.manual_seed(0)
        adapter = randomise(IPAdapter(projector=projector(context_dim=base.context_dim, **sizes), sites=sites), seed=5)
        file = write_export(tmp_path / "adapter", adapter, sites, metadata=metadata or {})[0]
        command = ["sample", "--adapter", file, "--base", folders / family, "--image-encoder", folders / encoder]
        command += ["--steps", "1", "--num", "1", "--out", tmp_path / out]
        command += [*(["--size", size] if size else []), *words]
        status = main([str(word) for word in command])
        return {} if status else {path.name: np.array(Image.open(path)) for path in (tmp_path / out).glob("?-*.png")}

    return draw


def differ(a, b):
    return max(int(np.abs(a[name].astype(int) - b[name].astype(int)).max()) for name in a.keys() & b.keys()) > 1


@pytest.mark.parametrize(
    ("family", "projector", "sizes", "encoder"),
    [
        ("sd15", LinearProjector, {"feature_dim": 24}, "image_encoder"),
        ("sdxl", LinearProjector, {"feature_dim": 24}, "image_encoder"),
        ("sd3", TimeResampler, {"feature_dim": 40, "dim": 64, "heads": 1, "num_tokens": 4}, "siglip"),
        ("flux", LinearProjector, {"feature_dim": 24}, "image_encoder"),
    ],
)
def test_every_family_follows_the_image_prompt(family, projector, sizes, encoder, sample, folders):
    images = ["--image", folders / "red.png", folders / "blue.png"]
    drawn = sample(family, projector, *images, encoder=encoder, **sizes)
    assert drawn.keys() == {"0-red-0.png", "1-blue-0.png"}
    assert (drawn["0-red-0.png"] != drawn["1-blue-0.png"]).any()
    off = sample(family, projector, *images, "--scale", "0", encoder=encoder, out="off", **sizes)
    assert (off["0-red-0.png"] == off["1-blue-0.png"]).all(), "scale 0 is the base model"


def test_an_adapter_that_was_trained_from_noise_alone_begins_there(sample, folders):
    words, sizes = ["--image", folders / "red.png"], {"feature_dim": 24}
    plain = sample("sd21", LinearProjector, *words, **sizes)
    objective = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    rescaled = sample("sd21", LinearProjector, *words, metadata={"objective": objective}, out="rescaled", **sizes)
    assert differ(plain, rescaled)


def test_several_image_prompts_together_and_each_in_its_part(sample, folders):
    images = ["--image", folders / "red.png", folders / "blue.png", "--together"]
    adapter = ("sd15", LinearProjector)
    both = sample(*adapter, *images, feature_dim=24)
    assert both.keys() == {"0-red-0.png"}
    one = sample(*adapter, "--image", folders / "red.png", out="one", feature_dim=24)
    assert differ(both, one)
    none = sample(*adapter, *images, "--mask", folders / "black.png", folders / "black.png", out="none", feature_dim=24)
    off = sample(*adapter, *images, "--scale", "0", out="off", feature_dim=24)
    assert not differ(none, off)
    red = sample(*adapter, *images, "--mask", folders / "white.png", folders / "black.png", out="red", feature_dim=24)
    assert not differ(red, one)


def test_masks_of_another_shape_than_the_picture_cover_the_same_part(sample, folders):
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    words = ["--image", folders / "red.png", folders / "blue.png", "--together", "--mask"]
    drawn = []
    for width in (64, 160):
        masks = [folders / f"half{width}.png", folders / f"other{width}.png"]
        half.resize((width, 64)).save(masks[0])
        ImageOps.invert(half).resize((width, 64)).save(masks[1])
        drawn.append(sample("sd15", LinearProjector, *words, *masks, out=f"{width}", size=None, feature_dim=24))
    assert not differ(*drawn)
    assert differ(drawn[0], sample("sd15", LinearProjector, *words[:-1], out="none", size=None, feature_dim=24))


def test_without_a_negative_prompt_pictures_are_guided_as_in_training(sample, folders, capfd):
    """SDXL takes zeros for no text, which are not the states of the empty caption."""
    words = ["sdxl", LinearProjector, "--image", folders / "red.png"]
    (drawn,) = sample(*words, "--steps", "2", feature_dim=24).values()
    assert differ({"": drawn}, {"": sample(*words, "--negative-prompt", "", out="b", feature_dim=24)["0-red-0.png"]})

    base = load_base(str(folders / "sdxl"), dtype="float32")
    adapter = randomise(
        IPAdapter(projector=LinearProjector(feature_dim=24, context_dim=80), sites=base.attention_sites()), seed=5
    )
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 64, 64)
    features = CLIPImageEncoder.from_pretrained(str(folders / "image_encoder"), dtype="float32").encode(red, "pooled")
    adapter.attach(base.attention_sites())
    options = {"size": (32, 32), "num_inference_steps": 2, "guidance_scale": 5.0}
    (own,) = generate(base, adapter, [features], [torch.zeros(1, 24)], [""], **options)
    assert not differ({"": np.array(own)}, {"": drawn})


def test_no_advice_of_diffusers_reaches_the_user(sample, folders, caplog):
    diffusers = logging.getLogger("diffusers")  # passes nothing on to the root logger, where caplog listens
    diffusers.addHandler(caplog.handler)
    try:
        sample("sd15", FaceProjector, "--embedding", folders / "0.npy", lora_rank=4, feature_dim=8)
    finally:
        diffusers.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_flux_is_guided_away_from_no_text(sample, folders, capfd):
    words = ["--image", folders / "red.png", "--negative-prompt", "ugly"]
    assert sample("flux", LinearProjector, *words, feature_dim=24) == {}
    assert "--negative-prompt: the pipeline of" in capfd.readouterr().err


def test_embeddings_take_the_place_of_pictures(sample, folders):
    account = StoredEmbeddings(dim=8, normalize=True).identity()
    words = ["--embedding", folders / "0.npy", folders / "1.npy"]
    for lora_rank in (0, 4):
        drawn = sample(
            "sd15", FaceProjector, *words, metadata={"image_encoder": account}, lora_rank=lora_rank, feature_dim=8
        )
        assert drawn.keys() == {"0-0-0.png", "1-1-0.png"}
        assert (drawn["0-0-0.png"] != drawn["1-1-0.png"]).any()


@pytest.mark.parametrize(("projector", "sizes"), [(FaceProjector, {}), (FacePlusProjector, {"hidden_dim": 40})])
def test_a_face_adapter_that_reads_pictures_alone(projector, sizes, sample, folders):
    clip = CLIPImageEncoder.from_pretrained(str(folders / "image_encoder"), dtype="float32")
    words = ["--image", folders / "red.png"]
    drawn = sample("sd15", projector, *words, metadata={"image_encoder": clip.identity()}, feature_dim=24, **sizes)
    assert drawn.keys() == {"0-red-0.png"}


def test_both_versions_of_faceid_plus(sample, folders):
    words = ["--embedding", folders / "0.npy", "--image", folders / "red.png"]
    sizes = {"feature_dim": 8, "hidden_dim": 40, "lora_rank": 4}
    several = sample("sdxl", FacePlusProjector, *words, "--num", "2", metadata={"shortcut": False}, out="two", **sizes)
    assert several.keys() == {"0-red-0.png", "0-red-1.png"}
    first = sample("sdxl", FacePlusProjector, *words, metadata={"shortcut": False}, **sizes)
    assert not differ(first, several)
    second = sample("sdxl", FacePlusProjector, *words, metadata={"shortcut": True}, out="v2", **sizes)
    assert differ(first, second)


def test_an_encoder_that_no_loader_holds(sample, folders):
    encoder = DinoImageEncoder.from_pretrained(str(folders / "dino"), dtype="float32", image_size=32, layer=-3)
    metadata = {"image_encoder": encoder.identity()}
    words = ["--image", folders / "red.png"]
    assert len(sample("sd15", LinearProjector, *words, encoder="dino", metadata=metadata, feature_dim=40)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "red.png", "--embedding", "0.npy"], "this adapter has no use for --embedding"),
        (["--embedding", "0.npy"], "this adapter needs --image"),
        ([], "give --image, or --embedding"),
        (["--image", "red.png", "blue.png", "--together", "--mask", "black.png"], "got 2 --image, 1 --mask"),
        (["--image", "red.png", "--mask", "black.png"], "add --together"),
        (["--image", "red.png", "--embedding", "red.png"], "--embedding .*red.png: no embedding that can be read"),
        (["--image", "red.png", "--size", "36"], "--size 36 must be a multiple of 8"),
        (["--image", "red.png", "--steps", "1001"], "--steps 1001 must be from 1 to 1000"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, sample, folders, capfd):
    words = [folders / word if "." in word else word for word in words]
    assert sample("sd15", LinearProjector, *words, feature_dim=24) == {}
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ipa sample: ")]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("account", "same"), [({}, True), ({"image_encoder": StoredEmbeddings(dim=8, normalize=False).identity()}, False)]
)
def test_faces_are_of_unit_length_unless_the_file_says_otherwise(account, same, sample, folders, tmp_path):
    np.save(tmp_path / "0.npy", 3 * np.load(folders / "0.npy"))
    sizes = {"metadata": account, "feature_dim": 8}
    one = sample("sd15", FaceProjector, "--embedding", folders / "0.npy", **sizes)
    three = sample("sd15", FaceProjector, "--embedding", tmp_path / "0.npy", out="three", **sizes)
    assert differ(one, three) != same


def test_an_embedding_that_is_not_finite_is_refused(sample, folders, tmp_path, capfd):
    np.save(tmp_path / "nan.npy", np.full(8, np.nan, np.float32))
    assert sample("sd15", FaceProjector, "--embedding", tmp_path / "nan.npy", feature_dim=8) == {}
    assert "nan.npy: no embedding that can be read: its embedding is not finite" in capfd.readouterr().err


@pytest.mark.parametrize(
    "account",
    [
        "clip",
        {"name": "x", "weights_sha256": "0", "encoder": "DinoImageEncoder", "diffusers_loader": []},
        {"name": "x", "embedding": "face", "diffusers_loader": 5},
        StoredEmbeddings(dim=8).identity() | {"encoder": "Foo"},
        StoredEmbeddings(dim=8).identity() | {"embedding": {"name": "x", "shape": "8", "normalize": False}},
    ],
)
def test_what_others_write_into_their_metadata_ends_in_no_traceback(account, sample, folders, tmp_path):
    metadata = {"image_encoder": account, "shortcut": "yes", "objective": "[1"}
    words = ["--embedding", folders / "0.npy", "--image", folders / "red.png"]
    sample("sd15", FacePlusProjector, *words, metadata=metadata, lora_rank=4, feature_dim=8, hidden_dim=40)
    sample("sd15", LinearProjector, "--image", folders / "red.png", metadata=metadata, feature_dim=24)
    file = str(tmp_path / "adapter" / "ip_adapter.safetensors")
    assert main(["import", file]) == 0
    assert main(["export", file, "--out", str(tmp_path / "exported")]) in (0, 2)


def test_an_embedding_that_would_be_unpickled_is_refused(sample, folders, tmp_path, capfd):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert sample("sd15", FaceProjector, "--embedding", tmp_path / "objects.npy", feature_dim=8) == {}
    assert "no embedding that can be read" in capfd.readouterr().err


def test_sd3_takes_one_image_prompt_and_no_masks(sample, folders, capfd):
    sizes = {"feature_dim": 40, "dim": 64, "heads": 1, "num_tokens": 4, "encoder": "siglip"}
    images = ["--image", folders / "red.png", folders / "blue.png", "--together"]
    assert sample("sd3", TimeResampler, *images, **sizes) == {}
    assert "takes one image prompt at a time, got 2" in capfd.readouterr().err
