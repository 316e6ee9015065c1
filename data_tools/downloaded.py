"""Whether a shard that img2dataset wrote is what its statistics say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.metadata import open_metadata
from data_tools.shard_writer import stats_path
from ipa_train.data.scan import find_samples
from ipa_train.errors import DataError

_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")
_MAX_MEMBER_BYTES = 2**30


def check_shard(shard: Path) -> dict[str, Any]:
    """Read a shard's headers from end to end, and return its statistics.

    Raises:
        DataError: the statistics, the tar or the parquet are damaged, or do not agree.
    """
    cure = "run the same command again to download it anew"
    try:
        stats: dict[str, Any] = json.loads(stats_path(shard).read_text())
        count, successes, *_ = (int(stats[name]) for name in _COUNTS)
        dict(stats["status_dict"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{stats_path(shard)}: damaged statistics; {cure}.") from error
    if not successes and not shard.exists():
        return stats  # the user deleted it, as told
    samples = find_samples(shard, max_member_bytes=_MAX_MEMBER_BYTES)
    num_pictures = sum("content" in found for found in samples.values())
    with open_metadata(shard.with_suffix(".parquet")) as metadata:
        num_rows = metadata.metadata.num_rows
    if (num_pictures, num_rows) != (successes, count):
        raise DataError(
            f"{shard}: holds {num_pictures} pictures and {num_rows} rows of metadata, but {successes} and {count} were "
            f"written; {cure}."
        )
    return stats


def is_empty(shard: Path, stats: Mapping[str, Any]) -> bool:
    """Whether it holds no picture, which no loader can use, and which a network that was down leaves behind."""
    return not stats["successes"] and shard.exists()
