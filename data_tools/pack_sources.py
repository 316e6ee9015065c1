"""Folders, JSON lists and tables -> entries to pack, one at a time; only a JSON list is read whole."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_tools.pack_list import Entry
from ipa_train.data.scan import EXTRAS, IMAGE_SUFFIXES, Extra, member_kind
from ipa_train.errors import ConfigError, DataError, did_you_mean

MALFORMED_ROWS = "table rows with too few or too many columns"
_CSV_BLOCK_BYTES = 2**24  # a row must fit into it


def find_entries(
    source: Path,
    *,
    image_root: Path | None,
    image_column: str,
    caption_column: str,
    caption_suffix: str,
    extra_columns: Mapping[Extra, str],
    ignored: Counter[str],
) -> Iterator[Entry]:
    """The entries of a folder, JSON list or table; what can be none is counted in ``ignored``.

    ``extra_columns`` name files, as ``image_column`` does.

    Raises:
        ConfigError: the source is missing, or of another kind, or has no such columns.
        DataError: it cannot be read.
    """
    if source.is_dir():
        return _folder_entries(source, caption_suffix, ignored)
    if not source.is_file():
        raise ConfigError(f"{source}: there is no such file or folder; give a folder, a .json, .csv or .parquet.")
    root = os.fsencode((source.parent if image_root is None else image_root).resolve())
    suffix = source.suffix.lower()
    if suffix == ".json":
        return _json_entries(source, root, image_column, caption_column, extra_columns)
    if suffix in (".csv", ".parquet"):
        return _table_entries(source, root, image_column, caption_column, extra_columns, ignored)
    raise ConfigError(
        f"{source}: cannot pack a {suffix or 'file without suffix'}; give a folder, a .json, .csv or .parquet."
    )


def _folder_entries(folder: Path, caption_suffix: str, ignored: Counter[str]) -> Iterator[Entry]:
    root = os.fsencode(folder.resolve())
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders.sort()
        ignored["linked folders not followed"] += sum((Path(parent) / name).is_symlink() for name in folders)
        below = Path(parent).relative_to(folder)
        captions = {name.removesuffix(caption_suffix) for name in names if name.endswith(caption_suffix)}
        extras = _find_extras(Path(parent), below, names)
        belonging = {path for of_stem in extras.values() for path in of_stem.values()}
        stems = set()
        for name in sorted(names):
            path = below / name
            if os.fsencode(path) in belonging:
                continue
            if _is_image(name):
                stems.add(path.stem)
                caption = os.fsencode(path.with_suffix(caption_suffix)) if path.stem in captions else None
                yield Entry(root, os.fsencode(path), None, caption, "{}", **extras.get(path.stem, {}))
            elif not name.endswith(caption_suffix):
                suffix = os.fsencode(path.suffix or "other").decode(errors="replace")
                ignored[f"{suffix} files ignored"] += 1
        ignored["captions without a picture"] += len(captions - stems)


def _find_extras(folder: Path, below: Path, names: Sequence[str]) -> dict[str, dict[Extra, bytes]]:
    """Paths of what lies beside pictures for their image prompts, by stem; names that no picture goes with are none."""
    stems = {Path(name).stem for name in names if _is_image(name)}
    extras = {suffix: extra for extra, suffix in EXTRAS.items()}
    found: dict[str, dict[Extra, bytes]] = {}
    # Pictures before what may belong to them: what belongs to a picture is no picture that others belong to.
    for name in sorted(names, key=lambda name: (not _is_image(name), len(name), name)):
        for stem, suffix in ((name[:dot], name[dot + 1 :]) for dot, letter in enumerate(name) if letter == "."):
            if stem in stems and (extra := extras.get(member_kind(suffix))):
                if extra in found.setdefault(stem, {}):
                    raise DataError(f"{folder / name}: another {extra} of {stem} lies beside it; keep one.")
                found[stem][extra] = os.fsencode(below / name)
                stems.discard(Path(name).stem if _is_image(name) else "")
    return found


def _is_image(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_SUFFIXES


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}")


def _json_entries(
    source: Path, root: bytes, image_column: str, caption_column: str, extra_columns: Mapping[Extra, str]
) -> Iterator[Entry]:
    try:
        items = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON: {error}.") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(
            f'{source}: must be a list like [{{"{image_column}": "a.jpg", "{caption_column}": "a cat"}}, ...].'
        )
    required = (image_column, caption_column, *extra_columns.values())
    _require_columns(source, required, {name for item in items for name in item})
    for item in items:
        image, caption, *extras = (_encode(item.pop(name, None)) for name in required)
        yield Entry(root, image, caption, None, _dump(item), **dict(zip(extra_columns, extras, strict=True)))


def _encode(value: Any) -> bytes | None:
    return None if value is None else str(value).encode(errors="surrogatepass")


def _table_entries(
    source: Path,
    root: bytes,
    image_column: str,
    caption_column: str,
    extra_columns: Mapping[Extra, str],
    ignored: Counter[str],
) -> Iterator[Entry]:
    required = (image_column, caption_column, *extra_columns.values())
    try:
        opened = _open_csv(source, ignored) if source.suffix.lower() == ".csv" else _open_parquet(source)
        schema, batches = opened
        _require_columns(source, required, schema.names)
        for batch in batches:
            columns = {name: _values(column) for name, column in zip(schema.names, batch.columns, strict=True)}
            texts = zip(*(_texts(source, name, columns.pop(name)) for name in required), strict=True)
            for row, (image, caption, *extras) in enumerate(texts):
                others = _dump({name: values[row] for name, values in columns.items()})
                yield Entry(root, image, caption, None, others, **dict(zip(extra_columns, extras, strict=True)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source}: cannot be read: {error}.") from error


def _open_parquet(source: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    file = pq.ParquetFile(source)
    return file.schema_arrow, file.iter_batches(batch_size=4096)


def _open_csv(source: Path, ignored: Counter[str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """All columns as bytes: what looks like a number in the first rows need not be one further down."""

    def ignore(row: pyarrow.csv.InvalidRow) -> str:
        ignored[MALFORMED_ROWS] += 1
        return "skip"

    options = {
        "read_options": pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        "parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda row: "skip"),
    }
    with pyarrow.csv.open_csv(source, **options) as reader:
        names = reader.schema.names
    types = dict.fromkeys(names, pa.binary())
    options["parse_options"].invalid_row_handler = ignore
    reader = pyarrow.csv.open_csv(source, **options, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    return reader.schema, iter(reader)


def _values(column: pa.Array) -> list[Any]:
    """Text as bytes, which may be no UTF-8; all else as it is."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return (column.cast(pa.large_binary()) if is_text else column).to_pylist()


def _texts(source: Path, name: str, values: list[Any]) -> list[bytes | None]:
    if not all(value is None or isinstance(value, bytes) for value in values):
        raise ConfigError(f"{source}: column {name!r} must hold text.")
    return values


def _require_columns(source: Path, required: Iterable[str], names: Iterable[str]) -> None:
    names, required = list(names), list(required)
    for name in required:
        if required.count(name) > 1:
            raise ConfigError(f"{source}: column {name!r} is named by two options; give each a column of its own.")
        if name not in names:
            raise ConfigError(
                f"{source}: no column {name!r}.{did_you_mean(name, names)} Set --image-column and --caption-column."
            )
        if names.count(name) > 1:
            raise ConfigError(f"{source}: column {name!r} comes more than once.")


def _dump(columns: dict[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in columns.items()}, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return None if isinstance(value, float) and not math.isfinite(value) else value
