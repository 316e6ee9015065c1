"""The training graph and a diffusers pipeline with the exported file, side by side."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ipa_train.adapter import ImageTokens

SIZE = (64, 64)


def picture(seed):
    """An image prompt, as the encoder here and as pipelines take it."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return pixels, Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def load_in_diffusers(models, *folders, **options):
    """The pipeline of a folder with the adapters of these folders in it."""
    pipe = DiffusionPipeline.from_pretrained(models[0])
    if folders:
        names = ["ip_adapter.safetensors"] * len(folders)
        pipe.load_ip_adapter(
            [str(folder) for folder in folders],
            subfolder=[""] * len(folders),
            weight_name=names,
            image_encoder_folder=str(models[1]),
            **options,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens_of(adapter, image_encoder, pixels):
    """Image tokens of "no image" and of a picture: what guidance asks for."""
    (kind,) = adapter.projector.feature_kinds
    null, features = image_encoder.null_features(kind), image_encoder.encode(pixels, kind)
    return ImageTokens.cat([adapter(null), adapter(features)])


def embeds_of(pipe, *image_prompts):
    """The same of a pipeline, before its projectors; one entry of ``image_prompts`` for each adapter."""
    return pipe.prepare_ip_adapter_image_embeds(list(image_prompts), None, "cpu", 1, do_classifier_free_guidance=True)


def predictions(base, tokens, pipe, embeds):
    """One denoiser forward of each, without and with a caption."""
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    timesteps, text = torch.tensor([700, 700]), base.encode_text(["a", "a house"])
    own = base.predict(noisy, timesteps, text, tokens)
    conditions = {"image_embeds": embeds, **(base.added_conditions(text, None, SIZE) or {})}
    return own, pipe.unet(noisy, timesteps, text.context, added_cond_kwargs=conditions).sample
