"""The benchmarks run on tiny settings, and their figures are complete."""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from benchmarks import cache, loader, scaling, step
from benchmarks.contenders import OurStep, Setting, make_reference, make_training
from benchmarks.equality import Equality, compare
from benchmarks.ladder import OURS, OURS_ONLINE, REFERENCE, REFERENCE_CACHED, Case, make_cases
from benchmarks.scaling_model import Cluster


def run(module, out, *arguments):
    command = [sys.executable, "-m", module.__name__, "--out", str(out), "--rounds", "1", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    figures = json.loads(out.read_text())
    assert {"machine", "python", "versions", "commit", "settings"} <= figures.keys()
    return figures, out.with_suffix(".md").read_text()


def test_cache(tmp_path):
    sizes = ("--shards", "2", "--shard-size", "12", "--batch-size", "4", "--batches", "2")
    figures, markdown = run(cache, tmp_path / "cache.json", *sizes)
    costs = figures["cpu_us_per_sample"]
    assert {cache.OURS, cache.PLAIN, cache.LIMIT} <= costs.keys()
    assert len(costs) + len(figures["not_installed"]) == 7
    assert figures["times_ours"].keys() == costs.keys()
    assert figures["cpu_us_per_sample_with_one_worker"].keys() == {cache.OURS, cache.PLAIN}
    assert all(f"| {name} |" in markdown for name in (*costs, *figures["not_installed"]))


def test_loader(tmp_path):
    sizes = ("--pictures", "4", "--batch-size", "2", "--samples", "40000", "--shards", "40")
    figures, markdown = run(loader, tmp_path / "loader.json", *sizes)
    names = (loader.TUTORIAL, loader.PLAIN, loader.OURS, loader.DEVICE)
    assert {f"{name}, {form}" for name in names for form in loader.FORMS} <= figures["cpu_us_per_sample"].keys()
    assert figures["mean_difference_of_255"].keys() == set(loader.FORMS)
    downloaded = figures["mean_difference_of_255"][loader.FORMS[0]]
    assert max(downloaded.values()) < 0.2, "the parity that the documentation claims"
    for kind in ("one bucket", "10 buckets", "3 mixed sources"):
        assert figures["order"][kind].keys() == {"resume_ms", "us_per_sample", "peak_mb", "replay_10000_steps_ms"}
    assert "| ipa-train, 512 x 512 |" in markdown


def test_scaling(tmp_path):
    sizes = ("--processes", "2", "--width", "32", "--latent-size", "8", "--batch-size", "1", "--steps", "1")
    figures, markdown = run(scaling, tmp_path / "scaling.json", *sizes)
    found = figures["measured"]["by_processes"]
    assert found.keys() == {"2"}
    for group in found.values():
        assert group["bucket_bytes"] == group["modelled_bucket_bytes"]
        assert sum(group["bucket_bytes"]) == group["gradient_bytes"]
        assert group["collectives"] == {"gloo:all_reduce": len(group["bucket_bytes"])}, "and nothing else"
    rows = figures["modelled"]["scaling"]
    assert len(rows) == 16
    overlapped = "overlapped, 25 MiB buckets"
    fp32, bf16 = (next(row for row in rows if row["gradients"] == precision) for precision in scaling.PRECISIONS)
    assert fp32["run"] == bf16["run"]
    assert fp32["exposed"] < fp32[overlapped] < bf16[overlapped], "half the bytes in as many buckets"
    assert scaling.MEASURED in markdown
    assert scaling.MODELLED in markdown


def gpu_commands():
    """Arguments of each run of the step's benchmark that `make gpu` starts."""
    lines = subprocess.run(["make", "-n", "gpu"], check=True, capture_output=True, text=True).stdout.splitlines()
    return [shlex.split(line.partition("benchmarks.step ")[2]) for line in lines if "benchmarks.step " in line]


def test_commands_for_a_gpu():
    found = [step.parse(arguments) for arguments in gpu_commands()]
    assert [(args.base, args.variant, args.resolution) for args in found] == [
        ("sd15", "linear", 512),
        ("sd15", "plus", 512),
        ("sdxl", "linear", 1024),
    ]
    assert all({8, 32} == set(args.batch) and args.up_to > 32 and args.device == "cuda" for args in found)


def test_step(tmp_path):
    """The first of those commands, on a CPU with a tiny model."""
    out = tmp_path / "step.json"
    tiny = "--device cpu --base tiny --resolution 64 --batch 2 1 --up-to 2 --steps 1 --compile none"
    figures, markdown = run(step, out, *gpu_commands()[0], *shlex.split(tiny), "--out", str(out))
    assert Equality(**figures["equality"]).holds
    assert figures["batches"].keys() == {"2", "1"}
    rungs, ends = (figures["batches"][size]["cases"] for size in ("2", "1"))
    assert ends.keys() == {REFERENCE, REFERENCE_CACHED, OURS, OURS_ONLINE}
    assert len(rungs) == 8, "the ends, a lean reference, and three rungs between"
    for cases in (rungs, ends):
        assert cases[REFERENCE]["times_reference"] == 1
        assert all(case["tflops"] > 0 for case in cases.values())
        # Text is encoded on both sides, pictures only where they are not cached.
        assert all(cases[cached]["operations"] < cases[online]["operations"] for online, cached in PAIRS)
    assert rungs["+ our forward"]["operations"] < rungs["+ channels_last"]["operations"]
    assert figures["peak_gib"].keys() == set(step.CASES)
    assert all(peak > 0 for peak in figures["peak_gib"].values())
    assert figures["largest_batches"] == {REFERENCE: 2, OURS: 2}
    assert all(f"| {name} |" in markdown for name in rungs)


PAIRS = ((REFERENCE, REFERENCE_CACHED), (OURS_ONLINE, OURS))


# What autocast makes of norms whose weights are fp32, as every script that trains Flux under it is told.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_step_without_a_tutorial():
    setting = Setting("tiny-flux", "linear", 128, "cpu")
    assert compare(setting, 8).holds
    ours, reference = OurStep(make_training(setting)), make_reference(setting)
    before = [weight.clone() for weight in reference.trained]
    cases = make_cases(setting, ours, reference, 2, compiled="none", every_rung=True)
    found = step.run_cases(cases, "cpu", rounds=1, num_steps=1)["cases"]
    assert found.keys() == {REFERENCE, REFERENCE_CACHED, "reference, cached, lean", "bf16 weights", OURS, OURS_ONLINE}
    assert found[OURS]["operations"] < found[REFERENCE_CACHED]["operations"], "no casts of weights"
    assert any(not weight.equal(old) for weight, old in zip(reference.trained, before, strict=True))
    assert reference.base.denoiser.dtype == torch.float32


def small_product():
    torch.ones(8, 8) @ torch.ones(8, 8)


def too_much():
    raise torch.OutOfMemoryError


def test_a_step_that_does_not_fit():
    cases = {REFERENCE: Case(dict, small_product), OURS: Case(dict, too_much)}
    found = step.run_cases(cases, "cpu", rounds=1, num_steps=1)
    assert found["cases"][REFERENCE]["operations"] == 3, "two tensors and their product"
    assert found["cases"][OURS] == step.OUT_OF_MEMORY


@pytest.mark.parametrize(("limit", "largest"), [(70, 64), (8, 8), (7, 0), (1000, 128)])
def test_largest_batch(limit, largest):
    def cases_of(size):
        return {OURS: Case(dict, small_product if size <= limit else too_much)}

    assert step.largest_batch(cases_of, OURS, first=8, up_to=128) == largest


@pytest.mark.parametrize(
    ("num_bytes", "gpus", "nics", "milliseconds"),
    [(89.3e6, 8, 1, 0.5), (89.3e6, 64, 1, 4.4), (89.3e6, 4096, 8, 1.2), (703e6, 64, 8, 7.4), (1405e6, 512, 1, 76.2)],
)
def test_model_of_the_all_reduce(num_bytes, gpus, nics, milliseconds):
    """As worked out by hand: twice the share that leaves a GPU, then a node, over the bandwidth, and the hops."""
    assert 1e3 * Cluster().all_reduce(num_bytes, gpus, nics) == pytest.approx(milliseconds, abs=0.05)


def test_model_of_overlap():
    cluster, step = Cluster(), 0.372
    whole = cluster.all_reduce(89.3e6, 64, 1)
    assert cluster.exposed([89.3e6], step, 64, 1) == pytest.approx(whole), "one bucket is full when the backward ends"
    halved = cluster.exposed([44.65e6] * 2, step, 64, 1)
    assert halved == pytest.approx(cluster.all_reduce(44.65e6, 64, 1)), "all but the last is hidden"
    slow = cluster.exposed([44.65e6] * 2, whole / 10, 64, 1)
    assert slow > whole / 2, "a step that is shorter than its all-reduce hides little of it"
    assert 100 * cluster.efficiency(step, whole, 64) == pytest.approx(97.4, abs=0.05)
    assert 100 * cluster.efficiency(step, 0, 1) == 100
