"""Train the tiny base from scratch: one command, one core, well under an hour.

    python -m examples.tiny_world.train_base [--out examples/tiny_world/base]

Writes a diffusers folder (VAE, CLIP text and image encoders, UNet; fp16 safetensors) and ``judge.safetensors``. Each
stage is skipped when its result is in ``--work`` already, so the command can be interrupted and run again.
"""

import argparse
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from examples.tiny_world import models
from examples.tiny_world.scenes import IMAGE_SIZE, draw_scenes, render

HERE = Path(__file__).parent


class Trainer:
    """AdamW with warm-up, cosine decay and clipping, and a progress bar: all that the four stages share."""

    def __init__(
        self,
        name: str,
        parameters: Iterable[nn.Parameter],
        *,
        steps: int,
        lr: float,
        warmup: int = 50,
        clip: float = 1.0,
    ) -> None:
        self.parameters, self.steps, self.lr, self.warmup, self.clip = list(parameters), steps, lr, warmup, clip
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
        self.bar = trange(steps, desc=name, mininterval=2)

    def step(self, i: int, loss: Tensor) -> None:
        """Take one update and show a smoothed loss."""
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / self.steps))
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (i + 1) / self.warmup) * decay
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        if i % 50 == 0:
            self.bar.set_postfix(loss=f"{loss.item():.4f}")


def normalise(images: Tensor) -> Tensor:
    """CLIP's normalisation of pictures in 0..1."""
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def disturb(images: Tensor, amount: float) -> Tensor:
    """Add pixel noise of a random strength to each picture, so that readers do not rely on perfect renders."""
    return (images + torch.randn_like(images) * amount * torch.rand(len(images), 1, 1, 1)).clamp(0, 1)


def train_vae(steps: int) -> AutoencoderKL:
    """Reconstruction (L1 + L2) and a weak KL term; the scaling factor makes latents unit-sized."""
    vae = models.make_vae().to(memory_format=torch.channels_last)
    trainer = Trainer("VAE", vae.parameters(), steps=steps, lr=2e-3, clip=math.inf)
    for i in trainer.bar:
        images = render(draw_scenes(16, 1_000_000 + i)).to(memory_format=torch.channels_last) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        trainer.step(i, reconstruction + 4e-7 * posterior.kl().mean())
    with torch.no_grad():
        images = render(draw_scenes(256, 7)) * 2 - 1
        latents = vae.encode(images).latent_dist.mean
        psnr = 10 * torch.log10(4 / F.mse_loss(vae.decode(latents).sample, images))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    print(f"VAE: held-out PSNR {psnr:.1f} dB, scaling factor {vae.config.scaling_factor}")
    return vae


def train_clip(
    tokenizer: CLIPTokenizer, steps: int
) -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """Contrastive on rich and plain captions, and the image embedding must keep the attributes."""
    text = CLIPTextModelWithProjection(models.text_config(tokenizer))
    vision = CLIPVisionModelWithProjection(models.vision_config())
    head = nn.Linear(models.WIDTH, models.Judge.NUM_OUTPUTS)
    logit_scale = nn.Parameter(torch.tensor(math.log(20.0)))
    parameters = [*text.parameters(), *vision.parameters(), *head.parameters(), logit_scale]
    trainer = Trainer("CLIP", parameters, steps=steps, lr=1e-3, warmup=100)
    for i in trainer.bar:
        scenes = draw_scenes(64, 2_000_000 + i)
        rich = torch.rand(len(scenes)) < 0.6
        captions = [scenes.rich_caption(k) if rich[k] else scenes.caption(k) for k in range(len(scenes))]
        image_embeds = vision(normalise(disturb(render(scenes), 0.03))).image_embeds
        text_embeds = text(models.tokenize(tokenizer, captions)).text_embeds
        similarity = F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
        logits = logit_scale.clamp(max=math.log(50)).exp() * similarity
        pairs = torch.arange(len(scenes))
        contrastive = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        trainer.step(i, contrastive + models.attribute_loss(head(image_embeds), scenes))
    return text, vision


def train_judge(steps: int) -> models.Judge:
    """Attributes from renders, sometimes blurred and noisy."""
    judge = models.Judge()
    trainer = Trainer("judge", judge.parameters(), steps=steps, lr=2e-3)
    for i in trainer.bar:
        scenes = draw_scenes(64, 3_000_000 + i)
        images = render(scenes)
        if i % 2:
            blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
            images = torch.lerp(images, blurred, torch.rand(len(images), 1, 1, 1))
        trainer.step(i, models.attribute_loss(judge(disturb(images, 0.06)), scenes))
    with torch.no_grad():
        scenes = draw_scenes(512, 77)
        read = models.read_attributes(judge(render(scenes)))
    for name in ("shape", "pattern"):
        print(f"judge: held-out {name} accuracy {(read[name] == getattr(scenes, name)).float().mean():.3f}")
    for name in ("shape_hue", "background_hue"):
        error = ((read[name] - getattr(scenes, name) + 0.5) % 1 - 0.5).abs().mean() * 360
        print(f"judge: held-out {name} error {error:.1f} degrees")
    return judge


def train_unet(
    vae: AutoencoderKL, text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, steps: int
) -> UNet2DConditionModel:
    """v-prediction on cached latents, captions dropped one time in ten; returns the moving average of the weights."""
    means, stds, captions = [], [], [""]
    with torch.no_grad():
        for k in trange(200, desc="latents"):
            scenes = draw_scenes(200, 4_000_000 + k)
            posterior = vae.encode(render(scenes).to(memory_format=torch.channels_last) * 2 - 1).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
            captions += [scenes.caption(i) for i in range(len(scenes))]
        mean, std = torch.cat(means), torch.cat(stds)
        distinct = list(dict.fromkeys(captions))
        context = torch.cat(
            [
                text(models.tokenize(tokenizer, distinct[k : k + 100])).last_hidden_state
                for k in range(0, len(distinct), 100)
            ]
        )
    number = {caption: k for k, caption in enumerate(distinct)}
    caption_ids = torch.tensor([number[caption] for caption in captions[1:]])

    unet = models.make_unet().to(memory_format=torch.channels_last)
    average = models.make_unet()
    average.load_state_dict(unet.state_dict())
    scheduler = models.make_scheduler()
    trainer = Trainer("UNet", unet.parameters(), steps=steps, lr=2e-3, warmup=200)
    for i in trainer.bar:
        rows = torch.randint(0, len(mean), (64,))
        noise = torch.randn(64, *mean.shape[1:])
        latents = (mean[rows] + std[rows] * torch.randn_like(noise)) * vae.config.scaling_factor
        text_ids = torch.where(torch.rand(64) < 0.1, 0, caption_ids[rows])
        timesteps = torch.randint(0, 1000, (64,))
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        prediction = unet(noisy, timesteps, context[text_ids]).sample
        trainer.step(i, F.mse_loss(prediction, scheduler.get_velocity(latents, noise, timesteps)))
        with torch.no_grad():
            rate = 1 - min(0.999, (1 + i) / (10 + i))
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), rate)
    return average


def save_base(out: Path, work: Path) -> None:
    """Put the parts together as a diffusers folder in fp16, and the judge beside them."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    with_projection = CLIPTextModelWithProjection.from_pretrained(work / "text")
    text = CLIPTextModel(with_projection.config)
    weights = {name.removeprefix("text_model."): w for name, w in with_projection.state_dict().items()}
    text.load_state_dict({name: w for name, w in weights.items() if name != "text_projection.weight"})
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=models.make_scheduler(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(work / "vision"),
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        safety_checker=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="")  # else the folder of the stages
    shutil.rmtree(out, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(out)
    judge = load_file(work / "judge" / "judge.safetensors")
    save_file({name: w.half() for name, w in judge.items()}, out / "judge.safetensors")
    (out / "judge.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny_base"), help="finished stages, in fp32")
    parser.add_argument("--stages", nargs="*", default=["vae", "clip", "judge", "unet"], help="for two terminals")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--clip-steps", type=int, default=2500)
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--unet-steps", type=int, default=6000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if not (work / "tokenizer").exists():
        models.make_tokenizer().save_pretrained(work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    if "vae" in args.stages and not (work / "vae").exists():
        torch.manual_seed(1)
        train_vae(args.vae_steps).save_pretrained(work / "vae")
    if "clip" in args.stages and not (work / "vision").exists():
        torch.manual_seed(2)
        text, vision = train_clip(tokenizer, args.clip_steps)
        text.save_pretrained(work / "text")
        vision.save_pretrained(work / "vision")
    if "judge" in args.stages and not (work / "judge").exists():
        torch.manual_seed(3)
        judge = train_judge(args.judge_steps)
        (work / "judge").mkdir()
        save_file(judge.state_dict(), work / "judge" / "judge.safetensors")
    if "unet" in args.stages and not (work / "unet").exists():
        torch.manual_seed(4)
        vae = AutoencoderKL.from_pretrained(work / "vae").to(memory_format=torch.channels_last)
        text = CLIPTextModelWithProjection.from_pretrained(work / "text")
        train_unet(vae, text, tokenizer, args.unet_steps).save_pretrained(work / "unet")
        save_base(args.out, work)
        size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
        print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
