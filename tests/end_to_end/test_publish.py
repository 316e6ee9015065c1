"""From a run to the hub: the card says what is so, its lines run, and what is uploaded is the folder."""

import re

import huggingface_hub
import pytest
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from ipa_train.cli.main import main
from ipa_train.eval.distribution import Distances
from ipa_train.eval.summary import AtScale, Mean, Summary
from tests.data.conftest import picture
from tests.end_to_end.hub_server import Hub


@pytest.fixture(scope="module")
def card_folder(run, tmp_path_factory):
    """What `ipa export --card` makes of the finished run."""
    folder = tmp_path_factory.mktemp("card") / "for_the_hub"
    assert main(["export", str(run), "--out", str(folder), "--card", "--license", "apache-2.0"]) == 0
    return folder


@pytest.fixture
def push(card_folder, monkeypatch, capfd):
    """A function that runs `ipa push` of the folder: its exit status, output and errors."""

    def push(*arguments, offline=False, token="hf_none", hub=None):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9" if hub is None else hub.url)
        capfd.readouterr()
        status = main(["push", str(card_folder), "--repo", "me/mine", *arguments])
        return status, *capfd.readouterr()

    return push


def test_the_card_says_how_it_was_made(card_folder, run, image_encoder, shards):
    card = (card_folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert "base_model" not in yaml.safe_load(front), "a local folder is no name that the hub knows"
    for said in (
        image_encoder.identity()["weights_sha256"],
        "| optimizer steps | 4 |",
        "| drop rates | text_rate 0.05, image_rate 0.05, both_rate 0.05 |",
        "| samples in a step | 4 |",
        "| averaged weights | yes |",
        f"| data | {shards.parent.name}/{shards.name} |",
        "Not evaluated.",
    ):
        assert said in text, said
    assert str(shards.parent.parent) not in card, "where things lie is nobody's business"
    with Image.open(card_folder / "samples.png") as shown, Image.open(run / "samples/step-00000004.png") as latest:
        assert shown.tobytes() == latest.tobytes()
    assert "![Sample grid](samples.png)" in text


def test_the_lines_of_the_card_draw(card_folder, tiny_models, tmp_path, monkeypatch):
    for path in (*card_folder.iterdir(), *tiny_models):
        (tmp_path / path.name).symlink_to(path)
    picture(0).save(tmp_path / "image_prompt.png")
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r"```python\n(.*?)```", (card_folder / "README.md").read_text(), re.DOTALL)
    defined = {}
    exec(compile(lines, "card", "exec"), defined)
    assert isinstance(defined["pipe"], StableDiffusionPipeline)
    assert isinstance(defined["image"], Image.Image)


def test_the_card_shows_what_ipa_eval_found(run, tmp_path):
    facts = {
        "data_set": "3 pictures of photos",
        "text": "none",
        "num_samples": 4,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "seed": 0,
        "clip": "openai/clip",
        "dino": "none",
        "fid_network": "inception",
    }
    found = AtScale(
        0.5, {"clip_i": Mean(0.81234, 0.01), "clip_t": Mean(0.58, None)}, Distances(fid=12.3456, kid=0.1, kid_std=0.01)
    )
    Summary(facts, "DDIM", 3, [], [found]).write(tmp_path)
    command = ["export", str(run), "--out", str(tmp_path / "out"), "--card", "--title", "Mine"]
    assert main([*command, "--scores", str(tmp_path)]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Mine\n" in card
    assert "| scale | CLIP-I | CLIP-T | FID |" in card
    assert "| 0.5 | 0.812 ± 0.010 | 0.580 | 12.35 |" in card
    assert "DDIM, 50 steps, guidance 7.5, seed 0" in card


def test_a_file_of_others_gets_a_card_that_admits_what_it_does_not_know(card_folder, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(card_folder / "ip_adapter.bin"), "--out", str(out), "--card"]) == 0
    card = (out / "README.md").read_text()
    assert "| base | not stated |" in card
    assert "The file does not say." in card or "| ipa-train |" in card
    assert "```python" not in card
    assert not (out / "samples.png").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--license", "mit"], "--license is for a model card: add --card"),
        (["--card", "--license", "My Own"], "--license My Own: give an identifier"),
        (["--card", "--scores", "/nowhere"], "/nowhere: no finished results of ipa eval there"),
    ],
)
def test_wrong_options_write_nothing(options, line, run, tmp_path, capfd):
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *options]) == 2
    assert line in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_everything_and_uploads_nothing(push, card_folder):
    with Hub().running() as hub:
        status, output, errors = push("--dry-run", hub=hub)
        assert not hub.repos
    assert status == 0, errors
    for path in card_folder.iterdir():
        assert path.name in output
    assert "license: apache-2.0" in output
    assert "would go to me/mine" in output


def test_what_is_uploaded_is_the_folder(push, card_folder):
    with Hub().running() as hub:
        status, output, errors = push("--private", hub=hub)
        assert status == 0, errors
        assert f"{hub.url}/me/mine/commit/" in output
        private, files = hub.repos["me/mine"]
    assert private
    assert files == {path.name: path.read_bytes() for path in card_folder.iterdir()}


def test_one_line_for_what_the_hub_refuses_and_for_what_is_missing(push, card_folder, tmp_path, capfd, monkeypatch):
    with Hub().running() as hub:
        hub.refuses = True
        status, _, errors = push(hub=hub)
    assert (status, errors.count("\n")) == (2, 1), errors
    assert "did not take me/mine" in errors
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert push(token="")[2] == "ipa push: no token for the hub: log in by `hf auth login`, or set HF_TOKEN.\n"
    assert "HF_HUB_OFFLINE is set" in push(offline=True)[2]
    assert main(["push", str(tmp_path), "--repo", "me/mine"]) == 2
    assert "has no ip_adapter.safetensors: make it by `ipa export" in capfd.readouterr().err
    assert main(["push", str(card_folder), "--repo", "mine"]) == 2
    assert "--repo mine: give OWNER/NAME." in capfd.readouterr().err


def test_what_is_not_of_the_export_is_not_made_public(card_folder, tmp_path, capfd):
    (tmp_path / "secret.txt").write_text("x")
    for path in card_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert main(["push", str(tmp_path), "--repo", "me/mine", "--dry-run"]) == 2
    assert "secret.txt is not of an export" in capfd.readouterr().err
