"""Downloads with the real img2dataset from a server on this machine."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import url_lists
from data_tools.shard_writer import stats_path
from ipa_train.cli.main import load_verb
from ipa_train.data.index import build_index
from ipa_train.errors import ConfigError
from tests.data.conftest import encode, picture

INSTALLED = Path(__file__).parents[2] / ".venv/img2dataset/bin/img2dataset"
PROGRAM = str(INSTALLED) if INSTALLED.exists() else shutil.which("img2dataset")
needs_img2dataset = pytest.mark.skipif(not PROGRAM, reason="no img2dataset: make .venv/img2dataset/ready installs it")


class Handler(BaseHTTPRequestHandler):
    """/ok/N a picture; /to/N redirects there; /robots/WORD a picture with that X-Robots-Tag; /slow/N waits."""

    def do_GET(self):
        _, kind, name = self.path.split("/")
        self.server.asked[self.path] += 1
        if kind == "slow" and not self.server.go_on.wait(60):
            return
        status = {"to": 302, "gone": 404, "broken": 500}.get(kind, 200)
        body = b"<html>no picture</html>" if kind == "page" else encode(picture(int(name) if name.isdigit() else 0))
        self.send_response(status)
        if kind == "to":
            self.send_header("Location", f"/ok/{name}")
        if kind == "robots":
            self.send_header("X-Robots-Tag", name)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.asked, httpd.go_on, httpd.daemon_threads = Counter(), threading.Event(), True
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def write_urls(path, urls, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"URL": urls, "TEXT": [f"caption of {url}" for url in urls], **columns}), path)
    return path


def command(*args):
    options = ["--img2dataset", PROGRAM or "none", "--threads", 2, "--workers", 1, "--samples-per-shard", 2]
    return ["download", *map(str, [*options, *args])]


def run(*args):
    verb, parser = load_verb("data")
    return verb.run(parser.parse_args(command(*args)))


def report_of(out):
    return json.loads((out / "download-report.json").read_text())


@pytest.fixture(scope="module")
def downloaded(server, tmp_path_factory):
    """(inputs, folder) of a download of urls of all kinds."""
    root = tmp_path_factory.mktemp("download")
    kinds = ["ok/0", "gone/0", "ok/1", "page/0", "to/3", "robots/noai", "robots/noindex", "robots/nofollow", "broken/0"]
    urls = [f"{server.url}/{kind}" for kind in kinds] + ["file:///etc/hostname", "ftp://127.0.0.1/a", None, "nonsense"]
    extra = {"punsafe": [0.5] * len(urls), "WIDTH": [7] * len(urls), "blob": [b"x"] * len(urls)}
    write_urls(root / "in/0.parquet", urls, **extra)
    write_urls(root / "in/1.parquet", [urls[0], f" {urls[2]}", f"{server.url}/ok/2"], punsafe=[1, 0, 0])
    if PROGRAM:
        assert run(root / "in", "--out", root / "out") == 0
    return root / "in", root / "out"


@needs_img2dataset
def test_pictures_become_shards_and_all_else_is_counted(downloaded, server):
    _, out = downloaded
    report = report_of(out)
    assert report["counts"] == {
        "urls": 16,
        "without url": 1,
        "not http or https": 3,
        "duplicate urls": 2,
        "to download": 10,
        "successes": 5,
        "failed_to_download": 4,
        "failed_to_resize": 1,
        "shards": 5,
    }
    assert report["reasons"]["Use of image disallowed by X-Robots-Tag directive"] == 2
    assert report["reasons"]["HTTP Error 404: Not Found"] == 1
    assert report["success_rate"] == 0.5
    assert (server.asked["/ok/0"], server.asked["/ok/1"]) == (1, 1)
    table = pa.concat_tables([pq.read_table(path) for path in sorted((out / "shards").glob("*.parquet"))])
    assert table["punsafe"].to_pylist()[:2] == [0.5, 0.5]
    assert Counter(table["status"].to_pylist())["success"] == 5
    assert "blob" not in table.column_names
    assert "WIDTH" not in table.column_names


@needs_img2dataset
def test_the_shards_are_used_by_others_and_a_rerun_has_nothing_to_do(downloaded, server, tmp_path):
    inputs, out = downloaded
    shutil.copytree(out, tmp_path / "out")
    out, asked = tmp_path / "out", server.asked.total()
    assert build_index(str(out / "shards")).counts.sum() == 5
    verb, parser = load_verb("data")
    for rule, num_kept in (("--max-unsafe=0.5", 5), ("--min-size=41", 0)):  # the pictures are 48 x 40
        assert verb.run(parser.parse_args(["filter", str(out / "shards"), "--exclude", rule, "--workers", "1"])) == 0
        assert build_index(str(out / "shards")).counts.sum() == num_kept
        (out / "shards/exclude-filter.txt").unlink()
    assert run(inputs, "--out", out) == 0  # what they left in the folder is no obstacle
    assert server.asked.total() == asked
    assert report_of(out)["num_done_before"] == 5


@needs_img2dataset
def test_an_interrupted_download_goes_on_and_mends_what_is_damaged(server, tmp_path):
    out = tmp_path / "out"
    urls = [f"{server.url}/{kind}" for kind in ("ok/100", "ok/101", "ok/102", "gone/1", "gone/2", "gone/3", "slow/1")]
    write_urls(tmp_path / "0.parquet", urls)
    args = command(tmp_path / "0.parquet", "--out", out)
    process = subprocess.Popen([sys.executable, "-m", "ipa_train.cli.main", "data", *args])
    while not server.asked["/slow/1"]:
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(ConfigError, match="another download into it is going on"):
        run(tmp_path / "0.parquet", "--out", out)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    server.go_on.set()
    tars = [out / f"shards/0000{number}.tar" for number in range(4)]
    assert [stats_path(tar).exists() for tar in tars] == [True, True, True, False]
    tars[1].write_bytes(tars[1].read_bytes()[:1024])
    assert run(tmp_path / "0.parquet", "--out", out) == 1
    report = report_of(out)
    assert report["num_done_before"] == 1
    assert report["counts"]["bad shards before"] == 2  # the damaged one, and the one of dead links alone
    assert [str(tars[2]) in problem for problem in report["problems"]] == [True]
    assert (report["counts"]["successes"], report["counts"]["failed_to_download"]) == (4, 3)
    assert (server.asked["/ok/100"], server.asked["/ok/102"], server.asked["/gone/2"]) == (1, 2, 2)
    tars[2].unlink()  # as the problem says
    assert run(tmp_path / "0.parquet", "--out", out) == 0
    assert build_index(str(out / "shards")).counts.tolist() == [2, 1, 1]


@needs_img2dataset
def test_too_few_successes_are_a_problem(downloaded, tmp_path):
    inputs, out = downloaded
    shutil.copytree(out, tmp_path / "out")
    assert run(inputs, "--out", tmp_path / "out", "--min-success-rate", 0.6) == 1
    assert "50.0% of the urls gave a picture" in report_of(tmp_path / "out")["problems"][0]


def test_a_program_that_fails_is_reported(tmp_path):
    write_urls(tmp_path / "0.parquet", ["http://127.0.0.1/a"] * 3)
    assert run(tmp_path / "0.parquet", "--out", tmp_path / "out", "--img2dataset", shutil.which("false")) == 1
    problems = report_of(tmp_path / "out")["problems"]
    assert "false ended with exit status 1" in problems[0]
    assert "1 shards unfinished, first" in problems[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["in", "--img2dataset", "nowhere"], "--img2dataset nowhere: no such program; install it"),
        (["no-caption"], "a download needs a column caption or text, which .*; it has url, a"),
        (["no-web"], "none of 2 urls is of http or https"),
        (["unlike"], "columns do not fit together .*; download them apart"),
        (["in", "--image-size", 64], "was begun with other image_size .512 and not 64."),
        (["no-web", "--out", "begun"], "was begun with other inputs"),
        (["in2", "--out", "foreign"], "index.json: img2dataset takes every .json there for a shard's statistics"),
    ],
)
def test_mistakes_are_refused_in_one_line(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    fails = ["--img2dataset", shutil.which("false")]
    write_urls(tmp_path / "in/0.parquet", ["http://a/b"])
    write_urls(tmp_path / "no-web/0.parquet", ["ftp://a/b", "data:image/png;base64,00"])
    write_urls(tmp_path / "unlike/0.parquet", ["http://a/b"], score=[1])
    write_urls(tmp_path / "unlike/1.parquet", ["http://a/b"], score=["good"])
    pq.write_table(pa.table({"url": ["http://a/b"], "a": [1]}), tmp_path / "no-caption.parquet")
    (tmp_path / "no-caption").mkdir()
    (tmp_path / "no-caption.parquet").rename(tmp_path / "no-caption/0.parquet")
    assert run("in", "--out", "begun", *fails) == 1
    (tmp_path / "foreign/shards").mkdir(parents=True)
    (tmp_path / "foreign/shards/index.json").touch()
    args = [{"in2": "in"}.get(arg, arg) for arg in args]
    out = [] if "--out" in args else ["--out", "begun" if "--image-size" in args else "out"]
    with pytest.raises(ConfigError, match=message):
        run(*args, *out, *([] if "--img2dataset" in args else fails))


def test_urls_are_cleaned_alike_however_they_are_spread(tmp_path, monkeypatch):
    paths = [
        write_urls(tmp_path / "0.parquet", [f"http://host/{i % 50}" for i in range(80)], score=[1] * 80),
        write_urls(tmp_path / "1.parquet", [f"HTTPS://host/{i}" for i in range(40)], score=[0.5] * 40, other=[1] * 40),
    ]
    schema = url_lists.common_columns(paths)
    assert schema.names == ["url", "caption", "score"]
    found = []
    for folder, file_rows in (("one", 1000), ("many", 30)):
        monkeypatch.setattr(url_lists, "_FILE_ROWS", file_rows)
        counts = url_lists.clean_url_lists(paths, tmp_path / folder, schema=schema, workers=1)
        assert (counts["to download"], counts["duplicate urls"]) == (90, 30)
        files = sorted((tmp_path / folder).iterdir())
        assert len(files) == -(-120 // file_rows)
        rows = pa.concat_tables([pq.read_table(path) for path in files]).to_pylist()
        assert all(row["caption"] == f"caption of {row['url']}" for row in rows)
        found.append(sorted(row["url"] for row in rows))
    assert found[0] == found[1]
    assert len(set(found[0])) == 90
    assert not list(tmp_path.glob(".*"))
