"""Small real shards in img2dataset's layout."""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from ipa_train.data.local_copies import LocalCopies
from tests.data.http_server import http_server

PATIENCE_SECONDS = 0.5
"""What a server on the loopback interface gets, so that tests of failures take no longer."""


def picture(seed, *, width=48, height=40):
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def encode(image, format_="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


def write_shard(folder, number, samples):
    """Write one shard from {key: {suffix: bytes}} and its completion mark."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:05d}.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(samples), "successes": len(samples)}))
    return path


def write_shards(folder, counts=(7, 5, 9), sizes=((40, 48),)):
    """Shards of as many samples as ``counts`` say; their (height, width) go round ``sizes``."""
    for number, count in enumerate(counts):
        samples = {}
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            jpg = encode(picture(100 * number + i, width=width, height=height), quality=95)
            samples[f"{number:05d}{i:04d}"] = {"jpg": jpg, "txt": f"picture {i}", "json": b"{}"}
        write_shard(folder, number, samples)
    return folder


def npy(array):
    """As numpy.save writes it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def mask(height=36, width=52, *, rows=slice(10, 20), columns=slice(12, 22)):
    """A mask that keeps these rows and columns."""
    levels = np.zeros((height, width), np.uint8)
    levels[rows, columns] = 255
    return encode(Image.fromarray(levels), "PNG")


def paired_sample(number):
    """A target of 48 x 40 pixels, and a reference of 52 x 36 with a mask."""
    return {
        "jpg": encode(picture(number), quality=95),
        "mask.png": mask(),
        "npy": npy(np.full(4, number, np.float16)),
        "ref.png": encode(picture(1000 + number, width=52, height=36), "PNG"),
        "txt": f"picture {number}",
    }


def write_paired_shards(folder, counts):
    """Shards of such samples, numbered from 0, 100, 200."""
    for shard, count in enumerate(counts):
        samples = {f"{n:05d}": paired_sample(n) for n in range(100 * shard, 100 * shard + count)}
        write_shard(folder, shard, samples)
    return folder


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards of 7, 5 and 9 samples."""
    return write_shards(tmp_path / "shards")


@pytest.fixture
def server(shards):
    """A web server of these shards."""
    with http_server(shards) as server:
        yield server


@pytest.fixture
def copies(tmp_path):
    """An empty folder for copies, impatient."""
    copies = LocalCopies(tmp_path / "cache", patience_seconds=PATIENCE_SECONDS)
    copies.prepare()
    return copies
