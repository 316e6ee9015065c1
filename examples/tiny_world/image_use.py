"""Does the image-use gap tell a run that learns from one that cannot? Several kinds of runs, each with several seeds.

    python -m examples.tiny_world.image_use --out outputs/image_use

Beside the demo's training, three that are broken as trainings are in practice, without an error: image prompts that are
always dropped, features of another encoder than the image prompts will have, and image keys and values that stay zero.
And two that look broken and are not: frozen keys and values under a projector that learns, and an encoder of random
weights, both of which let the image's colours through. Writes image_use.json (every measurement), image_use.md and
image_use.png after each run; runs that are done are not run again.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

import lightning
import torch
from omegaconf import OmegaConf
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from examples.tiny_world.curves import Curve, Panel, draw_panels
from examples.tiny_world.draw_shards import write_shard
from examples.tiny_world.scenes import draw_scenes
from ipa_train.cli.build import build_data, build_loggers, build_module, build_trainer
from ipa_train.cli.config import load_config
from ipa_train.cli.main import main as ipa
from ipa_train.runtime.logging import setup_logging
from ipa_train.training.module import AdapterTraining
from ipa_train.training.run_dir import RunDir

ENCODER = Path(__file__).parent / "base" / "image_encoder"
HELD_OUT = 128
GAPS = ("val/gap_other", "val/gap_none")
VARIANTS = {
    "learning": "#1f77b4",
    "image always dropped": "#7f7f7f",
    "wrong encoder": "#d62728",
    "keys and values zero": "#ff7f0e",
    "projector alone": "#2ca02c",
    "random encoder": "#9467bd",
}
SOUND_AFTER_ALL = ("projector alone", "random encoder")


def options(variant: str, out: Path) -> list[str]:
    """What a variant changes of the demo's config."""
    random = out / "random_encoder"
    trained = random if variant in ("wrong encoder", "random encoder") else ENCODER
    held_out = random if variant == "random encoder" else ENCODER
    chosen = [f"image_encoder.path={trained}", f"data.shards={features(out, trained, 'train')}"]
    chosen += [f"callbacks.image_use.shards={features(out, held_out, 'held_out')}"]
    if variant == "image always dropped":
        chosen += ["dropout.image_rate=1", "dropout.text_rate=0", "dropout.both_rate=0"]
    return ["experiment=tiny_world", *chosen]


def make_data(out: Path, num_samples: int) -> None:
    """Shards to train on and shards held out, and an image encoder of random weights."""
    for name, count, seed in (("train", num_samples, 5_000_000), ("held_out", HELD_OUT, 7_000_000)):
        if not (out / "shards" / name / "00000_stats.json").exists():
            (out / "shards" / name).mkdir(parents=True, exist_ok=True)
            write_shard(out / "shards" / name, 0, draw_scenes(count, seed))
    if not (out / "random_encoder" / "config.json").exists():
        torch.manual_seed(0)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig.from_pretrained(ENCODER))
        model.save_pretrained(out / "random_encoder")


def features(out: Path, encoder: Path, part: str) -> Path:
    """The shards of ``part`` as ``encoder`` sees them."""
    cache = out / "features" / encoder.name / part
    encode = ["experiment=tiny_world", f"data.shards={out / 'shards' / part}", f"image_encoder.path={encoder}"]
    if not cache.exists() and ipa(["data", "encode", *encode, "--out", str(cache)]):
        raise SystemExit(f"{cache}: encoding failed.")
    return cache


def train(variant: str, seed: int, args: argparse.Namespace) -> Path:
    """One run, of which nothing but metrics.csv is kept."""
    run: Path = args.out / f"{variant.replace(' ', '_')}-{seed}"
    if (run / "done").exists():
        return run
    config = load_config(
        [
            *options(variant, args.out),
            f"seed={seed}",
            f"run.name={run.name}",
            f"run.path={run}",
            f"trainer.max_steps={args.steps}",
            f"data.global_batch_size={args.batch_size}",
            "trainer.log_every_n_steps=5",
            f"callbacks.image_use.every_steps={args.every_steps}",
            f"callbacks.image_use.num_samples={HELD_OUT}",
            "callbacks.sample_grid.every_steps=0",
            "~callbacks.checkpointing",
            "+trainer.enable_checkpointing=false",
        ]
    )
    (run / "metrics.csv").unlink(missing_ok=True)
    lightning.seed_everything(seed, verbose=False)
    module = build_module(config)
    if variant in ("keys and values zero", "projector alone"):
        freeze_keys_and_values(module, zero=variant == "keys and values zero")
    data = build_data(config, module)
    if variant == "wrong encoder":
        data.encoders = None  # without the check that refuses such features
    trainer = build_trainer(config, module, data)
    trainer.loggers = build_loggers(config, RunDir(run, resume_from=None, tracker_id=None))
    run.mkdir(parents=True, exist_ok=True)
    trainer.fit(module, data)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (run / "done").touch()
    return run


def freeze_keys_and_values(module: AdapterTraining, *, zero: bool) -> None:
    """Leave the projector alone to learn, through copies of the text's keys and values or through nothing."""
    for weight in module.adapter.branches.parameters():
        weight.requires_grad_(False)
        if zero:
            weight.zero_()


def read(run: Path, variant: str, seed: int) -> Iterator[dict[str, object]]:
    """Every number of the run that the comparison needs."""
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            names = [name for name in row if row[name] and name.startswith(("train/loss", "val/"))]
            yield {"variant": variant, "seed": seed, "step": int(row["step"]), **{n: float(row[n]) for n in names}}


def separated_from(rows: list[dict[str, object]], variant: str, gap: str) -> int | None:
    """The first step from which on no interval of a learning run meets one of ``variant``'s, over all seeds."""
    measured = [row for row in rows if gap in row]
    found = None
    for step in sorted({int(str(row["step"])) for row in measured if row["variant"] == variant}, reverse=True):
        here = [row for row in measured if row["step"] == step]
        lowest = min(float(str(r[gap])) - float(str(r[f"{gap}_ci"])) for r in here if r["variant"] == "learning")
        highest = max(float(str(r[gap])) + float(str(r[f"{gap}_ci"])) for r in here if r["variant"] == variant)
        if lowest <= highest:
            break
        found = step
    return found


def table(rows: list[dict[str, object]], steps: int) -> str:
    """Markdown: both gaps at the last step for each seed, and since when they have been apart."""
    lines = ["| run | gap to another image | gap to none | apart from learning since step |", "|---|---|---|---|"]
    for variant in dict.fromkeys(str(row["variant"]) for row in rows):
        last = [row for row in rows if row["variant"] == variant and row["step"] == steps and "val/gap_other" in row]
        cells = [", ".join(f"{row[gap]:.3f} ± {row[f'{gap}_ci']:.3f}" for row in last) for gap in GAPS]
        since = "" if variant == "learning" else str(separated_from(rows, variant, "val/gap_other") or "never")
        lines.append(f"| {variant} | {' | '.join(cells)} | {since} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, object]], path: Path) -> None:
    """Training loss above, gap below, of the sound and the broken runs."""

    def curves(metric: str, *, band: bool) -> list[Curve]:
        found = []
        for variant, colour in VARIANTS.items():
            if variant in SOUND_AFTER_ALL:
                continue
            for seed in sorted({int(str(row["seed"])) for row in rows}):
                own = [r for r in rows if (r["variant"], r["seed"]) == (variant, seed) and metric in r]
                points = [(float(str(r["step"])), float(str(r[metric]))) for r in own]
                widths = [float(str(r[f"{metric}_ci"])) for r in own] if band else None
                if points:
                    found.append(Curve(variant, colour, points, widths))
        return found

    panels = [
        Panel("training loss: which of these runs learn from their images?", curves("train/loss", band=False)),
        Panel("image-use gap to another image, with 95 % intervals", curves("val/gap_other", band=True)),
    ]
    draw_panels(panels, path, x_label="step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every-steps", type=int, default=30, help="steps between two measurements")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=2000, help="to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out = args.out.resolve()
    make_data(args.out, args.num_samples)
    setup_logging()
    rows = []
    for variant in args.variants:
        for seed in args.seeds:
            rows += list(read(train(variant, seed, args), variant, seed))
            (args.out / "image_use.json").write_text(json.dumps(rows) + "\n")
            (args.out / "image_use.md").write_text(table(rows, args.steps))
            picture(rows, args.out / "image_use.png")
    print(f"\n{table(rows, args.steps)}\n{args.out / 'image_use.png'}")


if __name__ == "__main__":
    main()
