"""Say what an adapter file is, and who can load it.

    ipa import ip-adapter_sd15.bin

To train on from it, give it to `ipa train` as adapter.init_from=FILE. Nothing is ever unpickled.
"""

import argparse
import sys
from pathlib import Path

from ipa_train.export.description import describe
from ipa_train.export.file import read_adapter_file
from ipa_train.export.loadability import loadability

# By text width and number of sites.
_BASES = {(768, 16): "SD 1.x", (1024, 16): "SD 2.x", (2048, 70): "SDXL or Kolors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("file", type=Path, help=".safetensors or .bin")


def run(args: argparse.Namespace) -> int:
    """Read and describe."""
    state, metadata = read_adapter_file(args.file)
    found = describe(state, source=str(args.file))
    tokens = "one per hidden state" if found.num_tokens is None else str(found.num_tokens)
    num_sites = len(found.site_dims)
    base = _BASES.get((found.context_dim, num_sites), "unknown")
    facts = {
        "variant": found.variant,
        "base": f"{base} (text width {found.context_dim}, {num_sites} sites)",
        "image features": f"width {found.feature_dim}",
        "image tokens": tokens,
        "parameters": f"{found.num_parameters:,}",
        "precision": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in state.values()})),
    }
    facts |= {v.loader: "loads" if v.ok else "; ".join(v.reasons) for v in loadability(found)}
    facts |= {name: text for name, text in metadata.items() if name not in ("format", "state_names")}
    width = max(len(name) for name in facts)
    for name, text in facts.items():
        # Somebody else's metadata must not move the cursor or end the line.
        printable = "".join(c if c.isprintable() else " " for c in f"{name:<{width}}  {text}")
        sys.stdout.write(f"{printable}\n")
    return 0
