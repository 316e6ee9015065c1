"""Run the frozen encoders once: pictures to a cache of features that training reads in their place.

    ipa data encode experiment=sd15_linear data.shards='/data/laion/{00000..41000}.tar' --out /data/cache

Takes what `ipa train` takes, so that the features are those that the run itself would have computed. Every process of a
torchrun, srun or Slurm array takes its share of the shards; the same command again does only what is missing. Where
there are many processes, run `ipa data index` first: each would do it all.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from data_tools.encode import CacheWriter
from data_tools.work import Report, add_max_bad_rate, add_share_arguments, my_share
from ipa_train.bases import LatentPosterior
from ipa_train.cli.binding import instantiate, locate
from ipa_train.cli.config import load_config
from ipa_train.conditioning import ImageEncoder
from ipa_train.data.batch import Pictures
from ipa_train.data.cache import encoders_identity
from ipa_train.errors import DataError
from ipa_train.runtime.device import local_device
from ipa_train.runtime.logging import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the tool's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for ipa train")
    parser.add_argument("--config-dir", help="folder with experiment/*.yaml files of your own")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument("--flip", action="store_true", help="features of the mirrored pictures too, for data.flip_rate")
    parser.add_argument("--no-std", action="store_true", help="leave out the spread of the latents: half the size")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures encoded at a time")
    parser.add_argument("--report", type=Path, help="where to write the JSON report, if not beside the cache")
    add_max_bad_rate(parser)
    add_share_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Encode this process's share of the shards, and report."""
    setup_logging()
    config = load_config(["run.name=encode", *args.overrides], config_dir=args.config_dir)
    device = torch.device("cpu") if config.trainer.accelerator == "cpu" else local_device()
    family = locate(config.base._target_, "base").__self__
    vae = family.load_vae(**{key: value for key, value in config.base.items() if key != "_target_"}).to(device)
    image_encoder: ImageEncoder = instantiate(config.image_encoder).to(device)
    kinds = locate(config.adapter.projector._target_, "adapter.projector").feature_kinds
    data = instantiate(
        config.data,
        image_prompt_size=image_encoder.image_size,
        embedding_shape=image_encoder.embedding_shape,
        encoders=encoders_identity(vae.identity(), image_encoder.identity(), "+".join(kinds)),
    )

    def encode(pictures: Pictures) -> tuple[LatentPosterior, tuple[Tensor, ...]]:
        prompts = pictures.image_prompts.to(device, non_blocking=True)
        stored = None if pictures.embeddings is None else pictures.embeddings.to(device, non_blocking=True)
        features = image_encoder.features(prompts, kinds, embeddings=stored)
        return vae.encode(pictures.pixels.to(device, non_blocking=True)), features

    writer = CacheWriter(
        data,
        encode,
        out=args.out,
        precision={"vae": str(vae.dtype), "image_encoder": str(image_encoder.dtype)},
        flip=args.flip,
        latents_std=not args.no_std,
        batch_size=args.batch_size,
    )
    return _encode(writer, args)


def _encode(writer: CacheWriter, args: argparse.Namespace) -> int:
    report = Report("encode", cache=str(args.out), fingerprint=writer.description.fingerprint)
    mine = my_share(range(len(writer.shards)), args)
    report.counts["shards left to other tasks"] = len(writer.shards) - len(mine)
    before = {shard: writer.done(shard) for shard in mine}
    done = [result for result in before.values() if result is not None]
    report.counts["shards encoded before"] = len(done)
    for result in writer.run([shard for shard in mine if before[shard] is None]):
        if isinstance(result, DataError):
            report.problem(str(result))
        else:
            report.counts["shards encoded"] += 1
            done.append(result)
    report.counts["samples"] = sum(result.num_samples for result in done)
    report.left_out([text for result in done for text in result.bad], report.counts["samples"], args.max_bad_rate)
    return report.finish(args.report or args.out / f"encode-report-{args.task_index:05d}.json")
