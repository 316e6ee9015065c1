"""A callback of a user's own, by which a run tells what its ranks were given."""

import json
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Recorder(Callback):
    """Appends step and positions of every micro-batch to ``folder/RANK.jsonl``."""

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.folder.mkdir(exist_ok=True)
        line = json.dumps([trainer.global_step + 1, batch.positions.tolist()])
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(line + "\n")


def recorded(folder):
    """{step: positions}, those of the ranks one behind the other."""
    steps = {}
    for file in sorted(folder.iterdir()):
        for step, positions in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(step, []).extend(positions)
    return steps
