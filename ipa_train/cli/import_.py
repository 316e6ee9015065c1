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
from ipa_train.export.warm_start import image_encoder_of

# By family, width of the image tokens and number of sites.
_BASES = {
    ("unet", 768, 16): "SD 1.x",
    ("unet", 1024, 16): "SD 2.x",
    ("unet", 2048, 70): "SDXL or Kolors",
    ("sd3", 2432, 38): "SD 3.5 large",
    ("sd3", 1536, 37): "SD 3.5 medium",
    ("sd3", 1536, 24): "SD 3 medium",
    ("flux", 4096, 19): "Flux",
    ("instantx_flux", 4096, 57): "Flux",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("file", type=Path, help=".safetensors or .bin")


def run(args: argparse.Namespace) -> int:
    """Read and describe."""
    state, metadata = read_adapter_file(args.file)
    found = describe(state, source=str(args.file))
    tokens = "one per hidden state" if found.num_tokens is None else str(found.num_tokens)
    num_sites = len(found.site_dims)
    base = _BASES.get((found.family, found.context_dim, num_sites), "unknown")
    widths = f"width {found.feature_dim}" + (f", hidden states of width {found.hidden_dim}" if found.hidden_dim else "")
    facts = {
        "variant": found.variant,
        "base": f"{base} (image tokens of width {found.context_dim}, {num_sites} sites)",
        "image features": f"{' and '.join(found.feature_kinds)}, {widths}",
        "image tokens": tokens,
        "parameters": f"{found.num_parameters:,}",
        "precision": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in state.values()})),
    }
    if found.lora_rank:
        facts["LoRA"] = f"rank {found.lora_rank}"
    facts |= {verdict.loader: str(verdict) for verdict in loadability(found, image_encoder_of(metadata))}
    facts |= {name: text for name, text in metadata.items() if name not in ("format", "state_names")}
    width = max(len(name) for name in facts)
    for name, text in facts.items():
        # Somebody else's metadata must not move the cursor or end the line.
        printable = "".join(c if c.isprintable() else " " for c in f"{name:<{width}}  {text}")
        sys.stdout.write(f"{printable}\n")
    return 0
