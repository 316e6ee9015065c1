"""Write a checkpoint's adapter as .safetensors and .bin in the interchange layout.

    ipa export outputs/first --dtype fp16 --out exported

diffusers, ComfyUI and Tencent's code load the result unchanged. Every checkpoint already holds an fp32 export of the
averaged weights; this verb gives another precision, or the weights before averaging.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from ipa_train.errors import CheckpointError, ExportError
from ipa_train.export.file import NAME, read_adapter_file, write_state
from ipa_train.export.layouts import describe
from ipa_train.export.loadability import loadability
from ipa_train.training.checkpoint import newest_valid, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", type=Path, help="a run's folder (its newest checkpoint), or one checkpoint's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--no-ema", action="store_true", help="the trained weights, not their average")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    checkpoint = _find_checkpoint(args.source)
    _, metadata = read_adapter_file(checkpoint / f"{NAME}.safetensors")
    names = json.loads(metadata.pop("state_names"))
    averaged = (checkpoint / "ema.safetensors").exists() and not args.no_ema
    weights = load_file(checkpoint / ("ema.safetensors" if averaged else "adapter.safetensors"))
    weights = {name.removeprefix("adapter."): weight for name, weight in weights.items()}
    state = {names[name]: weights[name] for name in names}
    verdicts = loadability(describe(state, source=str(checkpoint)))
    if not verdicts[0].ok:
        raise ExportError(f"{checkpoint}: diffusers would not load this adapter: {'; '.join(verdicts[0].reasons)}.")
    paths = write_state(args.out, state, dtype=args.dtype, metadata=metadata | {"ema": averaged})
    for path in paths:
        sys.stdout.write(f"{path}  {path.stat().st_size / 1e6:.1f} MB\n")
    for verdict in verdicts:
        sys.stdout.write(f"{verdict.loader}: {'loads' if verdict.ok else '; '.join(verdict.reasons)}\n")
    return 0


def _find_checkpoint(source: Path) -> Path:
    if (source / "manifest.json").is_file():
        verify(source)
        return source
    newest = newest_valid(source / "checkpoints")
    if newest is None:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run with checkpoints; give outputs/RUN_NAME.")
    return newest
