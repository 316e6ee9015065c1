"""`ipa report`: the page of a real run shows what its folder holds, and needs nothing but itself."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from ipa_train.cli.main import main
from ipa_train.eval.run_report import read_curves


class _Page(HTMLParser):
    """Sources, links and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.links, self.titles, self.text = [], [], [], ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        attrs = dict(attrs)
        self.sources += [attrs["src"]] if "src" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []

    def handle_data(self, data):
        self.text += data
        self.titles += [data] if self._inside == "h3" and data.strip() else []


@pytest.fixture
def page_of(capsys):
    """A function from the words of `ipa report` to the page it draws."""

    def draw(*words):
        assert main(["report", *map(str, words)]) == 0
        return _Page(Path(capsys.readouterr().out.strip()).read_text())

    return draw


def test_the_page_shows_what_the_run_left(run, page_of, tmp_path):
    page = page_of(run, "--out", tmp_path / "page.html")
    with (run / "metrics.csv").open() as file:
        names = [name for name in file.readline().strip().split(",") if name != "step"]
    for name in names:
        assert re.sub(r"_(t[0-3]|ci)", "", name) in page.text, name
    assert [title for title in page.titles if title.startswith("step ")] == ["step 2", "step 4"]
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources), "it needs no other file"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert f"path: {config['base']['path']}" in page.text
    assert json.loads((run / "versions.json").read_text())["torch"] in page.text
    assert page.links
    for link in page.links:
        assert (tmp_path / link).is_file(), link


def test_bad_samples_are_counted_by_reason_and_shard(run, page_of, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    errors = ["cannot decode: <script>"] * 3 + ["no caption"]
    bad = [{"shard": f"/data/0000{i}.tar", "key": "k", "error": error} for i, error in enumerate(errors)]
    (copy / "bad_samples-rank0000.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in bad[:2]))
    (copy / "bad_samples-rank0001.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in bad[2:]))
    page = page_of(copy)
    assert (copy / "report.html").is_file()
    assert "4 were replaced by others" in page.text
    assert re.search(r"cannot decode: <script>\s*3", page.text), "shown, not run"
    assert "00003.tar" in page.text
    assert "/data/" not in page.text.split("config.yaml")[0], "where shards lie is nobody's business"


def test_a_run_that_has_logged_nothing_yet_has_a_page(run, page_of, tmp_path):
    for name in ("config.yaml", "versions.json"):
        shutil.copy(run / name, tmp_path / name)
    assert "No metrics are logged yet." in page_of(tmp_path).text


def test_what_is_learnt_stands_first(run, page_of, tmp_path):
    for name in ("config.yaml", "versions.json"):
        shutil.copy(run / name, tmp_path / name)
    (tmp_path / "metrics.csv").write_text("step,train/grad_norm,train/loss,val/gap_none,val/gap_other\n1,1,2,3,4\n")
    assert page_of(tmp_path).titles == ["val/gap_other", "val/gap_none", "train/loss", "train/grad_norm"]


def test_long_curves_are_thinned_to_means(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b,a_ci\n" + "".join(f"{i},{i % 2},{'' if i % 10 else i},0.5\n" for i in range(1, 1201)))
    curves = read_curves(path)
    assert curves.keys() == {"a", "b"}
    assert len(curves["a"].points) == 300
    assert {y for _, y in curves["a"].points} == {0.5}
    assert curves["a"].points[-1][0] == 1200
    assert curves["a"].margins == [0.5] * 300
    assert curves["b"].points[:2] == [(10.0, 10.0), (20.0, 20.0)], "a short one is left as it is"


def test_what_is_no_run_is_refused_in_one_line(tmp_path, run, capfd):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run of ipa-train (config.yaml: No such file or directory)" in capfd.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html: cannot write there: No such file" in capfd.readouterr().err
