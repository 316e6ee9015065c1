"""Compiled steps are plain ones, and blocks of one kind are compiled once, however many there are."""

import json
import shutil
import subprocess
import sys

import pytest
from diffusers import FluxTransformer2DModel

from ipa_train.bases.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Flux of so many blocks that it shows whether they share what is compiled."""
    pipeline = tiny_pipeline("flux")
    config = {**pipeline.transformer.config, "num_layers": 5, "num_single_layers": 6}
    pipeline.register_modules(transformer=FluxTransformer2DModel(**config))
    pipeline.save_pretrained(path := tmp_path_factory.mktemp("deep_flux"))
    return path


def compiled_steps(folder, *arguments):
    command = [sys.executable, "-m", "tests.acceleration.compiled_step", str(folder), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def test_blocks_of_one_kind_share_what_is_compiled_for_a_size_and_for_all_others(folder):
    steps = compiled_steps(folder, "blocks", "selective", "aot_eager")
    assert max(distance for distance, _ in steps["rows"]) < 1e-5
    first, *others = (graphs for _, graphs in steps["rows"])
    # Double blocks before, at and after the first gradient; the first single block, whose input is laid out otherwise.
    assert first <= 5 < steps["blocks"]
    assert len(set(others)) == 1, "a third size and the first again compile nothing"
    assert others[0] <= 2 * first


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) for what torch.compile writes")
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_machine_code_gives_the_same_loss_and_gradients(tiny_flux, compile):
    """Slow for the compiler's sake: minutes."""
    steps = compiled_steps(tiny_flux[0], compile, "selective", "inductor")
    assert max(distance for distance, _ in steps["rows"]) < 1e-5
