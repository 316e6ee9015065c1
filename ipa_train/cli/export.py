"""Write an adapter as .safetensors and .bin in the interchange layout.

    ipa export outputs/first --dtype fp16 --out exported
    ipa export pytorch_model.bin --out exported
    ipa export outputs/first --out for_the_hub --card --license apache-2.0 --scores results/first

diffusers, ComfyUI and Tencent's code load the result unchanged. Every checkpoint already holds an fp32 export of the
averaged weights; this verb gives another precision, or the weights before averaging. Given a file, it rewrites that: an
adapter in any layout that `ipa import` reads, among them the dumps of Tencent's training scripts. With --card the
folder is ready for the Hugging Face hub, see `ipa push`: a README.md beside the weights, and the run's latest grid.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ipa_train.cli.card import newest_grid, read_recipe, read_scores, run_of
from ipa_train.errors import CheckpointError, ConfigError, ExportError
from ipa_train.export.card import CARD, PICTURE, Card, Scores, require_licence
from ipa_train.export.description import AdapterDescription, describe
from ipa_train.export.file import NAME, NO_EXPORT, face_plus_v2, read_adapter_file, write_state
from ipa_train.export.loadability import loadability, require_loadable
from ipa_train.export.usage import paste_lines
from ipa_train.export.warm_start import image_encoder_of
from ipa_train.runtime.files import atomic_write
from ipa_train.training.checkpoint import newest_valid, verify
from ipa_train.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", type=Path, help="a run (its newest checkpoint), a checkpoint, or an adapter's file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16")
    parser.add_argument(
        "--layout", choices=["interchange", "xlabs"], default="interchange", help="xlabs: the names of XLabs' Flux code"
    )
    parser.add_argument("--no-ema", action="store_true", help="the trained weights, not their average")
    parser.add_argument("--card", action="store_true", help="write a model card, README.md, beside the weights")
    parser.add_argument("--title", help="of the card; by default the name of the run or file")
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card: apache-2.0, openrail and so on")
    parser.add_argument("--scores", type=Path, metavar="RESULTS", help="folder of ipa eval --out, for the card")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    if (args.out / "manifest.json").exists():
        raise ExportError(f"--out {args.out}: this is a checkpoint, which an export there would damage; name another.")
    _check_card_options(args)
    scores = None if args.scores is None else read_scores(args.scores)
    state, metadata = _read_file(args) if args.source.is_file() else _read_checkpoint(args)
    description = describe(state, source=str(args.source))
    require_loadable(description, source=str(args.source))
    if args.layout == "xlabs" and description.family != "flux":
        raise ConfigError(
            f"--layout xlabs is for adapters of Flux, and {args.source} is one of another family: leave it."
        )
    try:
        paths = write_state(args.out, state, dtype=args.dtype, metadata=metadata, layout=args.layout)
        if args.card:
            paths += _write_card(args, description, metadata, scores)
    except OSError as error:
        raise ExportError(f"--out {args.out}: cannot write there: {error.strerror or error}.") from error
    for path in paths:
        sys.stdout.write(f"{path}  {path.stat().st_size / 1e6:.1f} MB\n")
    for verdict in loadability(description, image_encoder_of(metadata)):
        sys.stdout.write(f"{verdict.loader}: {verdict}\n")
    if account := image_encoder_of(metadata):
        kind, shortcut = description.feature_kinds[0], metadata.get("shortcut") == "true"
        lines = paste_lines(account, kind, family=description.family, shortcut=shortcut)
        sys.stdout.write(f"\nHow to use it in diffusers:\n\n{lines}" if lines else "")
    return 0


def _check_card_options(args: argparse.Namespace) -> None:
    given = [name for name in ("title", "license", "scores") if getattr(args, name) is not None]
    if given and not args.card:
        raise ConfigError(f"--{given[0]} is for a model card: add --card, or leave it.")
    require_licence(args.license)


def _write_card(
    args: argparse.Namespace, description: AdapterDescription, metadata: dict[str, Any], scores: Scores | None
) -> list[Path]:
    """Write the card, and the sample grid that it shows where there is one."""
    run = None if args.source.is_file() else run_of(args.source)
    grid = None if run is None else newest_grid(run, step=int(metadata["step"]))
    paths = [args.out / CARD]
    if grid is not None:
        with atomic_write(args.out / PICTURE) as temporary:
            shutil.copyfile(grid, temporary)
        paths.append(args.out / PICTURE)
    card = Card(
        title=args.title or (args.source.stem if run is None else run.absolute().name),
        adapter=description,
        metadata=metadata | {"ipa_train_version": metadata.get("ipa_train_version", __version__)},
        dtype=args.dtype,
        recipe={} if run is None else read_recipe(run),
        scores=scores,
        has_picture=grid is not None,
        licence=args.license,
    )
    with atomic_write(args.out / CARD) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return paths


def _read_file(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if args.no_ema:
        raise ConfigError(f"--no-ema chooses among a checkpoint's weights, and {args.source} is one adapter: leave it.")
    state, metadata = read_adapter_file(args.source)
    if describe(state, source=str(args.source)).variant == "faceid_plus":
        # The name of the new file will not say it, as those of released ones do.
        version = face_plus_v2(args.source, metadata)
        metadata |= {} if version is None else {"shortcut": json.dumps(version)}
    return state, {key: value for key, value in metadata.items() if key != "state_names"}


def _read_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    checkpoint = find_checkpoint(args.source)
    _, metadata = read_adapter_file(checkpoint / f"{NAME}.safetensors")
    names = json.loads(metadata.pop("state_names"))
    averaged = (checkpoint / "ema.safetensors").exists() and not args.no_ema
    weights = load_file(checkpoint / ("ema.safetensors" if averaged else "adapter.safetensors"))
    weights = {name.removeprefix("adapter."): weight for name, weight in weights.items()}
    return {theirs: weights[ours] for ours, theirs in names.items()}, metadata | {"ema": averaged}


def find_checkpoint(source: Path) -> Path:
    """A checkpoint, or the newest valid one of a run's folder; it holds an export.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ExportError: what was trained is no adapter that a file could hold.
    """
    checkpoint: Path | None = source
    if (source / "manifest.json").is_file():
        verify(source)
    else:
        checkpoint = newest_valid(source / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run with checkpoints; give outputs/RUN_NAME.")
    if (checkpoint / NO_EXPORT).is_file():
        raise ExportError(f"{checkpoint}: there is nothing to export: {(checkpoint / NO_EXPORT).read_text().strip()}.")
    return checkpoint
