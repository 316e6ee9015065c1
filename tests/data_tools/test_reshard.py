"""Training on resharded shards sees what it would have seen on the source, in any order of work and stops."""

import itertools
import json
import multiprocessing
import os
import signal
import tarfile

import numpy as np
import pytest

from data_tools.reshard import DESCRIPTION
from data_tools.shard_writer import ShardWriter
from ipa_train.cli.main import main
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.index import build_index
from ipa_train.data.stream import choose_buckets
from tests.data.conftest import encode, mask, picture, write_shard, write_shards

SIZES = [(90, 96), (70, 140), (150, 80), (64, 64), (40, 50)]  # height, width; one is stored at the size of its bucket
BUCKETS = {"resolution": 64, "bucket_step": 16, "max_aspect_ratio": 4.0, "min_bucket_rate": 0.0}
OPTIONS = [text for name, value in BUCKETS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
NUM_SAMPLES = 43


@pytest.fixture
def source(tmp_path):
    return write_shards(tmp_path / "source", (17, 11, 15), sizes=SIZES)


def command(source, out, *options):
    """In one process, 9 samples to a shard."""
    shards = ["data", "reshard", str(source), "--out", str(out), "--shard-size", "9"]
    return [*shards, *OPTIONS, "--workers", "1", *options]


def reshard(source, out, *options):
    return main(command(source, out, *options))


def keys_of(tar):
    with tarfile.open(tar) as opened:
        return [name.partition(".")[0] for name in opened.getnames() if name.endswith(".txt")]


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def epoch(folder, *, num_samples=NUM_SAMPLES, **options):
    """{sample: (pixels, caption, original size, crop)} of all samples, as training is given them."""
    data = StreamingDataModule(shards=str(folder), global_batch_size=1, **BUCKETS | {"image_prompt_size": 16} | options)
    loader, seen = iter(data.loader()), {}
    while len(seen) < num_samples:
        batch = next(loader).batch
        key = batch.keys[0].partition("/")[2].rpartition("-")[2]  # the source's keys are unique without their shards
        sizes = (batch.original_sizes[0].tolist(), batch.crop_top_lefts[0].tolist(), batch.target_sizes[0].tolist())
        seen[key] = (batch.content.pixels[0].numpy().astype(int), batch.captions[0], sizes)
    return seen


def test_training_is_given_what_the_source_would_have_given(source, tmp_path):
    assert reshard(source, tmp_path / "out") == 0
    before, after = epoch(source), epoch(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, (pixels, caption, sizes) in before.items():
        assert after[key][1:] == (caption, sizes)
        assert np.abs(after[key][0] - pixels).mean() < 1.5
    stored_exactly = [key for key, (_, _, sizes) in before.items() if sizes[0] == [64, 64]]
    assert stored_exactly
    assert all((before[key][0] == after[key][0]).all() for key in stored_exactly), "not compressed a second time"


def test_the_output_is_of_exact_size_and_one_bucket_to_a_shard(source, tmp_path):
    reshard(source, tmp_path / "out")
    index = build_index(str(tmp_path / "out"))
    options = {name: BUCKETS[name] for name in ("resolution", "max_aspect_ratio")}
    options |= {"step": BUCKETS["bucket_step"], "min_rate": BUCKETS["min_bucket_rate"]}
    buckets, counts, is_exact = choose_buckets(index, **options)
    assert is_exact
    assert len(buckets) == 3
    assert ((counts > 0).sum(axis=0) == 1).all()
    assert counts.sum(axis=0).max() == 9
    in_source, in_output = choose_buckets(build_index(str(source)), **options)[1].sum(axis=1), counts.sum(axis=1)
    assert in_source.tolist() == in_output.tolist()
    content = StreamingDataModule(shards=str(tmp_path / "out"), global_batch_size=2, **BUCKETS).first_batch(2).content
    assert content.separate_prompts is None, "the fast path"


def test_a_shard_mixes_the_source_and_the_seed_decides_how(source, tmp_path):
    for name, seed in (("a", "0"), ("b", "1")):
        reshard(source, tmp_path / name, "--seed", seed)
    orders = [[key for tar in sorted((tmp_path / name).glob("*.tar")) for key in keys_of(tar)] for name in "ab"]
    assert sorted(orders[0]) == sorted(orders[1])
    assert len(set(orders[0])) == NUM_SAMPLES
    assert orders[0] != orders[1]
    for tar in (tmp_path / "a").glob("64x64-0000[012].tar"):
        assert len({key.partition("-")[0] for key in keys_of(tar)}) > 1


def test_no_resize_keeps_every_byte_of_a_picture(source, tmp_path):
    assert reshard(source, tmp_path / "out", "--no-resize") == 0
    before, after = epoch(source), epoch(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all((before[key][0] == after[key][0]).all() and before[key][1:] == after[key][1:] for key in before)


@pytest.mark.parametrize(
    "machines",
    [
        pytest.param([("--workers", "2")], id="two workers"),
        pytest.param([("--num-tasks", "3", "--task-index", index) for index in "201"], id="three machines"),
    ],
)
def test_whoever_works_the_shards_are_the_same(source, tmp_path, machines):
    reshard(source, tmp_path / "alone")
    before: dict[str, bytes] = {}
    for options in machines:
        assert reshard(source, tmp_path / "out", *options) == 0
        now = contents(tmp_path / "out")
        assert len(now) > len(before), "each has a share of its own"
        before = now
    assert before == contents(tmp_path / "alone")


def test_a_slurm_job_array_needs_no_option(source, tmp_path, monkeypatch):
    for number in (4, 6):
        for name, value in (("ID", number), ("MIN", 4), ("STEP", 2), ("COUNT", 2)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert reshard(source, tmp_path / "out") == 0
    monkeypatch.undo()
    assert len(epoch(tmp_path / "out")) == NUM_SAMPLES
    assert {path.name for path in (tmp_path / "out").glob("report*")} == {"report-0-of-2.json", "report-1-of-2.json"}


def killed_at(write, command):
    """Run `ipa` in a fork that is killed as it comes to its ``write``-th sample."""

    def run():
        whole, writes = ShardWriter.write, itertools.count()

        def write_or_die(*args):
            if next(writes) == write:
                os.kill(os.getpid(), signal.SIGKILL)
            whole(*args)

        ShardWriter.write = write_or_die
        main(command)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_again_and_again_it_ends_with_the_same_bytes(source, tmp_path):
    reshard(source, tmp_path / "alone")
    out = tmp_path / "out"
    for write in (0, 13, 4, 10):
        killed_at(write, command(source, out))
    assert list(out.glob(".tmp-*.tar-*"))
    done = {path: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
    assert len(done) >= 2
    assert reshard(source, out) == 0
    assert contents(out) == contents(tmp_path / "alone")
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was there is not done again"
    assert not list(out.glob(".tmp-*"))


def test_bad_samples_are_left_out_counted_and_named(tmp_path, capfd):
    good = {f"{i:04d}": {"jpg": encode(picture(i), quality=95), "txt": "good"} for i in range(18)}
    bad = {"bad0": {"jpg": b"\xff\xd8 no picture", "txt": "x"}, "bad1": {"jpg": encode(picture(1)), "txt": b"\xff"}}
    path = write_shard(tmp_path / "source", 0, good | bad)
    assert reshard(path, tmp_path / "out") == 1
    assert "2 samples are bad, above --max-bad-rate=0.0; first" in capfd.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [text.split(": ")[0] for text in sorted(report["bad"])] == [f"{path}/bad{i}" for i in range(2)]
    assert (report["counts"]["samples"], report["counts"]["bad samples left out"]) == (18, 2)
    assert len(epoch(tmp_path / "out", num_samples=18)) == 18
    assert reshard(path, tmp_path / "out", "--max-bad-rate", "0.1") == 0, "and a re-run still knows of them"


def test_a_shard_without_a_single_sound_sample_is_not_written(tmp_path, capfd):
    path = write_shard(tmp_path / "source", 0, {"a": {"jpg": b"\xff\xd8 no picture", "txt": "x"}})
    assert reshard(path, tmp_path / "out", "--max-bad-rate", "1") == 1
    assert "64x64-00000.tar: not written, all its samples are bad; first" in capfd.readouterr().out
    assert not contents(tmp_path / "out")


def test_shards_of_one_name_keep_their_samples_apart(tmp_path):
    folders = [write_shards(tmp_path / name, (3,)) for name in "ab"]
    out = tmp_path / "out"
    assert main(["data", "reshard", *map(str, folders), "--out", str(out), "--resolution", "32"]) == 0
    (tar,) = out.glob("*.tar")
    assert sorted(keys_of(tar)) == [f"{n}_00000-00000000{i}" for n in range(2) for i in range(3)]


def test_a_second_resharding_still_knows_the_first_source(source, tmp_path):
    reshard(source, tmp_path / "first")
    command = ["data", "reshard", str(tmp_path / "first"), "--out", str(tmp_path / "second"), "--resolution", "32"]
    assert main(command) == 0
    options = {"resolution": 32, "bucket_step": None}
    twice, once = (epoch(tmp_path / name, **options) for name in ("second", "first"))
    assert {key: sizes for key, (_, _, sizes) in twice.items()} == {key: sizes for key, (_, _, sizes) in once.items()}
    height, width = next(sizes[0] for _, _, sizes in twice.values() if sizes[0][0] == 70)
    assert (height, width) == (70, 140)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "seed was 0, now 1"),
        (["--quality", "80", "--bucket-step", "32"], "bucket_step was 16, now 32; quality was 95, now 80"),
        (["--task-index", "2"], "--task-index=2 must be from 0 to --num-tasks - 1 = 0"),
        (["--quality", "101"], "--quality must be from 1 to 100, got 101"),
        (["--shard-size", "0"], "--shard-size must be from 1 to 1000000, got 0"),
    ],
)
def test_what_would_mix_is_refused_in_one_line(source, tmp_path, capfd, options, message):
    reshard(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert reshard(source, tmp_path / "out", *options) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ipa data: ")]
    assert message in line
    assert contents(tmp_path / "out") == before


def test_a_folder_that_an_older_release_began_is_gone_on_with(source, tmp_path, capfd):
    reshard(source, tmp_path / "out")
    mark = tmp_path / "out" / DESCRIPTION
    facts = json.loads(mark.read_text())
    assert facts.pop("carry") is None
    mark.write_text(json.dumps(facts))
    assert reshard(source, tmp_path / "out") == 0
    assert reshard(source, tmp_path / "out", "--carry", "mask", "reference") == 2


def test_other_folders_are_refused(source, tmp_path, capfd):
    reshard(source, tmp_path / "out")
    changed = write_shards(tmp_path / "changed", (3,))
    foreign = write_shards(tmp_path / "foreign", (3,))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / DESCRIPTION).write_text("{")
    for shards, out, message in (
        (changed, tmp_path / "out", "source was "),
        (source, source, "holds the source"),
        (source, foreign, f"holds shards, and no {DESCRIPTION} says what they are"),
        (source, damaged, "damaged (Expecting"),
    ):
        assert reshard(shards, out) == 2
        assert message in capfd.readouterr().err


@pytest.fixture
def paired(tmp_path):
    """Twelve samples with a reference, mask and embedding; the first has none of them, the second no mask."""
    samples = {}
    for i in range(12):
        extras = {
            "ref.webp": encode(picture(50 + i), "WEBP"),
            "mask.png": mask(40, 48),
            "npy": bytes([i]),
        }
        samples[f"{i:03d}"] = {"jpg": encode(picture(i, width=96, height=90)), "txt": f"{i}"} | (extras if i else {})
    del samples["001"]["mask.png"]
    write_shard(tmp_path / "paired", 0, samples)
    return samples, tmp_path / "paired"


def test_what_a_sample_holds_besides_is_refused_or_carried_unchanged(paired, tmp_path, capfd):
    samples, folder = paired
    assert reshard(folder, tmp_path / "out") == 2
    message = "00000.tar: holds KEY.ref.*, KEY.mask.png, KEY.npy: say what to keep, --carry reference mask embedding"
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    written = (folder / "index.json").read_text()
    older = json.loads(written) | {"version": 3}
    for entry in older["shards"].values():
        del entry["extras"], entry["found_extras"]
    (folder / "index.json").write_text(json.dumps(older))
    assert reshard(folder, tmp_path / "out") == 2, "also of shards indexed before anybody looked for it"
    assert message in capfd.readouterr().err
    assert (folder / "index.json").read_text() == written
    assert reshard(folder, tmp_path / "out", "--carry", "mask", "embedding") == 2
    assert "masks of the pictures themselves would not fit the resized ones" in capfd.readouterr().err
    assert reshard(folder, tmp_path / "out", "--carry", "mask", "--no-resize") == 2
    assert "holds KEY.ref.*, and its masks are of these: --carry reference mask" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    for carried, num_incomplete in (("embedding reference", 1), ("reference mask embedding", 2), ("", 0)):
        out = tmp_path / f"out-{carried}"
        assert reshard(folder, out, "--carry", *carried.split()) == 0
        assert (
            json.loads((out / "report.json").read_text())["counts"]["incomplete samples of the source"]
            == num_incomplete
        )
        found = 0
        for path in out.glob("*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    if suffix not in ("jpg", "txt"):
                        assert tar.extractfile(member).read() == samples[key.rpartition("-")[2]][suffix]
                        found += 1
        assert found == len(carried.split()) * (12 - num_incomplete)
        capfd.readouterr()
        assert reshard(folder, out, "--carry", *carried.split(), "--quality", "80") == 2
        assert "made in another way: quality was 95, now 80; give" in capfd.readouterr().err
