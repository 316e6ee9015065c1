"""Try everything a training run needs, before it waits in a queue.

    ipa check experiment=sd15_linear run.name=first data.shards='/data/laion/{00000..41000}.tar'
    ipa check experiment=sd15_linear data.shards=SHARDS --gpu h100 --gpus 64    # on a login node, for GPUs elsewhere

Takes what `ipa train` takes; binds every option, looks into the shards, loads the weights, forecasts memory and time,
runs a batch forward and backward, and says who will be able to load the result. A run that does not fit is refused.
Writes nothing but the shards' index and copies of remote ones.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from ipa_train.cli.build import build_data, build_module, build_trainer, describe_parameters
from ipa_train.cli.config import load_config
from ipa_train.cli.forecast import (
    choose_checkpointing,
    describe_memory,
    describe_time,
    device_of_run,
    forecast_memory,
    plan_of_run,
)
from ipa_train.data.batch import Batch, Pictures
from ipa_train.data.datamodule import StreamingDataModule
from ipa_train.data.sequential import SequentialDataModule
from ipa_train.errors import ConfigError, DataError
from ipa_train.export.description import describe_adapter
from ipa_train.export.loadability import loadability
from ipa_train.runtime.gpus import GPUS
from ipa_train.runtime.logging import setup_logging
from ipa_train.training.module import AdapterTraining


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for ipa train")
    parser.add_argument("--config-dir", help="folder with experiment/*.yaml files of your own")
    names = ", ".join(gpu.name.lower() for gpu in GPUS)
    parser.add_argument("--gpu", metavar="NAME", help=f"forecast for GPUs that are not in this machine: {names}")
    parser.add_argument("--gpus", metavar="N", type=int, help="forecast for so many processes, over all nodes")


def run(args: argparse.Namespace) -> int:
    """Check, and print a report."""
    setup_logging(level="WARNING")
    config = load_config(args.overrides, config_dir=args.config_dir)
    _say("config", "every option fits its class")
    module = build_module(config)
    for line in describe_parameters(module):
        _say("weights", line)
    data = build_data(config, module)
    if isinstance(data, SequentialDataModule):
        _say("shards", f"{len(data.tars):,} sources, streamed without an index")
    else:
        for line in _describe_stream(data):
            _say("shards", line)
    trainer = build_trainer(config, module, data, is_here=args.gpu is None)
    if args.gpus is not None and args.gpus < 1:
        raise ConfigError(f"--gpus must be at least 1, got {args.gpus}.")
    plan = plan_of_run(data, trainer, args.gpus)
    _say("batch", f"{plan.world_size} processes x {plan.num_micro_batches} micro-batches x {plan.batch_size} samples")
    _require_good_samples(data)
    device = device_of_run(config, args.gpu)
    # One sample is enough to try a step by, where its time says nothing of the run.
    batch = data.first_batch(plan.batch_size if device.is_here else 1, bucket=data.largest_bucket)
    if (policy := choose_checkpointing(config, module, data, plan, device)) is not None:
        _say("memory", f"acceleration.checkpointing=auto is {policy} on {device.name}")
    found = forecast_memory(module, batch, plan)
    for line in describe_memory(module, batch, plan, device, found):
        _say("memory", line)
    seconds = None
    if plan.base_shards > 1:
        _say("step", f"not tried: one process may not hold what {plan.base_shards} share")
    else:
        seconds = _run_one_batch(config, module, batch, times=2 if device.is_here else 1)
    for line in describe_time(found, plan, device, trainer.max_steps, seconds if device.is_here else None):
        _say("time", line)
    if module.adapter.unexportable is not None:
        _say("result", f"no loader will take it: {module.adapter.unexportable}")
    else:
        description = describe_adapter(module.adapter, module.sites)
        for verdict in loadability(description, module.image_encoder.identity()):
            _say("result", f"{verdict.loader:<24}{verdict}")
    _say("", "all good")
    return 0


def _describe_stream(data: StreamingDataModule) -> Iterator[str]:
    """How much there is, and how often each source and bucket comes, where there are several."""
    incomplete = sum(shard.entry.num_incomplete for shard in data.index.shards)
    yield f"{int(data.index.counts.sum()):,} samples in {len(data.index.shards):,} shards; {incomplete:,} left out"
    stream = data.stream
    if data.weights is not None:
        for name, size in stream.sources.items():
            yield f"{name}: {size:,} samples, {data.weights[name] / sum(data.weights.values()):.1%} of what is seen"
    if len(stream.buckets) > 1:
        for (height, width), share in zip(stream.buckets, stream.shares, strict=True):
            yield f"{height}x{width} (height x width): {share:.1%} of the batches"


def _require_good_samples(data: StreamingDataModule) -> None:
    loaded = next(iter(data.loader()))
    if loaded.bad:
        worst = loaded.bad[0]
        raise DataError(
            f"{len(loaded.bad)} bad samples in the first batch, e.g. {worst.shard}/{worst.key}: {worst.error}"
        )


def _run_one_batch(config: DictConfig, module: AdapterTraining, batch: Batch, *, times: int) -> float:
    """Return the seconds of the last time; those of the first say little, as libraries load."""
    device = "cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu"
    batch = batch.to(device)
    module.to(device)
    for _ in range(times):
        started = time.perf_counter()
        module.zero_grad()
        loss = module.training_step(batch, 0)
        torch.autograd.backward(loss)
        gradient = torch.nn.utils.get_total_norm([p.grad for p in module.adapter.parameters() if p.grad is not None])
        norm = gradient.item()  # waits for the device
        seconds = time.perf_counter() - started
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    content = batch.content
    shape = "x".join(map(str, (content.pixels if isinstance(content, Pictures) else content.latents_mean).shape))
    what = "pixels" if isinstance(content, Pictures) else "cached latents"
    _say("step", f"{what} {shape}, loss {loss.item():.4f}, gradient norm {norm:.3g}")
    _say("step", f"{seconds:.2f} s for a micro-batch of {len(batch)} on {device}, peak memory {peak:.2f} GiB")
    return seconds


def _say(what: str, text: str) -> None:
    sys.stdout.write(f"{what:<9}{text}\n")
