"""`ipa eval` on tiny models: the same numbers however the work is done, and one line for every mistake."""

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ipa_train.adapter import FaceProjector, IPAdapter, LinearProjector
from ipa_train.bases import adapter_sites, load_base
from ipa_train.bases.tiny import randomise
from ipa_train.cli.main import main
from ipa_train.conditioning import StoredEmbeddings
from ipa_train.eval.metrics import SimilarityScores
from ipa_train.eval.pipeline import to_pixels
from ipa_train.export import write_export
from tests.end_to_end.conftest import forked

NUM_PICTURES = 6  # in two parts


def adapter_file(folder, base_path, *, seed=5, projector=LinearProjector, metadata=None, **sizes):
    base = load_base(str(base_path), dtype="float32")
    sites = adapter_sites(base)
    adapter = IPAdapter(projector=projector(context_dim=base.context_dim, **sizes), sites=sites)
    return write_export(folder, randomise(adapter, seed=seed), sites, metadata=metadata or {})[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_models):
    """Two adapters, and six pictures with captions in COCO's format."""
    root = tmp_path_factory.mktemp("eval")
    for seed in (5, 6):
        adapter_file(root / f"adapter{seed}", tiny_models[0], seed=seed, feature_dim=24)
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(NUM_PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + i, 48)).save(root / "images" / f"{i}.png")
        images.append({"id": 7 * i, "file_name": f"{i}.png"})
        annotations.append({"id": i, "image_id": 7 * i, "caption": f"picture <b>{i}</b> & more"})
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root


@pytest.fixture
def command(world, tiny_models, tiny_scorers, tmp_path):
    """A function from a folder's name and further words to the arguments of `ipa`."""

    def words(out, *more, adapter=world / "adapter5" / "ip_adapter.safetensors", annotations="captions.json"):
        given = ["eval", "--adapter", adapter, "--base", tiny_models[0], "--image-encoder", tiny_models[1]]
        given += ["--images", world / "images", "--clip", tiny_scorers[0], "--dino", tiny_scorers[1]]
        given += ["--annotations", world / annotations, "--fid", tiny_scorers[1], "--out", tmp_path / out]
        given += ["--size", "32", "--steps", "1", "--num-samples", "2", *more]
        return [str(word) for word in given]

    return words


@pytest.fixture(scope="module")
def finished(world, tiny_models, tiny_scorers, tmp_path_factory):
    """Results of a sweep, made in one go."""
    out = tmp_path_factory.mktemp("finished") / "sweep"
    words = ["eval", "--adapter", world / "adapter5" / "ip_adapter.safetensors", "--base", tiny_models[0]]
    words += ["--image-encoder", tiny_models[1], "--images", world / "images", "--annotations", world / "captions.json"]
    words += ["--clip", tiny_scorers[0], "--dino", tiny_scorers[1], "--fid", tiny_scorers[1], "--out", out]
    words += ["--size", "32", "--steps", "1", "--num-samples", "2", "--scales", "1", "0", "--text", "caption"]
    assert main([str(word) for word in words]) == 0
    return out


SWEEP = ("--scales", "1", "0", "--text", "caption")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def table(folder):
    return pq.read_table(folder / "pictures.parquet").to_pylist()


def error_line(capfd):
    (line,) = [line for line in capfd.readouterr().err.splitlines() if re.match(r"ipa eval( \(rank \d\))?: ", line)]
    return line


def test_interrupted_by_kill_and_resumed_the_numbers_are_the_same(command, finished, tmp_path):
    first = tmp_path / "killed" / "parts" / "00000.parquet"
    process = forked(command("killed", *SWEEP))
    while not first.exists():
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "summary.json").exists()
    made = first.stat().st_mtime_ns
    assert main(command("killed", *SWEEP)) == 0
    assert first.stat().st_mtime_ns == made, "what is done is not made again"
    assert summary(tmp_path / "killed") == summary(finished)
    assert table(tmp_path / "killed") == table(finished)


def test_two_processes_give_the_numbers_of_one(command, finished, tmp_path, monkeypatch):
    processes = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        processes.append(forked(command("two", *SWEEP)))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert summary(tmp_path / "two") == summary(finished)
    assert table(tmp_path / "two") == table(finished)


def test_a_rank_alone_leaves_the_rest_and_the_report_to_others(command, tmp_path):
    share = ("--num-tasks", "2", "--task-index", "1")
    assert main(command("half", *share)) == 0
    assert [path.name for path in (tmp_path / "half" / "parts").iterdir()] == ["00001.parquet"]
    assert not (tmp_path / "half" / "report.html").exists()


def test_a_picture_does_not_depend_on_which_others_there_are(command, finished, tmp_path):
    assert main(command("few", *SWEEP, "--num-images", "3")) == 0
    few = table(tmp_path / "few")
    assert few == [row for row in table(finished) if row["id"] in {"0", "7", "14"}]


def test_a_picture_can_be_drawn_again_from_its_seed_and_scores_the_same(
    world, finished, tiny_models, tiny_scorers, tmp_path
):
    row = next(row for row in table(finished) if row["id"] == "7" and row["scale"] == 1.0 and row["sample"] == 1)
    image = world / "images" / row["file"]
    words = ["sample", "--adapter", world / "adapter5" / "ip_adapter.safetensors", "--base", tiny_models[0]]
    words += ["--image-encoder", tiny_models[1], "--image", image, "--prompt", row["caption"], "--seed", row["seed"]]
    words += ["--num", 1, "--scale", 1, "--size", 32, "--steps", 1, "--guidance", 7.5, "--out", tmp_path / "again"]
    assert main([str(word) for word in words]) == 0
    (drawn,) = (tmp_path / "again").glob("0-*.png")
    scores = SimilarityScores.from_pretrained(clip=str(tiny_scorers[0]), dino=str(tiny_scorers[1]))
    pixels, prompt = (to_pixels(Image.open(path).convert("RGB")) for path in (drawn, image))
    for name, value in scores(pixels, prompt, [row["caption"]]).items():
        assert row[name] == pytest.approx(value.item(), abs=1e-3)
    assert {row["clip_i"] for row in table(finished) if row["scale"] == 0.0} != {row["clip_i"]}


def test_the_summary_is_what_the_table_says(finished):
    rows, found = table(finished), summary(finished)
    assert len(rows) == NUM_PICTURES * 2 * 2
    assert len({row["seed"] for row in rows}) == NUM_PICTURES * 2, "the same seeds at every scale"
    assert [at["scale"] for at in found["by_scale"]] == [0.0, 1.0]
    for at in found["by_scale"]:
        for name, mean in at["scores"].items():
            values = np.array([row[name] for row in rows if row["scale"] == at["scale"]])
            assert mean["mean"] == pytest.approx(values.mean())
            by_picture = values.reshape(NUM_PICTURES, 2).mean(1)
            assert mean["ci95"] == pytest.approx(1.96 * by_picture.std(ddof=1) / NUM_PICTURES**0.5)
        assert at["distances"]["fid"] > 0
    assert found["sampler"] == "DDIMScheduler"
    assert (found["num_pictures"], found["left_out"]) == (NUM_PICTURES, [])


class Page(HTMLParser):
    """What a browser would find in the page, and fetch for it."""

    def __init__(self, path):
        super().__init__()
        self.text, self.fetched, self.pictures, self.charts, self.bold = "", [], 0, 0, 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.pictures += tag == "img"
        self.charts += tag == "svg"
        self.fetched += [v for k, v in values.items() if k in ("src", "href") and not v.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def test_the_report_stands_alone_and_shows_it_all(finished):
    page = Page(finished / "report.html")
    assert page.fetched == []
    assert page.charts == 4, "CLIP-I, CLIP-T, DINO and FID over the scale"
    assert page.pictures >= 2 * 3 * 3, "best and worst with image prompt and samples"
    assert "picture <b>5</b> & more" in page.text, "captions are text"
    at = summary(finished)["by_scale"][1]
    assert f"{at['scores']['clip_i']['mean']:.3f}" in page.text
    assert "IP-Adapter, as published10.8280.588" in page.text
    assert "and not measured here" in page.text
    assert "FID over dino" in page.text, "no FID of the papers' network"


def test_results_of_one_protocol_stand_side_by_side(command, world, finished, tmp_path, capfd):
    other = world / "adapter6" / "ip_adapter.safetensors"
    assert main(command("other", "--text", "caption", "--compare", finished, adapter=other)) == 0
    text = Page(tmp_path / "other" / "report.html").text
    for folder in (finished, tmp_path / "other"):
        assert f"{summary(folder)['by_scale'][-1]['scores']['clip_i']['mean']:.3f}" in text
    assert main(command("alone", "--num-images", "1", "--compare", finished)) == 2
    assert re.search(r"--compare .*sweep: made in another way.*text was caption, now none", error_line(capfd))
    assert main(command("other", "--text", "caption", "--compare", tmp_path / "nowhere", adapter=other)) == 2
    assert "nowhere: no finished results of ipa eval there: No such file" in error_line(capfd)


def test_results_of_another_adapter_or_protocol_are_refused_by_name(command, world, finished, capfd):
    other = world / "adapter6" / "ip_adapter.safetensors"
    for more, adapter, message in (
        (["--seed", "1"], {}, "results made in another way: seed was 0, now 1"),
        ([], {"adapter": other}, r"adapter was ip_adapter.safetensors \(sha256 \w+\), now ip_adapter.safetensors"),
    ):
        assert main([*command("x", *SWEEP, *more, **adapter), "--out", str(finished)]) == 2
        assert re.search(message, error_line(capfd))


def test_pictures_that_cannot_be_read_are_named_and_may_be_left_out(command, world, tmp_path, capfd):
    content = json.loads((world / "captions.json").read_text())
    content["images"][0]["file_name"] = "gone.png"
    content["images"][1]["file_name"] = "damaged.png"
    (world / "images" / "damaged.png").write_bytes((world / "images" / "1.png").read_bytes()[:100])
    (world / "bad.json").write_text(json.dumps(content))
    words = ["--num-images", "3"]
    assert main(command("bad", *words, annotations="bad.json")) == 2
    assert re.search(r"1 of the 3 pictures of .*bad\.json are not there, e\.g\. gone\.png", error_line(capfd))
    content["images"][0]["file_name"] = "0.png"
    (world / "damaged.json").write_text(json.dumps(content))
    assert main(command("damaged", *words, annotations="damaged.json")) == 2
    assert re.search(r"damaged\.png: cannot decode.*--allow-missing", error_line(capfd))
    assert main(command("allowed", *words, "--allow-missing", annotations="bad.json")) == 0
    found = summary(tmp_path / "allowed")
    assert found["num_pictures"] == 1
    assert [reason.split(":")[0] for reason in found["left_out"]] == ["gone.png", "damaged.png"]
    assert "2 pictures were left out" in Page(tmp_path / "allowed" / "report.html").text


def test_a_damaged_part_is_named(command, finished, tmp_path, capfd):
    assert main(command("parts", "--num-images", "1")) == 0
    (tmp_path / "parts" / "parts" / "00000.parquet").write_bytes(b"PAR1")
    assert main(command("parts", "--num-images", "1")) == 2
    assert re.search(r"00000\.parquet: damaged .*; delete it", error_line(capfd))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "nowhere"], "--images nowhere: no such folder"),
        (["--scales", "1", "1"], "--scales must be different numbers"),
        (["--num-samples", "0"], "--num-samples must be at least 1"),
        (["--num-images", "7"], "--num-images must be from 1 to 6"),
        (["--adapter", "nowhere.bin"], "--adapter nowhere.bin: cannot be read"),
        (["--clip", "none", "--dino", "none", "--fid", "none"], "there is nothing to score by"),
        (["--clip", "nowhere"], "--clip nowhere .*: cannot load"),
        (["--size", "36"], "--size 36 must be a multiple of 8"),
        (["--steps", "1001"], "--steps 1001 must be from 1 to 1000"),
        (["--num-tasks", "2", "--task-index", "2"], "--task-index=2 must be from 0"),
    ],
)
def test_mistakes_are_one_line(more, message, command, capfd):
    assert main(command("x", *more)) == 2
    assert re.search(message, error_line(capfd))


def test_adapters_that_cannot_be_scored_so(command, tiny_models, tmp_path, capfd):
    account = {"image_encoder": StoredEmbeddings(dim=8, normalize=True).identity()}
    face = adapter_file(tmp_path / "f", tiny_models[0], projector=FaceProjector, metadata=account, feature_dim=8)
    assert main(command("face", adapter=face)) == 2
    assert "this adapter reads stored embeddings" in error_line(capfd)
    other = adapter_file(tmp_path / "o", tiny_models[0], feature_dim=32)
    assert main(command("encoder", adapter=other)) == 2
    assert "made for an image encoder of width 32" in error_line(capfd)


def test_scores_do_not_hang_on_what_else_was_drawn(command, tmp_path):
    torch.manual_seed(1)
    torch.rand(3)
    assert main(command("a", "--num-images", "1", "--clip", "none", "--fid", "none")) == 0
    found = summary(tmp_path / "a")["by_scale"][0]
    assert list(found["scores"]) == ["dino"]
    assert found["scores"]["dino"]["ci95"] is None
    assert found["distances"] is None
