"""Parquet metadata: which files, and which of their columns is meant, whoever wrote them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ipa_train.data.find import find_files
from ipa_train.errors import ConfigError, DataError

COLUMNS = {
    "url": ("url",),
    "caption": ("caption", "text"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "prediction"),
    "watermark": ("pwatermark", "watermark_score"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "similarity": ("similarity", "clip_similarity_vitb32"),
    "key": ("key",),
    "status": ("status",),
}
"""What a column means -> its names in LAION, Re-LAION, COYO and img2dataset, in lower case, the first one first.

img2dataset's ``original_width`` is measured, and ``width`` that of the resized picture.
"""


def find_metadata(spec: Sequence[str]) -> list[Path]:
    """Expand folders, globs and ``{000..127}.parquet`` into files. Raises ConfigError as :func:`find_shards` does."""
    return find_files(spec, suffix=".parquet", option="METADATA")


def open_metadata(path: Path) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        DataError: it is none, or damaged.
    """
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """What to say of a parquet file whose reading raised ``error``."""
    return DataError(f"{path}: not a sound parquet file ({str(error).splitlines()[0]}); download it again.")


def find_columns(path: Path, schema: pa.Schema, meanings: Iterable[str], *, wanted_by: str) -> list[str]:
    """Names of the columns that have these meanings (see ``COLUMNS``).

    Raises:
        ConfigError: there is none for one of them; names the columns there are.
    """
    found = []
    for meaning in meanings:
        name = find_column(schema, meaning)
        if name is None:
            raise ConfigError(
                f"{wanted_by} needs a column {' or '.join(COLUMNS[meaning])}, which {path} lacks; it has "
                f"{', '.join(schema.names)}."
            )
        found.append(name)
    return found


def find_column(schema: pa.Schema, meaning: str) -> str | None:
    """Name of the column that has this meaning (see ``COLUMNS``), if there is one."""
    by_lower = {name.lower(): name for name in reversed(schema.names)}
    return next((by_lower[name] for name in COLUMNS[meaning] if name in by_lower), None)
