"""The numbers are those of the data, whatever the order and however often they are counted; the page stands alone."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.charts import draw_histogram
from data_tools.histogram import Histogram
from data_tools.shard_stats import MEASURES
from ipa_train.cli.main import main
from tests.data.conftest import encode, picture, write_shard, write_shards

SIZES = [(64, 64), (64, 96), (40, 30), (128, 64), (60, 90)]
"""(height, width)"""


@pytest.fixture
def varied(tmp_path):
    """Two shards of ten and five pictures that go round SIZES; captions of 0 to 14 words."""
    folder = tmp_path / "varied"
    for number, count in enumerate((10, 5)):
        samples = {}
        for i in range(count):
            height, width = SIZES[i % len(SIZES)]
            jpg = encode(picture(i, width=width, height=height))
            samples[f"{number}{i:02d}"] = {"jpg": jpg, "txt": " ".join(["<b>"] * (10 * number + i))}
        write_shard(folder, number, samples)
    return folder


def stats(folder, out, *options):
    size = ("--resolution", "64", "--bucket-step", "16", "--workers", "1")
    return main(["data", "stats", str(folder), "--out", str(out), *size, *options])


def result(out):
    return json.loads((out / "stats.json").read_text())


def test_sizes_captions_and_buckets(varied, tmp_path):
    assert stats(varied, tmp_path / "out") == 0
    found = result(tmp_path / "out")
    heights, widths = np.array(SIZES * 3).T
    short = found["measures"]["short_side"]
    assert (short["minimum"], short["maximum"], short["values"]) == (30, 64, 15)
    assert short["mean"] == pytest.approx(np.minimum(heights, widths).mean())
    assert found["measures"]["aspect_ratio"]["maximum"] == pytest.approx(1.5)
    words = found["measures"]["caption_words"]
    assert words["mean"] == pytest.approx(np.arange(15).mean())
    assert sum(words["counts"]) == 15
    assert found["counts"]["empty captions"] == 1
    assert found["counts"]["pictures smaller than the resolution"] == 6
    buckets = {(b["height"], b["width"]): (b["samples"], b["enlarged"]) for b in found["buckets"] if b["samples"]}
    assert buckets == {
        (64, 64): (3, 0),
        (48, 80): (6, 0),  # 64 x 96 and 60 x 90
        (80, 48): (6, 3),  # 128 x 64, and 40 x 30, which is too small
    }


def test_scores_beside_the_shards_count_for_samples_that_are_there(varied, tmp_path):
    table = {
        "key": ["000", "001", "002", "003"],
        "status": ["success", "success", "failed_to_download", "success"],
        "AESTHETIC_SCORE": [5.0, 6.0, 9.0, 1.0],
        "pwatermark": pa.array([0.5, None, 0.9, 0.1], pa.float32()),
    }
    pq.write_table(pa.table(table), varied / "00000.parquet")
    (varied / "exclude-mine.txt").write_text("00000.tar/003\n")
    assert stats(varied, tmp_path / "out") == 0
    found = result(tmp_path / "out")
    aesthetic, watermark = found["measures"]["aesthetic"], found["measures"]["watermark"]
    assert (aesthetic["values"], aesthetic["minimum"], aesthetic["maximum"]) == (2, 5.0, 6.0)
    assert (watermark["values"], watermark["mean"]) == (1, 0.5)
    assert found["counts"]["samples without watermark"] == 1
    assert "unsafe" not in found["measures"]


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.loaded, self.text = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_shows_captions_as_text(varied, tmp_path):
    assert stats(varied, tmp_path / "out", "--num-samples", "12") == 0
    page = Page(tmp_path / "out" / "stats.html")
    assert page.tags.count("figure") == 12
    assert len(page.loaded) == 12
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.loaded)
    assert "script" not in page.tags
    assert page.tags.count("b") == page.tags.count("h1") + 4, "tiles alone, none from a caption"
    assert "<b> <b> <b>" in page.text


def test_the_same_seed_shows_the_same_samples(varied, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert stats(varied, tmp_path / name, "--num-samples", "5", "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "stats.html").read_text() for name in "abc")
    assert a == b != c


def test_a_picture_that_cannot_be_decoded_says_so_on_the_page(tmp_path):
    jpg = encode(picture(0))
    write_shard(tmp_path / "ds", 0, {"a": {"jpg": jpg, "txt": "a"}, "b": {"jpg": jpg[:-50], "txt": "b"}})
    assert stats(tmp_path / "ds", tmp_path / "out") == 0
    page = Page(tmp_path / "out" / "stats.html")
    assert (page.tags.count("figure"), page.tags.count("img")) == (2, 1)
    assert any("cannot decode" in text for text in page.text)


def test_a_rerun_measures_only_what_changed(varied, tmp_path):
    out = tmp_path / "out"
    stats(varied, out)
    first = result(out)
    next((out / "parts").glob("00001-*.json")).write_text('{"identity"')  # killed while it was written by hand
    assert stats(varied, out) == 0
    again = result(out)
    assert again["counts"].pop("shards measured before") == 1
    assert again == first
    write_shard(varied, 0, {"new": {"jpg": encode(picture(0, width=99)), "txt": "a"}})
    assert stats(varied, out) == 0
    assert result(out)["counts"]["samples"] == 6
    assert result(out)["measures"]["short_side"]["values"] == 6


def test_what_cannot_be_measured_is_a_problem_and_the_rest_is_measured(varied, tmp_path):
    write_shards(varied / "more", counts=(3,))
    (varied / "00000_stats.json").unlink()
    (varied / "more" / "00000.parquet").write_bytes(b"no parquet")
    options = ["--num-samples", "0", "--out", str(tmp_path), "--workers", "1"]
    assert main(["data", "stats", str(varied), str(varied / "more"), *options]) == 1
    first, second = result(tmp_path)["problems"]
    assert "no 00000_stats.json" in first
    assert "00000.parquet: cannot be read" in second
    assert result(tmp_path)["counts"]["samples"] == 5


def test_features_have_no_sizes(tmp_path, capfd):
    write_shard(tmp_path / "ds", 0, {"a": {"safetensors": b"{}", "txt": "a"}})
    assert stats(tmp_path / "ds", tmp_path / "out") == 2
    assert "these shards hold cached features" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["short_side", "aspect_ratio"])
def test_percentiles_are_right_to_a_bin_and_parts_add_up(name):
    edges = MEASURES[name].edges
    values = np.random.default_rng(0).lognormal(0, 0.8, 1000) * (1 if name == "aspect_ratio" else 600)
    whole, merged = Histogram(edges), Histogram(edges)
    whole.add(values)
    for part in np.array_split(values, 7):
        kept = Histogram(edges)
        kept.add(part)
        again = Histogram(edges)
        again.load(json.loads(json.dumps(kept.state())))
        merged.merge(again)
    assert merged.counts.tolist() == whole.counts.tolist()
    for percent in (0, 5, 50, 75, 95, 100):
        exact = np.percentile(values, percent)
        bounds = [values.min(), *edges[(edges > values.min()) & (edges < values.max())], values.max()]
        widest = max(np.diff(bounds))
        assert abs(merged.percentile(percent) - exact) <= widest


@pytest.mark.parametrize("values", [[700.0], [-5.0], [9000.0], [1.0, 2.0, 3000.0, -1.0], [512.0] * 3])
@pytest.mark.parametrize("is_log", [False, True])
def test_every_value_is_in_the_chart(values, is_log):
    found = Histogram(np.geomspace(1, 2048, 33) if is_log else np.linspace(0, 2048, 33))
    found.add(np.array(values))
    chart = draw_histogram(found, is_log=is_log, unit=" px", mark=512.0, mark_name="512")
    titles = [title.text for title in ElementTree.fromstring(chart).iter("title")]
    assert sum(int(re.search(r": ([\d,]+) \(", title)[1]) for title in titles) == len(values)
