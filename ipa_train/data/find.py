"""Which local files a user means by a folder, a glob or ``{00000..00010}``."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls

from ipa_train.data.remote import PACKAGES
from ipa_train.errors import ConfigError


def find_shards(spec: str | Sequence[str]) -> list[Path]:
    """Expand ``/data/{00000..00010}.tar``, a glob, a folder, or a list of these into existing tars, sorted per item.

    Raises:
        ConfigError: nothing matches, a shard is missing or named twice, or the source is no local file.
    """
    return find_files(spec, suffix=".tar", option="data.shards")


def find_files(spec: str | Sequence[str], *, suffix: str, option: str) -> list[Path]:
    """Expand as :func:`find_shards` does; in a folder, files of ``suffix`` count. Errors name the ``option``.

    Raises:
        ConfigError: nothing matches, a file is missing or named twice, or the source is no local file.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    found: list[Path] = []
    for item in items:
        if "://" in item or item.startswith("pipe:"):
            raise ConfigError(
                f"{option}={item}: this reads local files only. Training and `ipa data index` read "
                f"{', '.join(PACKAGES)}:// too, and data=webdataset whatever streams."
            )
        if Path(item).is_dir():
            matches = sorted(Path(item).glob(f"*{suffix}"))
        elif "{" in item:
            matches = [Path(name) for name in expand_urls(item)]
        else:
            matches = [Path(name) for name in sorted(glob.glob(item))]  # noqa: PTH207 - the pattern may be absolute
            matches = matches or ([Path(item)] if "*" not in item else [])
        if not matches:
            raise ConfigError(
                f"{option}={item}: no {suffix} file matches; give a folder, a glob or {{00000..00010}}{suffix}."
            )
        missing = [path for path in matches if not path.is_file()]
        if missing:
            raise ConfigError(f"{option}={item}: {len(missing)} of {len(matches)} files missing, first {missing[0]}.")
        found += matches
    times = Counter(path.resolve() for path in found)
    twice = [path for path in found if times[path.resolve()] > 1] if len(times) < len(found) else []
    if twice:
        raise ConfigError(f"{option} names {twice[0]} more than once.")
    return found
