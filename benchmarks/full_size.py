"""The whole path at full size, once, on whatever machine this is: real SD 1.5 and ViT-H sizes with random weights.

    python -m benchmarks.full_size --work DIR [--resolution 256] [--steps 4]

Writes the two model folders and shards of real photographs (those that ship inside scikit-image, matplotlib and
scikit-learn, whichever are installed), then runs `ipa train experiment=sd15_linear` for half the steps, again for the
rest (a resume), `ipa export`, and loads the export in a plain diffusers pipeline. Prints step time, peak memory and
file sizes, and writes them to DIR/full_size.json. Needs about 8 GiB of disk and 12 GiB of memory.
"""

import argparse
import csv
import importlib.util
import io
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import webdataset
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.sizes import CLIP_L_TEXT, SD15_UNET, VAE, VIT_H, noise_schedule
from ipa_train.bases.tiny import tiny_tokenizer


def write_models(folder: Path) -> None:
    """Save a base and an image encoder of the real sizes, bf16, random weights."""
    if (folder / "image_encoder" / "config.json").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**SD15_UNET),
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L_TEXT)),
        tokenizer=tiny_tokenizer(),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "base")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_H)).save_pretrained(folder / "image_encoder")
    torch.set_default_dtype(torch.float32)


def photographs() -> list[Path]:
    """Real pictures inside installed packages, at least 256 pixels on their short side."""
    found = []
    for package in ("skimage", "matplotlib", "sklearn"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for path in sorted(Path(spec.origin).parent.rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg", ".png") and "data" in str(path.parent):
                with Image.open(path) as image:
                    if min(image.size) >= 256 and image.mode == "RGB":
                        found.append(path)
    return found


def write_shards(folder: Path, *, num_shards: int = 2, copies: int = 8) -> int:
    """Write img2dataset-layout shards that repeat the photographs; return the number of different ones."""
    photos = photographs()
    if not photos:
        sys.exit("No photographs: pip install scikit-image, which ships a few.")
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(copies * len(photos)):
                path = photos[i % len(photos)]
                buffer = io.BytesIO()
                Image.open(path).save(buffer, format="JPEG", quality=92)
                key = f"{shard:05d}{i:04d}"
                writer.write({"__key__": key, "jpg": buffer.getvalue(), "txt": path.stem.replace("_", " ")})
        stats = {"count": copies * len(photos), "successes": copies * len(photos)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return len(photos)


def ipa(*arguments: str) -> tuple[float, float]:
    """Run the command; return wall seconds and its peak memory in GiB."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ipa_train.cli.main", *arguments], check=True)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return time.perf_counter() - start, children / 2**20


def main() -> None:
    """Run everything and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    work = args.work.resolve()
    write_models(work / "models")
    num_photos = write_shards(work / "shards")
    run = [
        "train",
        "experiment=sd15_linear",
        f"base.path={work / 'models' / 'base'}",
        f"image_encoder.path={work / 'models' / 'image_encoder'}",
        "image_encoder.subfolder=''",
        f"data.shards={work / 'shards'}",
        f"data.resolution={args.resolution}",
        f"data.global_batch_size={args.batch_size}",
        "data.num_workers=1",
        "trainer=cpu",
        "callbacks.sample_grid.every_steps=0",
        "run.name=full_size",
        f"run.path={work / 'run'}",
        "trainer.log_every_n_steps=1",
        f"callbacks.checkpointing.every_steps={args.steps // 2}",
    ]
    first_seconds, peak_gib = ipa(*run, f"trainer.max_steps={args.steps // 2}")
    resume_seconds, peak_gib = ipa(*run, f"trainer.max_steps={args.steps}")
    ipa("export", str(work / "run"), "--dtype", "fp16", "--out", str(work / "export_fp16"))
    ipa("export", str(work / "run"), "--dtype", "fp32", "--out", str(work / "export_fp32"))

    pipe = StableDiffusionPipeline.from_pretrained(work / "models" / "base", torch_dtype=torch.bfloat16)
    pipe.load_ip_adapter(
        str(work / "export_fp16"),
        subfolder="",
        weight_name="ip_adapter.safetensors",
        image_encoder_folder=str(work / "models" / "image_encoder"),
    )
    with (work / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("perf/images_per_second")]
    rates = [float(row["perf/images_per_second"]) for row in rows]
    figures = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "resolution": args.resolution,
        "batch_size": args.batch_size,
        "photographs": num_photos,
        "seconds_per_step": args.batch_size / max(rates),
        "images_per_second": max(rates),
        "peak_memory_gib": peak_gib,
        "start_and_half_the_steps_seconds": first_seconds,
        "resume_and_half_the_steps_seconds": resume_seconds,
        "loaded_in_diffusers": type(pipe.unet.encoder_hid_proj).__name__,
        "files_mb": {
            str(path.relative_to(work)): round(path.stat().st_size / 1e6, 1)
            for pattern in ("export_*/*", "run/checkpoints/*/*")
            for path in sorted(work.glob(pattern))
        },
    }
    text = json.dumps(figures, indent=2)
    (work / "full_size.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
