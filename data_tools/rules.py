"""Rules over the columns of metadata: which rows to keep, and how many each rule rejects."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import ge, le
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy import ndarray

from data_tools.metadata import damaged, find_columns
from ipa_train.errors import ConfigError

_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Rule:
    """Keeps a row if ``measure(*columns)`` and the user's limit compare as they must."""

    help: str
    needs: tuple[str, ...]
    """Meanings of columns, see ``metadata.COLUMNS``."""
    keeps: Callable[[ndarray, float], ndarray]
    measure: Callable[..., ndarray] = np.asarray


def _aspect_ratio(width: ndarray, height: ndarray) -> ndarray:
    return np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)


_SIZE = ("width", "height")
RULES = {
    "min_size": Rule("of the shorter side, in pixels", _SIZE, ge, np.minimum),
    "min_pixels": Rule("width x height", _SIZE, ge, np.multiply),
    "max_aspect_ratio": Rule("longer side / shorter side", _SIZE, le, _aspect_ratio),
    "min_aesthetic": Rule("aesthetic score, 0 to 10", ("aesthetic",), ge),
    "max_watermark": Rule("probability of a watermark, 0 to 1", ("watermark",), le),
    "max_unsafe": Rule("probability of unsafe content, 0 to 1", ("unsafe",), le),
    "min_similarity": Rule("CLIP similarity of picture and caption, -1 to 1", ("similarity",), ge),
    "min_caption_length": Rule("characters", ("caption",), ge),
    "max_caption_length": Rule("characters", ("caption",), le),
}
"""Option -> rule, in the order of the chain."""


@dataclass(frozen=True)
class Chain:
    """The rules a user asked for."""

    limits: Mapping[str, float]
    keep_null: bool
    """Let a row through a rule whose column is null or NaN in it; otherwise the rule rejects it."""

    def judge(
        self, path: Path, file: pq.ParquetFile, counts: Counter[str], *, only_success: bool = False
    ) -> Iterator[tuple[pa.RecordBatch, ndarray]]:
        """Yield (rows, which of them to keep) of a parquet file, and add up the counts.

        Raises:
            ConfigError: a rule's column is not there.
            DataError: the file is damaged.
        """
        columns = {
            name: find_columns(path, file.schema_arrow, RULES[name].needs, wanted_by=option(name))
            for name in self.limits
        }
        (status,) = find_columns(path, file.schema_arrow, ["status"], wanted_by="--exclude") if only_success else [""]
        try:
            for batch in file.iter_batches(_BATCH_ROWS):
                if only_success:
                    downloaded = batch.filter(pc.equal(batch[status], "success"))
                    counts["not downloaded"] += len(batch) - len(downloaded)
                    batch = downloaded
                kept = np.ones(len(batch), bool)
                counts["read"] += len(batch)
                for name, limit in self.limits.items():
                    rule = RULES[name]
                    values = rule.measure(*map(partial(_numbers, batch), columns[name], rule.needs))
                    is_null = np.isnan(values)
                    passes = rule.keeps(values, limit) | (is_null & self.keep_null)
                    kept &= passes
                    counts[f"{name} null"] += int(is_null.sum())
                    counts[f"{name} rejects alone"] += int((~passes).sum())
                    counts[f"{name} kept after"] += int(kept.sum())
                counts["kept"] += int(kept.sum())
                yield batch, kept
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error


def option(name: str) -> str:
    """How a user writes the name of a rule."""
    return f"--{name.replace('_', '-')}"


def _numbers(batch: pa.RecordBatch, name: str, meaning: str) -> ndarray:
    """A column as float64, NaN where it is null; of captions, their length in characters."""
    column = pc.utf8_length(batch[name].cast(pa.string())) if meaning == "caption" else batch[name]
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare an option for each rule."""
    for name, rule in RULES.items():
        parser.add_argument(option(name), type=finite_number, metavar="X", help=rule.help)
    parser.add_argument("--keep-null", action="store_true", help="let rows pass a rule whose column is null in them")


def finite_number(text: str) -> float:
    """Parse an option's value. Raises ValueError for NaN and infinity too, which would reject or keep everything."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def chain_of(args: argparse.Namespace) -> Chain:
    """The rules that the user gave.

    Raises:
        ConfigError: none.
    """
    given: dict[str, Any] = {name: getattr(args, name) for name in RULES}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if not limits:
        raise ConfigError(f"give a rule at least: {', '.join(map(option, RULES))}.")
    return Chain(limits, args.keep_null)
