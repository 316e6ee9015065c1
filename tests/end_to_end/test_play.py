"""`ipa play` of a run: by its newest checkpoint, on the base and by the image encoder of its config."""

import json
import signal
import urllib.request

import pytest

from tests.serving import serving


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
