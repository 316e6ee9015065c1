"""An IP-Adapter trained with plain torch: no Lightning, no Hydra, no data loader. The layers stand on their own.

python examples/train_without_a_framework.py --base FOLDER --image-encoder FOLDER --images FOLDER --out FOLDER
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import StableDiffusion
from ipa_train.conditioning import CLIPImageEncoder, ConditionDropout
from ipa_train.diffusion import Objective, UniformTimesteps
from ipa_train.export import write_export
from ipa_train.runtime.seeding import Draws


def load(paths: list[Path], size: int) -> torch.Tensor:
    """Square RGB pictures, uint8 (b, 3, size, size)."""
    pictures = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--base", required=True)
parser.add_argument("--image-encoder", required=True)
parser.add_argument("--images", type=Path, required=True, help="folder of .jpg files; their names are the captions")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--resolution", type=int, default=512)
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--steps", type=int, default=1000)
args = parser.parse_args()
paths = sorted(args.images.glob("*.jpg"))

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
base = StableDiffusion.from_pretrained(args.base).to(device)
encoder = CLIPImageEncoder.from_pretrained(args.image_encoder).to(device)
sites = base.attention_sites()
projector = LinearProjector(feature_dim=encoder.feature_dim("pooled"), context_dim=base.context_dim)
adapter = IPAdapter(projector=projector, sites=sites).to(device).attach(sites)
objective = Objective(base_prediction=base.prediction_type, schedule=base.schedule)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0.01)

for step in range(args.steps):
    positions = torch.arange(step * args.batch_size, (step + 1) * args.batch_size)
    draws = Draws(0, positions, device)
    batch = [paths[int(i) % len(paths)] for i in positions]
    dropped = ConditionDropout().draw(draws)
    features = encoder.encode(load(batch, encoder.image_size).to(device), "pooled")
    image_tokens = adapter(*dropped.image_features([features], [encoder.null_features("pooled")]))
    text = base.encode_text(dropped.captions([path.stem.replace("_", " ") for path in batch]))
    posterior = base.vae.encode(load(batch, args.resolution).to(device))
    posterior_noise, noise = objective.draw_noise(draws, posterior.mean.shape[1:])
    latents = posterior.sample(posterior_noise)
    timesteps = base.schedule.timesteps(UniformTimesteps().draw(draws))
    prediction = base.predict(objective.add_noise(latents, noise, timesteps), timesteps, text, image_tokens)
    loss = objective.losses(prediction, objective.target(latents, noise, timesteps), timesteps).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

write_export(args.out, adapter, sites)
