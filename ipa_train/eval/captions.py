"""Pictures with captions to evaluate on: in the format of COCO captions, or a folder of pictures and texts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipa_train.errors import ConfigError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture of a data set."""

    id: str
    """Its id in the annotations; in a plain folder its name without the ending."""
    path: Path
    caption: str


def read_pictures(images: Path, annotations: Path | None = None) -> list[CaptionedPicture]:
    """The pictures of a folder in the order of their ids, each with its caption.

    Captions come from an annotations file in COCO's format, where a picture's caption is the one with the lowest id of
    its several, or else from the .txt beside each picture. A picture may be named by the annotations and not be there:
    see :func:`missing`.

    Raises:
        ConfigError: no such folder or file, other content, or nothing in it.
    """
    if not images.is_dir():
        raise ConfigError(f"--images {images}: no such folder.")
    pictures = _read_folder(images) if annotations is None else _read_coco(images, annotations)
    if not pictures:
        raise ConfigError(f"--images {images}: no pictures in it; known are {', '.join(_SUFFIXES)}.")
    return pictures


def missing(pictures: Sequence[CaptionedPicture]) -> list[CaptionedPicture]:
    """Those whose files are not there."""
    return [picture for picture in pictures if not picture.path.is_file()]


def fingerprint(pictures: Sequence[CaptionedPicture]) -> str:
    """Hash of ids, file names and captions: the same for the same data set, wherever it lies."""
    rows = [(picture.id, picture.path.name, picture.caption) for picture in pictures]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_folder(images: Path) -> list[CaptionedPicture]:
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in _SUFFIXES)
    if bare := [path for path in paths if not path.with_suffix(".txt").is_file()]:
        raise ConfigError(
            f"--images {images}: {len(bare)} of {len(paths)} pictures have no caption beside them, e.g. no "
            f"{bare[0].with_suffix('.txt').name}; give --annotations if the captions are in a COCO file."
        )
    if twice := [path for path, other in zip(paths[1:], paths, strict=False) if path.stem == other.stem]:
        raise ConfigError(f"--images {images}: more than one picture is called {twice[0].stem}.")
    try:
        return [CaptionedPicture(path.stem, path, path.with_suffix(".txt").read_text().strip()) for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--images {images}: a caption cannot be read: {error}.") from error


def _read_coco(images: Path, annotations: Path) -> list[CaptionedPicture]:
    try:
        content = json.loads(annotations.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--annotations {annotations}: cannot be read: {reason}.") from error
    try:
        return _pictures(content, images)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--annotations {annotations}: not in COCO's format of captions: it needs images with id and file_name, "
            "and annotations with id, image_id and caption (captions_val2017.json is such a file)."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"--annotations {annotations}: {error}") from error


def _pictures(content: Mapping[str, Any], images: Path) -> list[CaptionedPicture]:
    captions: dict[Any, str] = {}
    for row in sorted(content["annotations"], key=lambda row: row["id"], reverse=True):
        captions[row["image_id"]] = row["caption"].strip()
    rows = sorted(content["images"], key=lambda row: row["id"])
    if bare := [row["id"] for row in rows if row["id"] not in captions]:
        raise ConfigError(f"{len(bare)} of its {len(rows)} images have no caption, e.g. {bare[0]}.")
    if len({row["id"] for row in rows}) < len(rows):
        raise ConfigError("two of its images have one id.")
    return [CaptionedPicture(str(row["id"]), images / row["file_name"], captions[row["id"]]) for row in rows]
