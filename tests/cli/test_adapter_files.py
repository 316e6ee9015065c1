"""`ipa export`, `ipa import` and `ipa sample`: one clear line for what cannot work, and files that do not collide."""

import pytest
import torch
from PIL import Image

from ipa_train.cli.main import main
from ipa_train.export import read_adapter_file, write_export
from tests.eval.test_generate import adapter_for


@pytest.fixture
def refused(capfd):
    """A function that runs a command, expects exit status 2, and returns the one line it wrote."""

    def refused(*command):
        capfd.readouterr()
        assert main([str(word) for word in command]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"ipa {command[0]}: ")]
        return line

    return refused


@pytest.fixture
def adapter_file(base, tmp_path):
    return write_export(tmp_path / "adapter", adapter_for(base), base.attention_sites())[0]


@pytest.fixture
def sample(tiny_models, adapter_file):
    """The words of a short `ipa sample`, but for --image and --out."""
    words = ["sample", "--adapter", adapter_file, "--base", tiny_models[0], "--image-encoder", tiny_models[1]]
    return [*map(str, words), "--steps", "1", "--size", "64", "--num", "2"]


def test_pictures_of_one_name_do_not_overwrite_each_other(sample, tmp_path):
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGBA", (40, 50), colour).save(tmp_path / folder / "photo.png")
    images = [str(tmp_path / folder / "photo.png") for folder in "ab"]
    assert main([*sample, "--image", *images, "--seed", "7", "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{row}-photo-{seed}.png" for row in (0, 1) for seed in (7, 8)} | {"grid.png"}
    # A cell of prompt and two of results, in two rows.
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * 68 + 4, 2 * 84)


def test_sample_refuses(sample, refused, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("hello")
    assert "--image /nowhere.png: no picture" in refused(*sample, "--image", "/nowhere.png")
    assert "text.png: no picture that can be read" in refused(*sample, "--image", tmp_path / "text.png")
    photo = ["--image", tmp_path / "photo.png"]
    assert "--size 65 must be a multiple of 8" in refused(*sample, *photo, "--size", 65)
    assert "--num and --steps must be at least 1" in refused(*sample, *photo, "--num", 0)
    assert "cannot write there" in refused(*sample, *photo, "--out", tmp_path / "photo.png")


def test_export_refuses(adapter_file, refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write there" in refused("export", adapter_file, "--out", tmp_path / "file")
    assert "--no-ema chooses among a checkpoint's weights" in refused(
        "export", adapter_file, "--no-ema", "--out", tmp_path / "out"
    )
    assert "neither a checkpoint nor a run" in refused("export", tmp_path / "nothing", "--out", tmp_path / "out")
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").touch()
    line = refused("export", adapter_file, "--out", tmp_path / "step-00000001")
    assert "this is a checkpoint, which an export there would damage" in line
    assert not (tmp_path / "out").exists()


def test_export_of_a_file_changes_its_precision(adapter_file, tmp_path):
    assert main(["export", str(adapter_file), "--dtype", "fp16", "--out", str(tmp_path / "half")]) == 0
    before, after = read_adapter_file(adapter_file)[0], read_adapter_file(tmp_path / "half" / "ip_adapter.bin")[0]
    assert {weight.dtype for weight in after.values()} == {torch.float16}
    assert all(torch.equal(after[name], before[name].half()) for name in before)


def test_import_shows_foreign_metadata_on_one_line_each(base, tmp_path, capsys):
    metadata = {"note": "first\n\x1b[31msecond"}
    path = write_export(tmp_path, adapter_for(base), base.attention_sites(), metadata=metadata)[0]
    assert main(["import", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "first  [31msecond" in shown


def test_import_refuses(refused, tmp_path):
    (tmp_path / "x.safetensors").write_text("hello")
    assert "x.safetensors: damaged or no adapter file" in refused("import", tmp_path / "x.safetensors")
    assert "no such file" in refused("import", tmp_path / "y.bin")
