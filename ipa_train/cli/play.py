"""Try an adapter in a web page: image prompts, text and scale, beside the same seed without the image prompts.

    ipa play outputs/first
    ipa play ip_adapter.safetensors --base /models/sd15 --image-encoder /models/image_encoder

A run is tried by its newest checkpoint, on the base and by the image encoder of its config. The page is for this
machine alone unless --host says otherwise, and fetches nothing from elsewhere. It needs ipa-train[play].
"""

import argparse
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from ipa_train.cli.card import run_of
from ipa_train.cli.export import find_checkpoint
from ipa_train.cli.pipeline import USUAL_BASE, USUAL_ENCODER, add_model_arguments, open_pipeline
from ipa_train.errors import CheckpointError, ConfigError
from ipa_train.export.file import NAME

# Of a run's base, what says which weights were trained on, beside the path.
_BASE_OPTIONS = ("revision", "variant", "vae_path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", type=Path, metavar="RUN|FILE", help="a run, a checkpoint, or an adapter's file")
    add_model_arguments(parser)
    parser.set_defaults(base=None, image_encoder=None)  # a run has its own
    parser.add_argument("--other-bases", nargs="+", default=[], metavar="BASE", help="to choose from in the page")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; by default this machine alone")
    parser.add_argument("--port", type=int, default=7860)


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    _check_address(args.host, args.port)
    base_options = _find_adapter(args)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        from ipa_train.cli.play_page import Page, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page needs {error.name}, which is not installed: pip install 'ipa-train[play]'."
        ) from error
    from ipa_train.eval.playground import Playground

    own = args.base

    def load(base: str) -> Any:
        options = base_options if base == own else {}
        return open_pipeline(argparse.Namespace(**{**vars(args), "base": base}), **options)

    page = Page(Playground(load), title=_title(args), bases=[args.base, *args.other_bases])
    serve(page, host=args.host, port=args.port)
    return 0


def _find_adapter(args: argparse.Namespace) -> dict[str, Any]:
    """Fill in what the source says of file, base and encoder, and return the options of that base."""
    if args.source.is_file():
        args.adapter = args.source
        args.base, args.image_encoder = args.base or USUAL_BASE, args.image_encoder or USUAL_ENCODER
        return {}
    args.adapter = find_checkpoint(args.source) / f"{NAME}.safetensors"
    base, encoder = _models_of(args.source)
    if args.image_encoder is None:
        args.image_encoder = encoder.get("path", "")  # stored embeddings have none
        args.image_encoder_subfolder = args.image_encoder_subfolder or encoder.get("subfolder", "")
    if args.base is not None:
        return {}
    args.base = base["path"]
    return {option: base[option] for option in _BASE_OPTIONS if base.get(option) is not None}


def _models_of(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The base and the image encoder in the config of a run, or of a checkpoint's run."""
    folder = run_of(source) or source
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        base, encoder = dict(config["base"]), dict(config["image_encoder"])
        base["path"] = str(base["path"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.yaml'}: not the config of a run: {error}.") from error
    return base, encoder


def _title(args: argparse.Namespace) -> str:
    """The name of the file, or of the run and its checkpoint: the file in there is always called the same."""
    run = None if args.source.is_file() else run_of(args.source)
    return args.adapter.name if run is None else f"{run.resolve().name}, {args.adapter.parent.name}"


def _check_address(host: str, port: int) -> None:
    """Find out before minutes of loading whether the page can be served there, and by whom it can be seen."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be from 1 to 65535, got {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}): name another."
        ) from error
    if not _is_loopback(host):
        sys.stderr.write(f"ipa play: --host {host}: whoever reaches this address can draw here, without a password.\n")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
