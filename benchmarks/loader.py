"""CPU time per picture: ours beside the data set of IP-Adapter's tutorial_train.py and plain webdataset; and its order.

    python -m benchmarks.loader [--work DIR] [--out benchmarks/results/loader.json]

The same pictures (1/f noise, 0.43 megapixels, 140 kB) as they are, and stored at their training size as `ipa data
reshard` does it: with a short side of 512, and as squares. Ours leaves normalisation to the device, and of pictures
stored at their size the image encoder's resizing too. What these would cost on the CPU is a line of its own, and so is
ours with that resizing done by the loader. Pipelines take turns; the least of the rounds counts. The order of samples
is measured at 372M samples in 41k shards. Takes about two minutes.
"""

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from benchmarks import order
from benchmarks.reporting import Batches, cost, facts, finish, measure, measure_with_worker, parser, table
from benchmarks.synthetic import draw_caption, draw_picture, jpeg, write_pictures
from benchmarks.tutorial import RESOLUTION, resize_and_center_crop, tutorial_batches, webdataset_batches
from ipa_train.conditioning.vision_model import resize_and_crop
from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.image_prompts import ImagePrompts
from ipa_train.data.pictures import PictureLoader

SIZES = ((560, 768), (768, 560), (656, 656), (480, 896), (610, 705))
PROMPT = 224
BUFFER = 5000
"""Samples in webdataset's shuffle buffer, open_clip's size; each of 8 ranks has one."""
FORMS = ("as downloaded", "short side 512", "512 x 512")
TUTORIAL, PLAIN, OURS = "tutorial_train", "webdataset", "ipa-train"
PROMPTS, DEVICE = "ipa-train with image prompts of 224", "what ipa-train leaves to the device, on the CPU"


def write_data(work: Path, num_pictures: int) -> None:
    """Each form of the pictures as single files, which the tutorial reads, and as shards."""
    rng = np.random.default_rng(0)
    forms: dict[str, list[tuple[str, bytes, str]]] = {form: [] for form in FORMS}
    for number in range(num_pictures):
        image, key, text = draw_picture(rng, *SIZES[number % len(SIZES)]), f"{number:06d}", draw_caption(rng)
        scale = RESOLUTION / min(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        for form, stored in zip(FORMS, (image, small, resize_and_center_crop(small)), strict=True):
            forms[form].append((key, jpeg(stored), text))
    for form, pictures in forms.items():
        write_pictures(work / form, pictures, num_shards=4)
        for key, data, text in pictures:
            (work / form / f"{key}.jpg").write_bytes(data)
            (work / form / f"{key}.txt").write_text(text)


def open_ours(folder: Path, batch_size: int, *, with_prompts: bool = False, workers: int = 0) -> Batches:
    data = StreamingDataModule(shards=str(folder), global_batch_size=batch_size, resolution=RESOLUTION)
    if with_prompts:
        assert isinstance(data.stream.loader, PictureLoader)
        data.stream.loader.image_prompts = ImagePrompts(size=PROMPT)
    for loaded in data.loader(workers=workers):
        yield loaded.batch


def read_batches(batches: Batches, num_batches: int) -> int:
    total = 0
    for _ in range(num_batches):
        batch = next(batches)
        total += len(batch) if isinstance(batch, Batch) else len(batch["text"])
    return total


def on_device(batch: Batch) -> int:
    """Float conversion and normalisation, and the resizing that is left to the image encoder, in float."""
    assert isinstance(batch.content, Pictures)
    _ = batch.content.pixels.float() / 127.5 - 1.0
    prompts = batch.content.image_prompts.float()
    _ = (resize_and_crop(prompts, PROMPT) if prompts.shape[-1] != PROMPT else prompts) / 255.0
    return len(batch)


def parity(folder: Path) -> dict[str, float]:
    """Mean differences from the tutorial's pixels before normalisation, in levels of 255."""
    batch = next(open_ours(folder, 16))
    processor = CLIPImageProcessorPil(do_normalize=False, do_rescale=False)
    prompts = batch.content.image_prompts
    if prompts.shape[-1] != PROMPT:
        prompts = resize_and_crop(prompts.float(), PROMPT)
    differences: dict[str, list[float]] = {"pixels": [], "image_prompts": []}
    for i, key in enumerate(batch.keys):
        raw = Image.open(folder / f"{key.partition('/')[2]}.jpg")
        expected = np.asarray(resize_and_center_crop(raw.convert("RGB")), np.float32).transpose(2, 0, 1)
        differences["pixels"].append(float(np.abs(batch.content.pixels[i].numpy() - expected).mean()))
        seen = np.asarray(processor(images=raw, return_tensors="np").pixel_values[0], np.float32)
        differences["image_prompts"].append(float(np.abs(prompts[i].numpy() - seen).mean()))
    return {name: float(np.mean(found)) for name, found in differences.items()}


def pipelines(work: Path, batch_size: int) -> dict[str, Callable[..., Batches]]:
    makers: dict[str, Callable[..., Batches]] = {}
    for form in FORMS:
        folder = work / form
        files = [(path, path.with_suffix(".txt").read_text()) for path in sorted(folder.glob("*.jpg"))]
        makers[f"{TUTORIAL}, {form}"] = partial(tutorial_batches, files, batch_size)
        makers[f"{PLAIN}, {form}"] = partial(webdataset_batches, folder, batch_size)
        makers[f"{OURS}, {form}"] = partial(open_ours, folder, batch_size)
        if form != FORMS[0]:
            makers[f"{PROMPTS}, {form}"] = partial(open_ours, folder, batch_size, with_prompts=True)
    return makers


def run(work: Path, *, num_pictures: int, batch_size: int, rounds: int, num_samples: int, num_shards: int) -> Any:
    """All figures."""
    if not (work / FORMS[0]).exists():
        write_data(work, num_pictures)
    num_batches = num_pictures // batch_size
    makers = pipelines(work, batch_size)
    opened = {name: make() for name, make in makers.items()}
    cases: dict[str, Callable[[], float]] = {}
    for name, batches in opened.items():
        first = next(batches)
        cases[name] = partial(cost, partial(read_batches, batches, num_batches))
        if name.startswith(f"{OURS}, "):
            cases[name.replace(OURS, DEVICE)] = partial(cost, partial(on_device, first))
    costs = measure(cases, rounds=rounds)
    with_worker = measure_with_worker(
        {name: make for name, make in makers.items() if name.startswith((f"{TUTORIAL},", f"{OURS},"))},
        batch_size=batch_size,
        num_batches=num_batches,
        rounds=rounds,
    )
    counts = order.draw_counts(num_samples, num_shards)
    full_size = {
        "num_shards": num_shards,
        "shard_size": num_samples // num_shards,
        "window_size": 20_000,
        "buffer_size": BUFFER,
    }
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        index = order.measure_index(work / FORMS[0], Path(scratch), num_shards=num_shards)
    kinds = {"one bucket": order.single, "10 buckets": order.bucketed, "3 mixed sources": order.mixed}
    return {
        **facts(),
        "settings": {
            "pictures": num_pictures,
            "batch_size": batch_size,
            "rounds": rounds,
            "file_bytes": {form: _mean_bytes(work / form) for form in FORMS},
        },
        "cpu_us_per_sample": costs,
        "cpu_us_per_sample_with_one_worker": with_worker,
        "mean_difference_of_255": {form: parity(work / form) for form in FORMS},
        "index": index,
        "order": {
            "samples": int(counts.sum()),
            "shards": len(counts),
            "global_batch_size": order.GLOBAL_BATCH_SIZE,
            **{name: order.measure_order(make, counts, num_steps=2000) for name, make in kinds.items()},
        },
        "distinct_shards": {
            "64 shards of 1,000, windows of 8,000": order.distinct_shards(
                num_shards=64, shard_size=1000, window_size=8000, buffer_size=BUFFER
            ),
            "full size, defaults": order.distinct_shards(**full_size),
            "full size, data.num_lanes=256": order.distinct_shards(**full_size, num_lanes=256),
        },
    }


def _mean_bytes(folder: Path) -> int:
    sizes = [path.stat().st_size for path in folder.glob("*.jpg")]
    return sum(sizes) // len(sizes)


def markdown(figures: Any) -> str:
    costs, with_worker = figures["cpu_us_per_sample"], figures["cpu_us_per_sample_with_one_worker"]
    first = f"{TUTORIAL}, {FORMS[0]}"
    rows = []
    for name, found in costs.items():
        row = [name, f"{1e6 / found:.0f}", f"{costs[first] / found:.1f}"]
        worker = with_worker.get(name)
        rows.append([*row, *([f"{1e6 / worker:.0f}", f"{with_worker[first] / worker:.1f}"] if worker else ["", ""])])
    header = ["pictures", "samples/s per core", "times the first", "with one worker process", "times the first"]
    pictures = table(header, rows)
    differences = [
        [form, *(f"{found[name]:.3f}" for name in ("pixels", "image_prompts"))]
        for form, found in figures["mean_difference_of_255"].items()
    ]
    names = ("resume_ms", "us_per_sample", "peak_mb", "replay_10000_steps_ms")
    orders = [
        [kind, *(f"{found[name]:.2f}" for name in names)]
        for kind, found in figures["order"].items()
        if isinstance(found, dict)
    ]
    mixing = [
        [kind, *(f"{found[name]:.1f}" for name in ("ours", "webdataset", "ideal"))]
        for kind, found in figures["distinct_shards"].items()
    ]
    index = figures["index"]
    return "\n".join(
        [
            pictures,
            "Of pictures stored at their size the square is cut out before the image encoder's resizing, not after;\n"
            "with the short side alone at 512, the prompt is then shifted by up to half a pixel.\n",
            table(["mean difference from tutorial_train, of 255", "pixels", "image prompts"], differences),
            table(
                [
                    f"order of {figures['order']['samples']:,} samples in {figures['order']['shards']:,} shards",
                    "resume, ms",
                    "us per sample",
                    "peak memory, MB",
                    "10,000 steps replayed, ms",
                ],
                orders,
            ),
            table(["distinct shards in a global batch of 256", "ipa-train", "webdataset", "ideal"], mixing),
            f"Index: {index['us_per_sample']:.0f} us and {index['bytes_per_sample']:.0f} bytes per sample, once;\n"
            f"a start reads what it says of {figures['order']['shards']:,} shards in {index['read_seconds']:.1f} s.\n",
        ]
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pictures", type=int, default=48)
    arguments.add_argument("--batch-size", type=int, default=16)
    arguments.add_argument("--samples", type=int, default=372_000_000, help="of the simulated order")
    arguments.add_argument("--shards", type=int, default=41_000, help="of the simulated order")
    args = arguments.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        figures = run(
            work,
            num_pictures=args.pictures,
            batch_size=args.batch_size,
            rounds=args.rounds,
            num_samples=args.samples,
            num_shards=args.shards,
        )
    finish(figures, markdown(figures), args.out)


if __name__ == "__main__":
    main()
