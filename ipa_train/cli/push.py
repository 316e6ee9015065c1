"""Upload an exported adapter with its model card to the Hugging Face hub.

    ipa push for_the_hub --repo me/my-adapter --dry-run
    ipa push for_the_hub --repo me/my-adapter --private

The folder is what `ipa export --card` wrote. Log in before by `hf auth login`, or set HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from ipa_train.errors import ConfigError, ExportError
from ipa_train.export.card import CARD
from ipa_train.export.description import describe
from ipa_train.export.file import NAME, read_adapter_file
from ipa_train.export.usage import hub_id
from ipa_train.version import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("folder", type=Path, help="what ipa export --card wrote")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it private; one that is there stays as it is")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")


def run(args: argparse.Namespace) -> int:
    """Check the folder, say what is in it, upload it."""
    if hub_id(args.repo) is None:
        raise ConfigError(f"--repo {args.repo}: give OWNER/NAME.")
    files = _files(args.folder)
    entries = _front_matter(args.folder / CARD)
    for path in files:
        sys.stdout.write(f"{path.relative_to(args.folder)}  {path.stat().st_size / 1e6:.1f} MB\n")
    for name in ("base_model", "license"):
        sys.stdout.write(f"{name}: {entries.get(name, 'not stated')}\n")
    if args.dry_run:
        sys.stdout.write(f"would go to {args.repo}; nothing was uploaded\n")
        return 0
    sys.stdout.write(f"{_upload(args)}\n")
    return 0


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such folder; give one that `ipa export --card` wrote.")
    for name in (f"{NAME}.safetensors", CARD):
        if not (folder / name).is_file():
            raise ExportError(f"{folder} has no {name}: make it by `ipa export RUN --out {folder} --card`.")
    describe(read_adapter_file(folder / f"{NAME}.safetensors")[0], source=str(folder))
    strange = [path for path in sorted(folder.iterdir()) if path.is_dir() or path.name not in _WRITTEN]
    if strange:
        raise ExportError(
            f"{folder}: {strange[0].name} is not of an export, and all of the folder would be public: take it out."
        )
    return sorted(folder.iterdir())


_WRITTEN = {CARD, "samples.png", f"{NAME}.safetensors", f"{NAME}.bin"}


def _front_matter(card: Path) -> dict[str, Any]:
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    try:
        entries = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError as error:
        raise ExportError(f"{card}: its front matter is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ExportError(f"{card}: it begins with no front matter, which the hub reads; write it anew by ipa export.")
    return entries


def _upload(args: argparse.Namespace) -> str:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise ConfigError("no token for the hub: log in by `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="ipa-train", library_version=__version__)
    try:
        api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=args.repo, folder_path=args.folder, commit_message="Adapter exported by ipa-train"
        )
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE is set: unset it to upload.") from error
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(f"{api.endpoint} did not take {args.repo}: {str(error).strip().splitlines()[0]}") from error
    return str(commit.commit_url)
