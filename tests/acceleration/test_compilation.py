"""Compiled steps are plain ones, and blocks of one kind are compiled once, however many there are."""

import json
import subprocess
import sys

import pytest


def compiled_steps(tiny_flux, *arguments):
    command = [sys.executable, "-m", "tests.acceleration.compiled_step", str(tiny_flux[0]), *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


@pytest.mark.parametrize(("compile", "checkpointing"), [("blocks", "selective"), ("whole", "none")])
def test_what_is_compiled_once_for_a_size_and_once_for_all_others(tiny_flux, compile, checkpointing):
    steps = compiled_steps(tiny_flux, compile, checkpointing, "aot_eager")
    assert max(distance for distance, _ in steps["rows"]) < 1e-5
    first, *others = (graphs for _, graphs in steps["rows"])
    assert first < steps["blocks"] / 2
    assert others == [2 * first] * 3


@pytest.mark.full_size
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_machine_code_gives_the_same_loss_and_gradients(tiny_flux, compile):
    """Slow for the compiler's sake: minutes."""
    steps = compiled_steps(tiny_flux, compile, "selective", "inductor")
    assert max(distance for distance, _ in steps["rows"]) < 1e-5
