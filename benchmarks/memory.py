"""The forecast of `ipa check` against the memory that training steps really take, on this machine's CPU.

    python -m benchmarks.memory [--out benchmarks/results/memory.json] [--cases half full]

Every case runs two training steps in a process of its own (models of random weights in the shape of SD 1.5, cached
features or online encoders), whose allocator hands freed memory back at once, so that the kernel's high-water mark
follows what is alive. The forecast is made in this process, without the models' weights. `full` needs 5 GB.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.reporting import facts, finish, parser, table
from benchmarks.sizes import CLIP_L_TEXT, SD15_UNET, VAE, noise_schedule
from ipa_train.adapter import LinearProjector
from ipa_train.bases import StableDiffusion
from ipa_train.bases.tiny import tiny_tokenizer
from ipa_train.bases.vae import FrozenVAE
from ipa_train.conditioning import ConditionDropout, StoredEmbeddings
from ipa_train.data.batch import Batch, Features, Pictures
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.training.ema import AdapterEMA
from ipa_train.training.forecast import forecast
from ipa_train.training.module import AdapterTraining
from ipa_train.training.optim import LRSchedule

# Freed blocks above this size go back to the kernel at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    width: float
    """Of the UNet and VAE, in parts of SD 1.5's."""
    dtype: torch.dtype
    resolution: int
    batch_size: int
    online: bool = False
    """Whether the VAE runs, as without a feature cache."""


CASES = {
    "small": Case(1 / 4, torch.float32, 256, 4),
    "quarter": Case(1 / 4, torch.float32, 256, 8),
    "quarter, VAE online": Case(1 / 4, torch.float32, 256, 8, online=True),
    "half": Case(1 / 2, torch.bfloat16, 256, 8),
    "half, 512 pixels": Case(1 / 2, torch.bfloat16, 512, 2),
    "full": Case(1, torch.bfloat16, 256, 4),
}


def make_module(case: Case, device: str) -> AdapterTraining:
    torch.manual_seed(0)
    torch.set_default_dtype(case.dtype)
    with torch.device(device):
        unet = UNet2DConditionModel(**SD15_UNET | _narrow(SD15_UNET, case.width))
        vae = AutoencoderKL(**VAE | _narrow(VAE, case.width))
        text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L_TEXT | {"num_hidden_layers": round(12 * case.width)}))
    torch.set_default_dtype(torch.float32)
    with torch.device(device):
        return AdapterTraining(
            base=StableDiffusion(
                unet=unet,
                vae=FrozenVAE(vae),
                text_encoder=text_encoder,
                tokenizer=tiny_tokenizer(),
                scheduler=noise_schedule(),
            ),
            image_encoder=StoredEmbeddings(dim=1024),
            projector=partial(LinearProjector),
            objective=partial(Objective),
            optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
            timesteps=UniformTimesteps(),
            dropout=ConditionDropout(),
            lr_schedule=LRSchedule(),
            ema=AdapterEMA(),
        )


def _narrow(config: dict[str, Any], width: float) -> dict[str, Any]:
    channels = tuple(round(channels * width) for channels in config["block_out_channels"])
    return {"block_out_channels": channels, "norm_num_groups": 32 if width == 1 else 16}


def make_batch(case: Case) -> Batch:
    n, size = case.batch_size, case.resolution
    sizes = torch.full((n, 2), size)
    content: Pictures | Features
    if case.online:
        pixels = torch.zeros(n, 3, size, size, dtype=torch.uint8)
        content = Pictures(pixels=pixels, separate_prompts=None, embeddings=torch.zeros(n, 1024))
    else:
        latents = torch.zeros(n, 4, size // 8, size // 8, dtype=torch.float16)
        content = Features(
            latents_mean=latents, latents_std=latents, image_features=(torch.zeros(n, 1024, dtype=torch.float16),)
        )
    return Batch(
        content=content,
        captions=["a caption"] * n,
        positions=torch.arange(n),
        original_sizes=sizes,
        crop_top_lefts=torch.zeros_like(sizes),
        target_sizes=sizes,
        keys=["0/0"] * n,
    )


def measure_here(case: Case) -> float:
    """GiB that the models and two steps need; this process must have done nothing before."""
    _train(Case(1 / 4, case.dtype, 64, 1, online=True))  # so that what libraries load at first use does not count
    before = status_gib("VmRSS")
    module = make_module(case, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: making models takes more
    _train(case, module)
    return status_gib("VmHWM") - before


def _train(case: Case, module: AdapterTraining | None = None) -> None:
    module = module or make_module(case, "cpu")
    assert module.ema is not None
    optimizer = module.make_optimizer(module.adapter.parameters())
    module.ema.start(module.adapter.named_parameters())
    for _ in range(2):  # in the order of Lightning's loop
        loss = module.training_step(make_batch(case), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.ema.update(module.adapter.named_parameters())
        del loss


def status_gib(name: str) -> float:
    """An entry of this process's status file: ``VmRSS``, memory in use, or ``VmHWM``, the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def compare(name: str) -> dict[str, Any]:
    """Measure a case in a process of its own, and forecast it in this one."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    measured = float(done.stdout)
    case = CASES[name]
    found = forecast(make_module(case, "meta"), make_batch(case))
    return {
        "measured_gib": measured,
        "forecast_gib": found.peak_gib,
        "forecast_over_measured": found.peak_gib / measured,
        "parts_gib": found.memory_gib,
    }


def markdown(figures: Any) -> str:
    rows = [
        [name, *(f"{found[key]:.2f}" for key in ("measured_gib", "forecast_gib", "forecast_over_measured"))]
        for name, found in figures["cases"].items()
    ]
    return table(["two training steps, SD 1.5's shape", "measured, GiB", "forecast, GiB", "ratio"], rows)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(measure_here(CASES[args.measure]))
        return
    settings = {name: {**vars(CASES[name]), "dtype": str(CASES[name].dtype)} for name in args.cases}
    figures = {**facts(("diffusers",)), "settings": settings, "cases": {name: compare(name) for name in args.cases}}
    finish(figures, markdown(figures), args.out)


if __name__ == "__main__":
    main()
