"""Does it work elsewhere? Load exported adapters in plain diffusers, generate, and score what comes out.

    python -m examples.tiny_world.evaluate --trained A [B C] --untrained FILE --out outputs/demo

Imports nothing of ipa_train: this is what anyone with the file and diffusers gets. Every training seed has its own
held-out scenes; captions name the shape alone ("a star"), so hues can come from the image prompt only. Writes
before_after.png, scores.md and scores.json.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from examples.tiny_world.models import Judge, read_attributes
from examples.tiny_world.scenes import PATTERNS, Scenes, draw_scenes, render

BASE = Path(__file__).parent / "base"
HELD_OUT_SEED = 6_000_000
STEPS, GUIDANCE, BATCH = 20, 3.0, 32
CHANCE = {"shape hue": 60 / 360, "background hue": 60 / 360, "pattern": 1 / len(PATTERNS)}


class World:
    """The base in a diffusers pipeline, the tiny image encoder, and the judge."""

    def __init__(self) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.encoder, self.processor = self.pipeline.image_encoder, self.pipeline.feature_extractor
        self.judge = Judge().eval()
        self.judge.load_state_dict({name: w.float() for name, w in load_file(BASE / "judge.safetensors").items()})

    def load(self, adapter: Path | None) -> None:
        """Put an adapter file in, in place of the one before; or none."""
        if self.pipeline.unet.encoder_hid_proj is not None:
            self.pipeline.unload_ip_adapter()
        if adapter is not None:
            # The encoder stays out of the pipeline: it is given embeddings, see generate.
            self.pipeline.load_ip_adapter(
                str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None
            )

    @torch.inference_mode()
    def generate(self, captions: list[str], images: Tensor | None, seed: int, name: str) -> Tensor:
        """Pictures (n, 3, 32, 32) in 0..1; the noise of picture i depends on seed and i alone.

        The pipeline takes one image prompt for all pictures of a call, so this is its loop, for a batch of prompts.
        """
        pipe = self.pipeline
        pipe.scheduler.set_timesteps(STEPS)
        done = []
        with tqdm(total=len(captions), desc=name, unit="img") as bar:
            for start in range(0, len(captions), BATCH):
                rows = range(start, min(start + BATCH, len(captions)))
                text, no_text = pipe.encode_prompt([captions[i] for i in rows], "cpu", 1, True, [""] * len(rows))
                conditions = {"encoder_hidden_states": torch.cat([no_text, text])}
                if images is not None:
                    features = self.features(images[rows.start : rows.stop])[:, None]
                    conditions["added_cond_kwargs"] = {
                        "image_embeds": [torch.cat([torch.zeros_like(features), features])]
                    }
                latents = torch.cat([torch.randn(1, 4, 8, 8, generator=_generator(seed + i)) for i in rows])
                for t in pipe.scheduler.timesteps:
                    without, given = pipe.unet(torch.cat([latents, latents]), t, **conditions).sample.chunk(2)
                    prediction = without + GUIDANCE * (given - without)
                    latents = pipe.scheduler.step(prediction, t, latents).prev_sample
                decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
                done.append((decoded / 2 + 0.5).clamp(0, 1))
                bar.update(len(rows))
        return torch.cat(done)

    @torch.inference_mode()
    def check(self, caption: str, image: Tensor, seed: int, expected: Tensor) -> None:
        """One picture through the pipeline's own call, which must be the one that :meth:`generate` drew."""
        features = self.features(image[None])[:, None]
        drawn = self.pipeline(
            caption,
            ip_adapter_image_embeds=[torch.cat([torch.zeros_like(features), features])],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=_generator(seed),
            output_type="pt",
        ).images[0]
        if (drawn - expected).abs().max() > 2 / 255:
            raise SystemExit("The pipeline's own call draws another picture than the batched loop.")

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Embeddings of the tiny CLIP."""
        pixels = self.processor(to_pil(images), return_tensors="pt").pixel_values
        return self.encoder(pixels).image_embeds

    @torch.inference_mode()
    def score(self, pictures: Tensor, prompts: Tensor, scenes: Scenes) -> dict[str, float]:
        """Share of pictures whose attributes match the scenes', and the mean CLIP similarity to the image prompts."""
        read = read_attributes(self.judge(pictures))

        def near(name: str) -> float:
            off = ((read[name] - getattr(scenes, name) + 0.5) % 1 - 0.5).abs() * 360
            return (off < 30).float().mean().item()

        return {
            "shape hue": near("shape_hue"),
            "background hue": near("background_hue"),
            "pattern": (read["pattern"] == scenes.pattern).float().mean().item(),
            "CLIP-I": F.cosine_similarity(self.features(pictures), self.features(prompts)).mean().item(),
        }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Pictures (n, 3, h, w) in 0..1 as PIL images."""
    return [Image.fromarray(array) for array in (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def draw_picture(rows: dict[str, Tensor], path: Path, columns: int = 8, scale: int = 3) -> None:
    """Rows of pictures, each named at its left."""
    cell, margin, gap = 32 * scale, 150, 6
    canvas = Image.new("RGB", (margin + columns * (cell + gap), len(rows) * (cell + gap) + gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for i, (name, pictures) in enumerate(rows.items()):
        top = gap + i * (cell + gap)
        draw.text((8, top + cell / 2), name, fill="black", font=font, anchor="lm")
        for k, picture in enumerate(to_pil(pictures[:columns])):
            canvas.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (margin + k * (cell + gap), top))
    canvas.save(path)


def table(scores: dict[str, list[dict[str, float]]], n: int) -> str:
    """Markdown: the mean over training seeds, and each seed."""
    columns = list(next(iter(scores.values()))[0])
    lines = [
        f"n = {n} held-out images for each of {len(scores['trained adapter'])} training seed(s); match: within 30 "
        "degrees of hue; mean (each seed)",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        "| chance | " + " | ".join(f"{CHANCE[c]:.2f}" if c in CHANCE else "" for c in columns) + " |",
    ]
    for name, seeds in scores.items():
        cells = []
        for column in columns:
            values = [s[column] for s in seeds]
            each = f" ({', '.join(f'{v:.2f}' for v in values)})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{each}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, nargs="+", required=True, help="one file for each training seed")
    parser.add_argument("--untrained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()  # it announces that embeddings are given instead of an encoder
    args.out.mkdir(parents=True, exist_ok=True)
    world = World()
    n = args.num_images
    scores: dict[str, list[dict[str, float]]] = {}
    rows: dict[str, Tensor] = {}
    for seed, trained in enumerate(args.trained):
        scenes = draw_scenes(n, HELD_OUT_SEED + seed)
        prompts = render(scenes)
        captions = [scenes.caption(i, template=0) for i in range(n)]
        wrong = prompts.roll(1, dims=0)
        runs = {"trained adapter": (trained, prompts), "trained, wrong image": (trained, wrong)}
        if seed == 0:
            runs = {"text only": (None, None), "untrained adapter": (args.untrained, prompts)} | runs
        for name, (adapter, images) in runs.items():
            world.load(adapter)
            pictures = world.generate(captions, images, HELD_OUT_SEED + 1000 * seed, f"seed {seed}: {name}")
            if name == "trained adapter":
                world.check(captions[0], images[0], HELD_OUT_SEED + 1000 * seed, pictures[0])
            scores.setdefault(name, []).append(world.score(pictures, prompts, scenes))
            if seed == 0:
                rows[name] = pictures
        if seed == 0:
            rows = {"image prompts": prompts} | {k: v for k, v in rows.items() if k != "trained, wrong image"}
            draw_picture(rows, args.out / "before_after.png")
    text = table(scores, n)
    (args.out / "scores.md").write_text(text)
    (args.out / "scores.json").write_text(json.dumps({"n": n, "scores": scores}, indent=1) + "\n")
    print(f"\n{text}\n{args.out / 'before_after.png'}")


if __name__ == "__main__":
    main()
