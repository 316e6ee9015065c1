"""`ipa play` of a run: by its newest checkpoint, on the base and by the image encoder of its config."""

import json
import shutil
import signal
import urllib.request

import pytest
import yaml

from ipa_train.cli.main import main
from tests.serving import free_port, serving


def test_a_run_is_tried_with_nothing_said_of_its_models(run, tiny_models, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with serving(["play", run]) as (address, process):
        with urllib.request.urlopen(f"{address}config") as answer:
            page = json.dumps(json.load(answer))
            policy = answer.headers["content-security-policy"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, "Ctrl-C ends it, as it ends the other verbs"
    assert address.startswith("http://127.0.0.1:")
    assert "default-src 'self'" in policy
    assert "run, step-00000004" in page
    assert f"base {tiny_models[0]}" in page.replace("\\\\", "")


def test_the_very_weights_that_a_run_names_are_asked_for(run, tmp_path, capfd):
    pytest.importorskip("gradio")
    copy = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["base"]["variant"] = "half"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    (checkpoint, *_) = (copy / "checkpoints").glob("step-*")
    for source in (copy, checkpoint):
        assert main(["play", str(source), "--port", str(free_port())]) == 2
        *_, line = capfd.readouterr().err.splitlines()
        assert "cannot load this base" in line
        assert "half" in line
    (copy / "config.yaml").write_text("base: []")
    assert main(["play", str(copy), "--port", str(free_port())]) == 2
    assert "config.yaml: not the config of a run" in capfd.readouterr().err
