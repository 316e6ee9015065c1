"""Groups of gloo processes that train a small SD 1.5 with DDP, each when it is told to."""

import logging
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.reporting import cpu_seconds
from benchmarks.scaling_model import fill_buckets
from benchmarks.sizes import SD15_UNET, noise_schedule
from ipa_train.adapter import LinearProjector
from ipa_train.bases import StableDiffusion
from ipa_train.bases.tiny import randomise, tiny_tokenizer, tiny_vae
from ipa_train.bases.vae import FrozenVAE
from ipa_train.conditioning import ConditionDropout, StoredEmbeddings
from ipa_train.data.batch import Batch, Features
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.runtime.distributed import leave_frozen_to_each_rank
from ipa_train.training.module import AdapterTraining
from ipa_train.training.optim import LRSchedule

FEATURE_DIM = 256


def small_training(width: int) -> AdapterTraining:
    """SD 1.5 in bf16 with ``width`` channels at its top where the real one has 320, and text in proportion."""
    text_dim = width * 768 // 320
    unet = UNet2DConditionModel(
        **SD15_UNET
        | {
            "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
            "norm_num_groups": 8,
            "cross_attention_dim": text_dim,
        }
    )
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=text_dim,
        intermediate_size=2 * text_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    base = StableDiffusion(
        unet=randomise(unet, seed=0).bfloat16(),
        vae=FrozenVAE(tiny_vae()),
        text_encoder=randomise(CLIPTextModel(text), seed=1).bfloat16(),
        tokenizer=tiny_tokenizer(),
        scheduler=noise_schedule(),
    )
    return AdapterTraining(
        base=base,
        image_encoder=StoredEmbeddings(dim=FEATURE_DIM),
        projector=partial(LinearProjector),
        objective=partial(Objective),
        optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
        timesteps=UniformTimesteps(),
        dropout=ConditionDropout(),
        lr_schedule=LRSchedule(),
    )


def cached_batch(positions: Tensor, latent_size: int) -> Batch:
    n, side = len(positions), 8 * latent_size
    generator = torch.Generator().manual_seed(int(positions[0]))
    return Batch(
        content=Features(
            latents_mean=torch.randn(n, 4, latent_size, latent_size, generator=generator).half(),
            latents_std=torch.full((n, 4, latent_size, latent_size), 0.1).half(),
            image_features=(torch.randn(n, FEATURE_DIM, generator=generator).half(),),
        ),
        captions=[f"picture {position}" for position in positions.tolist()],
        positions=positions,
        original_sizes=torch.full((n, 2), side),
        crop_top_lefts=torch.zeros(n, 2, dtype=torch.int64),
        target_sizes=torch.full((n, 2), side),
        keys=[str(position) for position in positions.tolist()],
    )


class _Loss(nn.Module):
    """The training step as a forward, which is where DDP hooks in."""

    def __init__(self, training: AdapterTraining) -> None:
        super().__init__()
        self.training_module = training
        leave_frozen_to_each_rank(self)

    def forward(self, batch: Batch) -> Tensor:
        return self.training_module.training_step(batch, 0)


class Rank:
    """One process's share of the training."""

    def __init__(self, *, width: int, latent_size: int, batch_size: int) -> None:
        training = small_training(width)
        self.weights = list(training.adapter.parameters())
        self.ddp = DistributedDataParallel(_Loss(training))
        self.optimizer = training.make_optimizer(self.weights)
        self.latent_size, self.batch_size, self.num_steps = latent_size, batch_size, 0
        self.bucket_bytes: list[int] = []
        self.ddp.register_comm_hook(None, self._all_reduce)

    def _all_reduce(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.bucket_bytes.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    def step(self, *, reduced: bool) -> None:
        first = (self.num_steps * dist.get_world_size() + dist.get_rank()) * self.batch_size
        batch = cached_batch(torch.arange(first, first + self.batch_size), self.latent_size)
        with nullcontext() if reduced else self.ddp.no_sync():
            self.ddp(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1

    def seconds(self, num_steps: int, *, reduced: bool) -> tuple[float, float]:
        """Wall and CPU seconds per step; ranks begin together."""
        dist.barrier()
        wall, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(num_steps):
            self.step(reduced=reduced)
        return (time.perf_counter() - wall) / num_steps, (cpu_seconds() - cpu) / num_steps

    def traffic(self) -> dict[str, Any]:
        """Of one step: the buckets as they went, as modelled, and every collective that the profiler sees."""
        self.step(reduced=True)  # DDP orders its buckets anew after the first step
        self.step(reduced=True)
        self.bucket_bytes.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.step(reduced=True)
        names = Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))
        sizes = [weight.nbytes for weight in reversed(self.weights)]
        return {
            "bucket_bytes": list(self.bucket_bytes),
            "modelled_bucket_bytes": fill_buckets(sizes),
            "gradient_bytes": sum(sizes),
            "collectives": dict(names),
        }


def _serve(rank: int, world_size: int, store: Path, pipe: Connection, settings: dict[str, int]) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    member = Rank(**settings)
    pipe.send(member.traffic())
    while order := pipe.recv():
        pipe.send(member.seconds(order["steps"], reduced=order["reduced"]))
    dist.destroy_process_group()


class Group:
    """Processes that train together when they are told to, and wait otherwise."""

    def __init__(self, size: int, folder: Path, settings: dict[str, int]) -> None:
        context = get_context("spawn")
        self.size, self._pipes, self._processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, folder / f"store{size}", theirs, settings)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.traffic, *_ = [pipe.recv() for pipe in self._pipes]

    def seconds(self, num_steps: int, *, reduced: bool) -> tuple[float, float]:
        """Of a step: wall seconds of the slowest process, and mean CPU seconds of one."""
        for pipe in self._pipes:
            pipe.send({"steps": num_steps, "reduced": reduced})
        walls, cpus = zip(*(pipe.recv() for pipe in self._pipes), strict=True)
        return max(walls), sum(cpus) / self.size

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
