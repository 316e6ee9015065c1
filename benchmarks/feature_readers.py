"""The same cached features through every reader: ours, and each of the others in its own form, as its users would.

Each function takes the folder of our cache, a folder of its own to write to, and the batch size, and yields batches for
ever: {name: tensor}, with the captions under "captions". The others keep 35 kB samples in the form that reads fastest.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import webdataset
from torch.utils.data import DataLoader

from benchmarks.reporting import Batches
from benchmarks.synthetic import draw_features
from ipa_train.data.batch import Features
from ipa_train.data.datamodule import StreamingDataModule

SHUFFLE_BUFFER = 1000
_CHUNK_BYTES = 2**26


def ours(cache: Path, batch_size: int, *, workers: int = 0) -> Batches:
    data = StreamingDataModule(shards=str(cache), global_batch_size=batch_size, resolution=512)
    for loaded in data.loader(workers=workers):
        batch = loaded.batch
        assert isinstance(batch.content, Features)
        yield {
            "latents_mean": batch.content.latents_mean,
            "image_features": batch.content.image_features[0],
            "crop_top_left": batch.crop_top_lefts,
            "original_size": batch.original_sizes,
            "captions": batch.captions,
        }


def plain_webdataset(cache: Path, batch_size: int, *, workers: int = 0) -> Batches:
    """A stream of shards through a shuffle buffer; not the full random order of the other readers."""
    shards = sorted(str(path) for path in cache.glob("*.tar"))
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .repeat()
        .shuffle(SHUFFLE_BUFFER)
        .map(_load_safetensors)
        .batched(batch_size, collation_fn=_stack)
    )
    yield from DataLoader(pipeline, batch_size=None, num_workers=workers)


def mosaic_streaming(folder: Path, batch_size: int, num_samples: int) -> Batches:
    with _torchvision_names():
        import streaming

    columns = {
        "latents_mean": "ndarray:float16:4,64,64",
        "image_features": "ndarray:float16:1024",
        "crop_top_left": "ndarray:int64:2",
        "original_size": "ndarray:int64:2",
        "captions": "str",
    }
    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=_CHUNK_BYTES) as writer:
            for number in range(num_samples):
                writer.write(_as_arrays(number))
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    while True:
        yield from DataLoader(dataset, batch_size=batch_size, drop_last=True)


def litdata(folder: Path, batch_size: int, num_samples: int, *, as_tensors: bool) -> Batches:
    """Shuffles within a chunk at a time. ``as_tensors``: as its guide stores them; NumPy arrays read much faster."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes=_CHUNK_BYTES)
        for number in range(num_samples):
            sample = draw_features(number)
            arrays = sample.tensors | {"captions": sample.caption} if as_tensors else _as_arrays(number)
            writer.add_item(number, arrays)
        writer.done()
        writer.merge()
    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    while True:
        yield from StreamingDataLoader(dataset, batch_size=batch_size, num_workers=0)


def energon(folder: Path, batch_size: int, cache: Path) -> Batches:
    from megatron import energon as library
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    if not folder.exists():
        folder.mkdir()
        shards = sorted(path.name for path in cache.glob("*.tar"))
        for shard in shards:
            (folder / shard).hardlink_to(cache / shard)
        BaseWebdatasetFactory.prepare_dataset(folder, shards, split_parts_ratio=[("train", 1.0)], workers=1)
        (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")

    class TaskEncoder(library.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = None
        cookers = [library.Cooker(library.stateless(_cook))]  # noqa: RUF012 - this is how the library wants it

        def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
            return _stack(samples)

    dataset = library.get_train_dataset(
        folder,
        worker_config=library.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=batch_size,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=100,
        task_encoder=TaskEncoder(),
    )
    yield from library.get_loader(dataset)


def _load_safetensors(sample: dict[str, Any]) -> dict[str, Any]:
    """As arrays, which are faster than tensors to make and to stack."""
    return safetensors.numpy.load(sample["safetensors"]) | {"captions": sample["txt"].decode()}


def _stack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [sample[name] for sample in samples] for name in samples[0] if not name.startswith("__")}
    arrays = {name: torch.from_numpy(np.stack(column)) for name, column in columns.items() if name != "captions"}
    return arrays | {"captions": columns["captions"]}


def _cook(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: sample[name] for name in ("__key__", "__restore_key__")} | _load_safetensors(sample)


def _as_arrays(number: int) -> dict[str, Any]:
    sample = draw_features(number)
    return {name: tensor.numpy() for name, tensor in sample.tensors.items()} | {"captions": sample.caption}


@contextmanager
def _torchvision_names() -> Iterator[None]:
    """Stand-ins for what mosaicml-streaming imports for data sets of pictures, which are not used here."""
    names = {"torchvision.datasets": "VisionDataset", "torchvision.transforms.functional": "to_tensor"}
    added = []
    for module, name in names.items():
        for package in (module.partition(".")[0], module.rpartition(".")[0], module):
            if package not in sys.modules:
                sys.modules[package] = ModuleType(package)
                added.append(package)
        setattr(sys.modules[module], name, object)
    try:
        yield
    finally:
        for package in added:
            del sys.modules[package]
