"""The view of a Weights & Biases project: saved on a server, it shows what runs log."""

import csv

import pytest

from ipa_train.cli.main import main
from ipa_train.training.callbacks.image_use import ImageUse
from tests.end_to_end.wandb_server import Dashboards

ELSEWHERE = {"val/clip_i", "val/clip_t", "val/dino", "perf/tflops", "perf/mfu"}
"""Logged with models to score by, after ten steps, and on a GPU."""
OF_SEVERAL_RANKS = {"perf/straggler_fraction", "perf/slowest_rank"}


@pytest.fixture
def server(monkeypatch):
    with Dashboards().running() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server


def test_every_plot_of_the_view_shows_what_a_run_logs(server, run, capfd):
    assert main(["workspace", "me/adapters"]) == 0
    assert capfd.readouterr().out.startswith(f"{server.url}/me/adapters?nw=")
    (view,) = server.views["me", "adapters"]
    assert view["name"] == "ipa-train"
    sections = {section["name"]: section["panels"] for section in view["section"]["panelBankConfig"]["sections"]}
    (pictures,) = sections.pop("Pictures")
    assert pictures["config"]["mediaKeys"] == ["samples"], "the name under which sample grids are logged"
    shown = [name for panels in sections.values() for panel in panels for name in panel["config"]["metrics"]]
    assert len(shown) == len(set(shown))
    with (run / "metrics.csv").open() as file:
        logged = set(next(csv.reader(file)))
    logged |= {*ImageUse().metric_names, *ELSEWHERE, *OF_SEVERAL_RANKS}
    assert {name for name in shown if not name.startswith("system/")} <= logged


def test_one_line_for_what_the_server_refuses_and_for_what_is_missing(server, monkeypatch, tmp_path, capfd):
    server.refuses = True
    assert main(["workspace", "me/adapters"]) == 2
    assert "me/adapters: the view was not saved: " in (errors := capfd.readouterr().err)
    assert "permission denied" in errors
    assert main(["workspace", "adapters"]) == 2
    assert capfd.readouterr().err == "ipa workspace: adapters: give ENTITY/PROJECT, as in the address of its page.\n"
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert main(["workspace", "me/adapters"]) == 2
    assert "wandb login" in capfd.readouterr().err
    assert not server.views
