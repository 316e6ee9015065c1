"""The parts of an evaluation -> means with intervals, distances between distributions, one table of all pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ipa_train.errors import ConfigError, DataError, difference
from ipa_train.eval.distribution import Distances, distances
from ipa_train.eval.parts import Parts, Row
from ipa_train.eval.protocol import comparable
from ipa_train.runtime.files import atomic_write

SCORES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "dino": "DINO"}
"""By the names that they have in tables, what readers call them."""
SUMMARY, TABLE = "summary.json", "pictures.parquet"


@dataclass(frozen=True)
class Mean:
    """Of a score over all pictures that were drawn."""

    mean: float
    ci95: float | None
    """Half the width of its 95 % interval, were the image prompts drawn anew; None for a single one."""


@dataclass(frozen=True)
class AtScale:
    """What the pictures of one scale score."""

    scale: float
    scores: dict[str, Mean]
    distances: Distances | None


@dataclass(frozen=True)
class Summary:
    """The numbers of an evaluation."""

    facts: dict[str, Any]
    """Adapter, models, data set, protocol and versions."""
    sampler: str
    num_pictures: int
    """Image prompts that were scored."""
    left_out: list[str]
    """Why the others were not."""
    by_scale: list[AtScale]

    def write(self, folder: Path) -> None:
        """Write ``summary.json``, whole or not at all."""
        with atomic_write(folder / SUMMARY) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Summary":
        """Read what :meth:`write` wrote.

        Raises:
            ConfigError: it is not there, or not such a file.
        """
        try:
            content = json.loads((folder / SUMMARY).read_text())
            by_scale = [
                AtScale(
                    row["scale"],
                    {name: Mean(**mean) for name, mean in row["scores"].items()},
                    None if row["distances"] is None else Distances(**row["distances"]),
                )
                for row in content["by_scale"]
            ]
            return cls(**(content | {"by_scale": by_scale}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder}: no finished results of ipa eval there: {getattr(error, 'strerror', None) or error}."
            ) from error

    def require_comparable(self, other: "Summary", *, source: str) -> None:
        """Refuse to be put beside results of another protocol, data set or scoring models.

        Raises:
            ConfigError: they differ, and in what.
        """
        if differing := difference(comparable(other.facts), comparable(self.facts)):
            raise ConfigError(f"{source}: made in another way, so its numbers cannot be compared: {differing}.")


def summarise(parts: Parts, facts: Mapping[str, Any]) -> Summary:
    """The numbers of parts that are all done.

    Raises:
        CheckpointError: a part is damaged.
        DataError: not one picture could be scored.
    """
    notes = [parts.notes(part) for part in range(parts.count)]
    rows = [row for part in range(parts.count) for row in parts.read(part, *SCORES)]
    num_pictures = len({row.id for row in rows})
    left_out = [reason for note in notes for reason in note.left_out]
    if not num_pictures:
        raise DataError(f"not one of {len(left_out)} pictures could be read, e.g. {left_out[0]}.")
    by_scale, real = [], parts.features(None)
    for scale in sorted(facts["scales"]):
        generated = None if real is None else parts.features(scale)
        far = None if real is None or generated is None else distances(real, generated)
        by_scale.append(AtScale(scale, _means([row for row in rows if row.scale == scale]), far))
    return Summary(dict(facts), notes[0].sampler, num_pictures, left_out, by_scale)


def write_table(parts: Parts, path: Path) -> None:
    """Write one row for each picture that was drawn: of what, at which scale, from which seed, and its scores."""
    captions = {picture.id: picture for picture in parts.pictures}
    rows = [
        {"id": row.id, "file": captions[row.id].path.name, "caption": captions[row.id].caption}
        | {name: getattr(row, name) for name in ("scale", "sample", "seed", *SCORES)}
        for part in range(parts.count)
        for row in parts.read(part, *SCORES)
        if row.scale is not None
    ]
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


def mean_by_picture(rows: Sequence[Row], score: str) -> dict[str, float]:
    """The mean of a score over the samples of each image prompt, by its id."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.id, []).append(getattr(row, score))
    return {id_: float(np.mean(values)) for id_, values in found.items()}


def _means(rows: Sequence[Row]) -> dict[str, Mean]:
    means = {}
    for name in SCORES:
        if getattr(rows[0], name) is None:
            continue
        # All have as many samples, so the mean of means is the mean; samples of one image prompt are not independent.
        values = np.array(list(mean_by_picture(rows, name).values()))
        deviation = None if len(values) < 2 else 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
        means[name] = Mean(float(values.mean()), deviation)
    return means
