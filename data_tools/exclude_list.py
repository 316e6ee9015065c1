"""Exclude lists: samples that the index leaves out of training, while the shards stay as they are."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ipa_train.errors import ConfigError
from ipa_train.runtime.files import atomic_write

_UNLISTABLE = re.compile(r"^\s|\s$|\s#|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""In a key: a line would be read as something else."""


def is_listable(key: str) -> bool:
    """Whether a line of an exclude list can name this key."""
    return not _UNLISTABLE.search(key)


def list_folders(shards: Sequence[Path], index_dir: Path | None, *, option: str) -> dict[Path, Path]:
    """Where the lists of each shard lie: where its index does.

    Raises:
        ConfigError: shards of one name share a folder of lists, which could not tell them apart; names the ``option``.
    """
    folders = {shard: index_dir or shard.parent for shard in shards}
    if len({(folder, shard.name) for shard, folder in folders.items()}) < len(shards):
        raise ConfigError(
            f"{option}: shards of several folders have one name, and a list in {index_dir} could not tell them apart; "
            "name each folder alone, with an --index-dir of its own."
        )
    return folders


def update_exclude_list(path: Path, excluded: Mapping[str, Mapping[str, str]], *, looked_at: Collection[str]) -> None:
    """Write ``00000.tar/key # why`` lines; those of shards that were not looked at this time stay as they are.

    ``excluded`` maps names of shards to keys, and keys to reasons. Keys that no line can hold are left out of it.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    lines = [line for line in lines if line.partition("/")[0] not in looked_at]
    for shard, reasons in excluded.items():
        listed = {key: why for key, why in reasons.items() if is_listable(key)}
        lines += [f"{shard}/{key} # {' '.join(why.split())}" for key, why in listed.items()]
    if lines or path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in sorted(lines)))
