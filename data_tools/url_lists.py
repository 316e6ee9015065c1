"""Url lists of any origin -> clean ones for img2dataset: http and https only, every url once, one set of columns.

Duplicates may be anywhere in the input, so urls are first spread over files by their hash, and then each file is
cleaned by itself: memory is that of one file, some million urls.
"""

import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.metadata import damaged, find_columns, open_metadata
from data_tools.work import run_tasks
from ipa_train.errors import ConfigError, DataError

_FILE_ROWS = 1_000_000
_MAX_FILES = 500  # all are open at once
_BATCH_ROWS = 65_536
_SCHEMES = r"(?i)^https?://[^/]"
_MADE_ANEW = {"key", "status", "error_message", "width", "height", "original_width", "original_height", "exif"}
_MADE_ANEW |= {"md5", "sha256", "sha512"}


def common_columns(paths: Sequence[Path]) -> pa.Schema:
    """``url``, ``caption``, and the columns of numbers and text that all files have.

    Left out is what img2dataset measures itself, and what it cannot write as JSON: it would lose such samples.

    Raises:
        ConfigError: a file has no url or no caption.
        DataError: a file is damaged.
    """
    schemas = [_rename(path, open_metadata(path).schema_arrow) for path in paths]
    common = set.intersection(*(set(schema.names) for schema in schemas))
    names = ["url", "caption", *(n for n in schemas[0].names if n in common and n not in ("url", "caption"))]
    chosen = [pa.schema([schema.field(name) for name in names]) for schema in schemas]
    try:
        return pa.unify_schemas(chosen, promote_options="permissive").remove_metadata()
    except pa.ArrowException as error:
        raise ConfigError(
            f"METADATA: the files' columns do not fit together ({error}); download them apart."
        ) from error


def _rename(path: Path, schema: pa.Schema) -> pa.Schema:
    url, caption = find_columns(path, schema, ["url", "caption"], wanted_by="a download")
    fields = [schema.field(url).with_name("url"), schema.field(caption).with_name("caption")]
    for field in schema:
        if field.name in (url, caption) or field.name.lower() in _MADE_ANEW | {"url", "caption"}:
            continue
        if _is_plain(field.type):
            fields.append(field)
    return pa.schema(fields)


def _is_plain(kind: pa.DataType) -> bool:
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return any(check(kind) for check in (*checks, pa.types.is_large_string))


def clean_url_lists(
    paths: Sequence[Path], folder: Path, *, schema: pa.Schema, workers: int | None = None
) -> Counter[str]:
    """Write ``folder/00000.parquet`` and on, there whole or not at all, and return how many urls were what.

    Raises:
        DataError: a file is damaged.
    """
    partial_folder, spread_folder = folder.with_name(f".{folder.name}"), folder.with_name(f".{folder.name}-spread")
    for leftover in (partial_folder, spread_folder):
        shutil.rmtree(leftover, ignore_errors=True)
        leftover.mkdir()
    num_rows = sum(open_metadata(path).metadata.num_rows for path in paths)
    files = [spread_folder / f"{i:05d}.arrow" for i in range(min(_MAX_FILES, -(-num_rows // _FILE_ROWS) or 1))]
    counts = _spread(paths, files, schema)
    clean = partial(_without_duplicates, folder=partial_folder)
    for _, num_duplicates in run_tasks(clean, files, description="clean", unit="file", workers=workers):
        if isinstance(num_duplicates, DataError):
            raise num_duplicates
        counts["duplicate urls"] += num_duplicates
        counts["to download"] -= num_duplicates
    shutil.rmtree(spread_folder)
    partial_folder.rename(folder)
    return counts


def _spread(paths: Sequence[Path], files: Sequence[Path], schema: pa.Schema) -> Counter[str]:
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_file(str(path), schema)) for path in files]
        for path in paths:
            try:
                for table in _read_batches(path, schema):
                    is_web = pc.fill_null(pc.match_substring_regex(table["url"], _SCHEMES), False)
                    counts["urls"] += len(table)
                    counts["without url"] += table["url"].null_count
                    table = table.filter(is_web)
                    counts["to download"] += len(table)
                    numbers = np.array([zlib.crc32(url.encode()) for url in table["url"].to_pylist()], np.int64)
                    for number in np.unique(numbers % len(files)):
                        writers[number].write_table(table.filter(pa.array(numbers % len(files) == number)))
            except (pa.ArrowException, OSError) as error:
                raise damaged(path, error) from error
    counts["not http or https"] = counts["urls"] - counts["without url"] - counts["to download"]
    return counts


def _read_batches(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the rows of a file as ``schema`` has them, the urls without white space around them."""
    with open_metadata(path) as file:
        names = find_columns(path, file.schema_arrow, ["url", "caption"], wanted_by="a download") + schema.names[2:]
        for batch in file.iter_batches(_BATCH_ROWS, columns=names):
            table = pa.Table.from_batches([batch]).select(names).rename_columns(schema.names).cast(schema)
            yield table.set_column(0, "url", pc.utf8_trim_whitespace(table["url"]))


def _without_duplicates(path: Path, *, folder: Path) -> int:
    """Write the file with the first of each url only, and return how many others there were."""
    with pa.OSFile(str(path)) as source, pa.ipc.open_file(source) as reader:
        table = reader.read_all()
    number_of = table["url"].combine_chunks().dictionary_encode().indices
    _, first = np.unique(number_of.to_numpy(), return_index=True)
    pq.write_table(table.take(np.sort(first)), folder / f"{path.stem}.parquet", compression="zstd")
    return len(table) - len(first)
