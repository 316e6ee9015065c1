"""Results on the disk: parts of a few pictures each, whole or not there, so that any number of processes can make them.

Rows are generated pictures, after one row for each image prompt, which has neither scale nor sample.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from ipa_train.errors import CheckpointError
from ipa_train.eval.captions import CaptionedPicture
from ipa_train.runtime.files import atomic_write

PICTURES_PER_PART = 4
"""What is lost at most when a process is killed."""
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "scale": pa.float64(),
        "sample": pa.int32(),
        "seed": pa.int64(),
        "clip_i": pa.float64(),
        "clip_t": pa.float64(),
        "dino": pa.float64(),
        "features": pa.list_(pa.float32()),
        "thumbnail": pa.binary(),
    }
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture of a part."""

    id: str
    scale: float | None = None
    sample: int | None = None
    seed: int | None = None
    clip_i: float | None = None
    clip_t: float | None = None
    dino: float | None = None
    features: Sequence[float] | None = None
    """Of the network for FID and KID, if there is one."""
    thumbnail: bytes
    """JPEG for the report."""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a part says of itself."""

    left_out: list[str]
    """Why pictures have no rows."""
    sampler: str


class Parts:
    """The parts of an evaluation, in a folder."""

    def __init__(self, folder: Path, pictures: Sequence[CaptionedPicture]) -> None:
        self.folder, self.pictures = folder, pictures
        self.count = -(-len(pictures) // PICTURES_PER_PART)

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"{part:05d}.parquet"

    def is_done(self, part: int) -> bool:
        """Whether it is there, and so whole."""
        return self.path(part).is_file()

    def pictures_of(self, part: int) -> Sequence[CaptionedPicture]:
        """The pictures that a part is of."""
        return self.pictures[part * PICTURES_PER_PART : (part + 1) * PICTURES_PER_PART]

    def write(self, part: int, rows: Sequence[Row], notes: Notes) -> None:
        """Write a part, whole or not at all."""
        table = pa.Table.from_pylist([asdict(row) for row in rows], _SCHEMA)
        table = table.replace_schema_metadata({"notes": json.dumps(asdict(notes))})
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path(part)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def notes(self, part: int) -> Notes:
        """What a part says of itself.

        Raises:
            CheckpointError: it is damaged.
        """
        metadata = self._read(part, columns=["id"]).schema.metadata or {}
        return Notes(**json.loads(metadata[b"notes"]))

    def read(self, part: int, *columns: str) -> list[Row]:
        """The rows of a part; only the ``columns`` that are asked for are filled, besides what names a picture.

        Raises:
            CheckpointError: it is damaged.
        """
        names = ["id", "scale", "sample", "seed", *columns]
        blank: dict[str, Any] = {field.name: None for field in fields(Row)} | {"thumbnail": b""}
        return [Row(**(blank | row)) for row in self._read(part, columns=names).to_pylist()]

    def features(self, scale: float | None) -> Float[Tensor, "n f"] | None:
        """What the network for FID and KID made of all pictures of a scale, or of the image prompts (None).

        None, where there was no network.

        Raises:
            CheckpointError: a part is damaged.
        """
        found = []
        for part in range(self.count):
            table = self._read(part, columns=["scale", "features"])
            of_scale = pc.is_null(table["scale"]) if scale is None else pc.equal(table["scale"], scale)
            column = table.filter(of_scale)["features"].combine_chunks()
            if column.null_count:
                return None
            if len(column):
                found.append(column.flatten().to_numpy().reshape(len(column), -1))
        return torch.from_numpy(np.concatenate(found)) if found else None

    def _read(self, part: int, *, columns: list[str]) -> pa.Table:
        try:
            return pq.read_table(self.path(part), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError(
                f"{self.path(part)}: damaged ({str(error).splitlines()[0]}); delete it, and run the command again."
            ) from error
