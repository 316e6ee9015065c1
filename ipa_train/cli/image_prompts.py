"""Image prompts out of the files that a user names: pictures, or stored embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ipa_train.data.decode import MAX_PIXELS_OF_ONE, decode_image
from ipa_train.data.embedding import read_embedding
from ipa_train.errors import ConfigError, DataError


def read_picture(path: Path, name: str) -> Image.Image:
    """The picture upright and on white, as in training; ``name`` is what a complaint calls it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return decode_image(path.read_bytes(), max_pixels=MAX_PIXELS_OF_ONE)
    except (OSError, DataError) as error:
        raise ConfigError(f"{name}: no picture that can be read: {error}.") from error


def read_embeddings(files: Sequence[tuple[str, Path]]) -> Float[Tensor, "n *s f"] | None:
    """The embeddings of ``.npy`` files, each after what a complaint calls it; None of no files.

    Raises:
        ConfigError: one cannot be read, or they have different shapes.
    """
    rows = []
    for name, path in files:
        try:
            rows.append(torch.from_numpy(read_embedding(path.read_bytes(), None)))
        except (OSError, DataError) as error:
            raise ConfigError(f"{name}: no embedding that can be read: {error}.") from error
    if len({row.shape for row in rows}) > 1:
        shapes = ", ".join(f"{name} {tuple(row.shape)}" for (name, _), row in zip(files, rows, strict=True))
        raise ConfigError(f"embeddings of different shapes: {shapes}.")
    return torch.stack(rows) if rows else None
