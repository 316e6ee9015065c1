"""``index.json``: what is known of each shard, so that it need not be read again."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ipa_train.data.scan import Content, Extra
from ipa_train.errors import ConfigError
from ipa_train.runtime.files import atomic_write

VERSION = 4


@dataclass(frozen=True)
class ShardEntry:
    """What index.json says of one shard."""

    tar_bytes: int
    tar_version: str
    """Modification time of a local tar, in ns; the ETag of a remote one, or what its server has in place of it."""
    num_samples: int
    num_incomplete: int
    """Samples without an image, a caption, or one of the extras; they are left out."""
    num_excluded: int
    excluded_sha256: str
    """Hash of the keys that the exclude lists named, found or not."""
    content: Content
    min_short_side: int
    """Of the pictures whose size can be read, in pixels; 0 if there are none."""
    max_short_side: int
    rows_sha256: str
    extras: list[Extra]
    """What each row places besides; samples without it are incomplete."""
    found_extras: list[Extra]
    """What any of the samples holds besides."""


def make_index_folder(folder: Path) -> None:
    """Make the folder for an index, or raise ConfigError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(
            f"cannot write the index to {folder}: set data.index_dir (--index-dir) to a folder that can be written."
        )


def read_entries(folder: Path) -> dict[str, ShardEntry]:
    """The entries of an index.json; none if there is no readable one of this version: it is only a cache."""
    try:
        content = json.loads((folder / "index.json").read_text())
        return (
            {name: ShardEntry(**entry) for name, entry in content["shards"].items()}
            if content["version"] == VERSION
            else {}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_entries(known: dict[Path, dict[str, ShardEntry]]) -> None:
    """Write the index.json of each folder, atomically."""
    for folder, entries in known.items():
        content = {"version": VERSION, "shards": {name: asdict(entry) for name, entry in sorted(entries.items())}}
        with atomic_write(folder / "index.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1))
