"""What IP-Adapter's tutorial_train.py does to a picture, step by step, and the plain webdataset pipeline of the same.

Its torchvision transforms are written out (PIL for the geometry, torch for the numbers), so that torchvision need not
be installed; its CLIPImageProcessor is the one of transformers that works with PIL, as it was then.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import CLIPImageProcessorPil

from benchmarks.reporting import Batches

RESOLUTION = 512


def resize_and_center_crop(image: Image.Image) -> Image.Image:
    """``Resize(512, bilinear)`` and ``CenterCrop(512)``."""
    short = min(image.size)
    width, height = (int(RESOLUTION * side / short) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - RESOLUTION) / 2), round((height - RESOLUTION) / 2)
    return resized.crop((left, top, left + RESOLUTION, top + RESOLUTION))


def to_normalized_tensor(image: Image.Image) -> Float[Tensor, "c h w"]:
    """``ToTensor()`` and ``Normalize([0.5], [0.5])``."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub_(0.5).div_(0.5)


class Preprocess:
    """One picture of a file or of bytes -> what the tutorial's training step takes, its text left as it is."""

    def __init__(self) -> None:
        self.processor = CLIPImageProcessorPil()

    def __call__(self, source: Path | io.BytesIO, text: str) -> dict[str, Any]:
        raw = Image.open(source)
        image = to_normalized_tensor(resize_and_center_crop(raw.convert("RGB")))
        prompt = self.processor(images=raw, return_tensors="pt").pixel_values
        return {"text": text, "image": image, "clip_image": prompt[0]}


class TutorialDataset(Dataset[dict[str, Any]]):
    """Pictures as single files."""

    def __init__(self, files: Sequence[tuple[Path, str]]) -> None:
        self.files, self.preprocess = list(files), Preprocess()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.preprocess(*self.files[number])


def tutorial_batches(files: Sequence[tuple[Path, str]], batch_size: int, *, workers: int = 0) -> Batches:
    """For ever, in random order, through one plain DataLoader."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.utils.data.RandomSampler(files, replacement=True, num_samples=2**40, generator=generator)
    yield from DataLoader(TutorialDataset(files), batch_size=batch_size, sampler=numbers, num_workers=workers)


def webdataset_batches(folder: Path, batch_size: int, *, workers: int = 0) -> Batches:
    """The same work on the members of shards, by plain webdataset."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    preprocess = Preprocess()
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .repeat()
        .shuffle(1000)
        .map(lambda sample: preprocess(io.BytesIO(sample["jpg"]), sample["txt"].decode()))
        .batched(batch_size, collation_fn=default_collate)
    )
    yield from DataLoader(pipeline, batch_size=None, num_workers=workers)
