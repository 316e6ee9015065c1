"""`ipa sample` with adapters of every family: pictures, embeddings, several image prompts, masks."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ipa_train.adapter import FacePlusProjector, FaceProjector, IPAdapter, LinearProjector, TimeResampler
from ipa_train.bases import adapter_sites, load_base
from ipa_train.bases.tiny import randomise, save_tiny_models
from ipa_train.bases.tiny_encoders import tiny_dino, tiny_siglip
from ipa_train.cli.main import main
from ipa_train.conditioning import DinoImageEncoder
from ipa_train.export import write_export


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny bases and encoders, and the files a user has: two pictures, two masks, two embeddings."""
    root = tmp_path_factory.mktemp("sample")
    for family in ("sd15", "sdxl", "sd3", "flux"):
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

    def draw(family, projector, *words, encoder="image_encoder", metadata=None, lora_rank=0, out="out", **sizes):
        base = load_base(str(folders / family), dtype="float32")
        sites = adapter_sites(base, lora_rank=lora_rank)
        torch.manual_seed(0)
        adapter = randomise(IPAdapter(projector=projector(context_dim=base.context_dim, **sizes), sites=sites), seed=5)
        file = write_export(tmp_path / "adapter", adapter, sites, metadata=metadata or {})[0]
        command = ["sample", "--adapter", file, "--base", folders / family, "--image-encoder", folders / encoder]
        command += ["--steps", "1", "--size", "32", "--num", "1", "--out", tmp_path / out, *words]
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


def test_embeddings_take_the_place_of_pictures(sample, folders):
    account = {"name": "arcface", "encoder": "StoredEmbeddings", "weights_sha256": None}
    account |= {"embedding": {"name": "arcface", "shape": [8], "normalize": True}, "diffusers_loader": []}
    words = ["--embedding", folders / "0.npy", folders / "1.npy"]
    for lora_rank in (0, 4):
        drawn = sample(
            "sd15", FaceProjector, *words, metadata={"image_encoder": account}, lora_rank=lora_rank, feature_dim=8
        )
        assert drawn.keys() == {"0-0-0.png", "1-1-0.png"}
        assert (drawn["0-0-0.png"] != drawn["1-1-0.png"]).any()


def test_both_versions_of_faceid_plus(sample, folders):
    words = ["--embedding", folders / "0.npy", "--image", folders / "red.png"]
    sizes = {"feature_dim": 8, "hidden_dim": 40, "lora_rank": 4}
    first = sample("sdxl", FacePlusProjector, *words, metadata={"shortcut": False}, **sizes)
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
        (["--image", "red.png", "--embedding", "red.png"], r"--embedding .*red\.png: its embedding is no array of"),
        (["--image", "red.png", "--size", "36"], "--size 36 must be a multiple of 8"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, sample, folders, capfd):
    words = [folders / word if "." in word else word for word in words]
    assert sample("sd15", LinearProjector, *words, feature_dim=24) == {}
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ipa sample: ")]
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([{"a": 1}], dtype=object), "its embedding is of object, not float16 or float32."),
        (np.array([1, np.nan], np.float32), "its embedding is not finite."),
    ],
)
def test_an_embedding_that_training_would_refuse_is_refused(sample, tmp_path, capfd, values, message):
    np.save(tmp_path / "bad.npy", values, allow_pickle=True)
    assert sample("sd15", FaceProjector, "--embedding", tmp_path / "bad.npy", feature_dim=8) == {}
    assert f"bad.npy: {message}" in capfd.readouterr().err


def test_sd3_takes_one_image_prompt_and_no_masks(sample, folders, capfd):
    sizes = {"feature_dim": 40, "dim": 64, "heads": 1, "num_tokens": 4, "encoder": "siglip"}
    images = ["--image", folders / "red.png", folders / "blue.png", "--together"]
    assert sample("sd3", TimeResampler, *images, **sizes) == {}
    assert "takes one image prompt at a time, got 2" in capfd.readouterr().err
