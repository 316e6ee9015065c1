"""TensorBoard as a second logger: what `metrics.csv` says, the grids, and no step twice after a resume."""

import csv
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ipa_train.cli.main import main
from tests.end_to_end.conftest import train_arguments


@pytest.fixture(scope="module")
def resumed(tiny_models, shards, tmp_path_factory):
    """A run that has lost a step since its last checkpoint, and went on."""
    folder = tmp_path_factory.mktemp("boards")
    command = train_arguments(tiny_models, shards, folder, "run", "logger=tensorboard")
    command += ["callbacks.checkpointing.every_steps=2", "callbacks.sample_grid.every_steps=2"]
    command += ["callbacks.sample_grid.num_inference_steps=1", "callbacks.sample_grid.num_images=1"]
    assert main([*command, "trainer.max_steps=3"]) == 0
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000003")
    assert main([*command, "trainer.max_steps=4"]) == 0
    return folder / "run"


def test_tensorboard_shows_what_the_csv_says_and_every_step_once(resumed):
    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    with (resumed / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    for name in ("train/loss", "train/grad_norm", "data/dropped_text"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert len(events.Scalars(name)) == len(shown) == 4
        assert shown == pytest.approx({step: float(row[name]) for step, row in rows.items()}, rel=1e-6)


def test_tensorboard_shows_the_grids(resumed):
    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4]
