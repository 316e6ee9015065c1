"""What the verbs that draw with an adapter file have in common: which file, on which base, by which encoder."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipa_train.errors import ConfigError
from ipa_train.runtime.device import local_device

if TYPE_CHECKING:
    from ipa_train.eval.pipeline import AdapterPipeline

USUAL_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
USUAL_ENCODER = "h94/IP-Adapter"


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that :func:`open_pipeline` reads."""
    parser.add_argument("--adapter", type=Path, required=True, help=".safetensors or .bin")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Those among them that say which models the adapter goes with."""
    parser.add_argument("--base", default=USUAL_BASE, help="diffusers folder or hub id")
    parser.add_argument("--image-encoder", default=USUAL_ENCODER, help="folder or hub id")
    parser.add_argument("--image-encoder-subfolder", help="default: models/image_encoder for h94/IP-Adapter, else none")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")


def encoder_subfolder(args: argparse.Namespace) -> str:
    """Where the image encoder lies in its folder or repository."""
    if args.image_encoder_subfolder is not None:
        return str(args.image_encoder_subfolder)
    return "models/image_encoder" if args.image_encoder == USUAL_ENCODER else ""


def precision(args: argparse.Namespace) -> str:
    """The precision that was asked for, or that of the device."""
    return args.dtype or ("bfloat16" if local_device().type == "cuda" else "float32")


def open_pipeline(args: argparse.Namespace, **base_options: Any) -> "AdapterPipeline":
    """Load what the arguments name, onto this process's device; ``base_options`` go to ``load_base``.

    Raises:
        ConfigError, ExportError: something cannot be loaded, or does not belong together.
    """
    from ipa_train.eval.pipeline import load_pipeline

    return load_pipeline(
        args.base,
        args.adapter,
        args.image_encoder,
        subfolder=encoder_subfolder(args),
        dtype=precision(args),
        device=str(local_device()),
        **base_options,
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says, when ``--out`` cannot be written to, into an error of the user's."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot write there: {error.strerror or error}.") from error
