"""Lay out a Weights & Biases project: what tells whether an adapter learns comes first, machines last.

    ipa workspace me/ipa-train

Saves a view named "ipa-train" in the project, a new one each time; every run of the project can be seen by it.
logger.wandb.project is where training writes to. Log in before by `wandb login`; a server of your own is named by
WANDB_BASE_URL. Runs that were made offline are there after `wandb sync`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ipa_train.errors import ConfigError, UserError

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "ipa-train"
STEP = "trainer/global_step"
"""What Lightning's logger counts by: with wandb's own step a resumed run would overlap itself."""

QUARTERS = [f"_t{i}" for i in range(4)]
LINES = {
    "Does it learn?": [
        ["val/gap_other"],
        ["val/gap_none"],
        [f"val/gap_other{quarter}" for quarter in QUARTERS],
        ["val/loss"],
        ["val/image_to_text"],
        ["val/clip_i"],
        ["val/clip_t"],
        ["val/dino"],
    ],
    "Pictures": [],
    "Training": [
        ["train/loss"],
        [f"train/loss{quarter}" for quarter in QUARTERS],
        ["train/grad_norm"],
        ["train/lr"],
        ["train/skipped_steps"],
    ],
    "Data": [
        ["data/dropped_text", "data/dropped_image", "data/dropped_both"],
        ["data/bad_fraction"],
        ["data/bad_samples", "data/bad_shards"],
        ["data/epochs"],
    ],
    "Speed": [
        ["perf/images_per_second"],
        ["perf/data_wait_fraction"],
        ["perf/tflops"],
        ["perf/mfu"],
        ["perf/peak_memory_gib"],
        ["perf/straggler_fraction"],
        ["perf/slowest_rank"],
    ],
    "System": [["system/gpu.0.gpu"], ["system/gpu.0.memoryAllocated"], ["system/cpu"], ["system/memory_percent"]],
}
"""The metrics of each line plot, by section; docs/metrics.md and docs/training.md say what they are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="whose is it, and its name")


def run(args: argparse.Namespace) -> int:
    """Save the view, and print where it is seen."""
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", args.project):
        raise ConfigError(f"{args.project}: give ENTITY/PROJECT, as in the address of its page.")
    if find_spec("wandb_workspaces") is None:
        raise ConfigError("ipa workspace needs a package: pip install 'ipa-train[workspace]'.")
    workspace = layout(*args.project.split("/"))
    try:
        workspace.save()  # type: ignore[no-untyped-call]
        sys.stdout.write(f"{workspace.url}\n")
    except Exception as error:  # wandb's have no class in common
        raise UserError(f"{args.project}: the view was not saved: {error}") from error
    return 0


def layout(entity: str, project: str) -> "Workspace":
    """The view, not yet saved; whatever else a run logs gets panels below it."""
    from wandb_workspaces.workspaces import Workspace, WorkspaceSettings

    return Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[_section(name, lines) for name, lines in LINES.items()],
        settings=WorkspaceSettings(x_axis=STEP),
        auto_generate_panels=True,
    )


def _section(name: str, lines: Sequence[Sequence[str]]) -> "Section":
    from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser
    from wandb_workspaces.workspaces import Section

    panels: list[Any] = [MediaBrowser(media_keys=["samples"], num_columns=1)] if name == "Pictures" else []
    x = "Relative Time" if name == "System" else STEP
    panels += [LinePlot(x=x, y=list(metrics)) for metrics in lines]
    return Section(name=name, panels=panels, is_open=True)
