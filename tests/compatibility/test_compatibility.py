"""Every combination trains, resumes to the bit, tells of its image use, exports, and draws in diffusers as here."""

import pytest
import torch
from safetensors.torch import load_file

from ipa_train.adapter import IPAdapter
from ipa_train.cli.binding import instantiate
from ipa_train.cli.build import build_data, build_module
from ipa_train.cli.config import load_config
from ipa_train.cli.main import main
from ipa_train.eval.generate import generate
from ipa_train.eval.pipeline import load_pipeline
from ipa_train.export import describe, loadability, read_adapter_file, to_interchange
from ipa_train.export.warm_start import image_encoder_of
from tests.compatibility.conftest import EMBEDDING_DIM
from tests.compatibility.rows import BASELINES, ROWS, Finding, table_rows
from tests.official import WIDTHS, official_denoiser, official_sites

MEASURED = [f"callbacks.image_use.{option}" for option in ("every_steps=2", "num_samples=8", "batch_size=4")]


@pytest.fixture
def overrides(base_folder, encoder_folder, shards):
    """A function from a row to the options of a run on tiny models."""

    def options(row):
        chosen = [f"base={row.base}", f"adapter={row.adapter}", f"image_encoder={row.image_encoder}"]
        chosen += [f"base.path={base_folder(row.base)}", "base.dtype=float32", f"data.shards={shards}"]
        chosen += ["data.resolution=32", "data.global_batch_size=4", "data.num_workers=0", "trainer=cpu", "ema=none"]
        chosen += ["trainer.log_every_n_steps=1", "callbacks.sample_grid.every_steps=0", "optimizer.lr=0.01"]
        if row.image_encoder in ("stored", "face"):
            chosen += [f"image_encoder.dim={EMBEDDING_DIM}"]
        if row.image_encoder != "stored":
            chosen += [f"image_encoder.path={encoder_folder(row.image_encoder)}", "image_encoder.subfolder=''"]
            chosen += ["image_encoder.dtype=float32"]
        if row.image_encoder.startswith("dino"):
            chosen += ["image_encoder.image_size=32"]
        if row.adapter == "sd3":
            chosen += ["adapter.projector.dim=64", "adapter.projector.heads=1", "adapter.projector.num_tokens=4"]
        if row.base.startswith(("sd3", "flux")):
            chosen += ["base.max_t5_tokens=32", "timesteps=logit_normal"]
        if row.adapter.startswith("faceid") and row.adapter != "faceid_portrait":
            chosen += ["adapter.sites.lora_rank=4"]
        return chosen

    return options


def trained(tmp_path, name, options, *steps):
    """The folder of the last checkpoint of a run that stops and goes on after each of ``steps``."""
    for max_steps in steps:
        words = ["train", *options, f"run.name={name}", f"run.path={tmp_path / name}", f"trainer.max_steps={max_steps}"]
        assert main(words) == 0
    return tmp_path / name / "checkpoints" / f"step-{steps[-1]:08d}"


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("row", [*ROWS, *BASELINES], ids=str)
def test_row(row, overrides, tmp_path, capfd, findings, request):
    options = overrides(row)
    whole = trained(tmp_path, "whole", [*options, *MEASURED], 3)
    parts = trained(tmp_path, "parts", options, 1, 3)
    assert "val/gap_other" in (tmp_path / "whole" / "metrics.csv").read_text()
    assert_same(load_file(parts / "adapter.safetensors"), load_file(whole / "adapter.safetensors"))

    out = tmp_path / "exported"
    capfd.readouterr()
    status = main(["export", str(whole), "--dtype", "fp32", "--out", str(out)])
    if row in BASELINES:
        assert status == 2
        assert "baseline" in capfd.readouterr().err
        adapter, _ = official_adapter(row)
        finding = Finding(row, num_parameters(adapter), {}, None)
    else:
        assert status == 0
        file = out / "ip_adapter.safetensors"
        error = parity_error(row, [*options, "run.name=x"], whole, file)
        assert error < 1e-5
        adapter, sites = official_adapter(row)
        description = describe(to_interchange(adapter, sites), source=str(row))
        assert description.num_parameters == num_parameters(adapter)
        verdicts = loadability(description, image_encoder_of(read_adapter_file(file)[1]))
        finding = Finding(row, num_parameters(adapter), {v.loader: str(v) for v in verdicts}, error)
    findings.append(finding)
    if request.config.getoption("--write-table"):
        return
    assert [cells[:-1] for cells in table_rows() if cells[:3] == finding.cells()[:3]] == [finding.cells()]


@torch.no_grad()
def parity_error(row, options, checkpoint, file):
    """Of the denoiser's first forward while drawing: the training graph, and diffusers with the exported file."""
    config = load_config([*options, f"adapter.init_from={file}"])
    module = build_module(config)
    assert_same(module.state_dict(), load_file(checkpoint / "adapter.safetensors"))
    assert_same(to_interchange(module.adapter, module.sites), load_file(file))

    guidance_scale = 1.0 if row.base.startswith("flux") else 3.0
    data = build_data(config, module)
    _, features = module.encode(data.first_batch(1))
    shape = {"size": (32, 32), "seed": 7, "num_inference_steps": 1, "guidance_scale": guidance_scale}

    def draw():
        generate(module.base, module.adapter, features, module.null_features, ["a cat"], **shape)

    own = first_output(module.base, draw)
    module.adapter.scale = 0.0
    without = first_output(module.base, draw)

    loaded = load_pipeline(config.base.path, file, config.image_encoder.get("path", ""), dtype="float32", device="cpu")
    loaded.pipeline.set_progress_bar_config(disable=True)
    theirs = first_output(
        loaded.base,
        lambda: loaded.draw(
            "a cat",
            features,
            height=32,
            width=32,
            num_inference_steps=1,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(7),
            **({"max_sequence_length": 32} if row.base.startswith(("sd3", "flux")) else {}),
        ),
    )
    assert relative_error(without, own) > 1e-3, "an adapter that does nothing proves nothing"
    return relative_error(theirs, own)


def official_adapter(row):
    """An adapter of the official sizes, and its sites; they take no memory."""
    sdxl_plus = (row.base, row.adapter) == ("sdxl", "plus")
    options = ["adapter.projector.dim=1280", "adapter.projector.heads=20"] if sdxl_plus else []
    config = load_config(["run.name=x", "data.shards=x", f"adapter={row.adapter}", *options])
    projector = instantiate(config.adapter.projector)
    widths = [WIDTHS[row.image_encoder][kind] for kind in projector.func.feature_kinds]
    with torch.device("meta"):
        sites = official_sites(row.base, **{k: v for k, v in config.adapter.get("sites", {}).items() if k[0] != "_"})
        sizes = dict(zip(("feature_dim", "hidden_dim"), widths, strict=False))
        denoiser = official_denoiser(row.base) if config.adapter.get("train_denoiser") else None
        projector = projector(**sizes, context_dim=sites[0].context_dim)
        return IPAdapter(projector=projector, sites=sites, denoiser=denoiser), sites


def num_parameters(adapter):
    return sum(weight.numel() for weight in adapter.parameters())


def first_output(base, draw):
    outputs = []
    last = base.unet.conv_out if hasattr(base, "unet") else base.transformer.proj_out
    handle = last.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    draw()
    handle.remove()
    return outputs[0]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_table_has_these_rows_alone():
    assert [cells[:3] for cells in table_rows()] == [[r.base, r.adapter, r.image_encoder] for r in [*ROWS, *BASELINES]]
