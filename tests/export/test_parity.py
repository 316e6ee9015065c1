"""The exported file, loaded by plain diffusers, is the adapter that was trained."""

import pytest
import torch
from diffusers import DDIMScheduler

from ipa_train.bases import load_base
from ipa_train.eval.generate import generate
from ipa_train.export import write_export
from tests.export.conftest import random_adapter
from tests.export.parity import (
    SIZE,
    embeds_of,
    load_in_diffusers,
    picture,
    predictions,
    relative_error,
    tokens_of,
)

VARIANTS = ["linear", "plus", "full"]


@pytest.mark.parametrize(
    ("family", "variant", "strict"),
    [
        *((family, variant, False) for family in ("sd15", "sd21", "sdxl") for variant in VARIANTS),
        *(("sd15", variant, True) for variant in VARIANTS),
    ],
)
@torch.no_grad()
def test_tokens_and_denoiser_equal_the_training_graph(family, variant, strict, models_of, image_encoder, tmp_path):
    base = load_base(str(models_of[family][0]), dtype="float32")
    adapter = random_adapter(base, image_encoder, variant)
    write_export(tmp_path, adapter, base.attention_sites())
    pipe = load_in_diffusers(models_of[family], tmp_path, low_cpu_mem_usage=not strict)

    pixels, image = picture(1)
    own_tokens, embeds = tokens_of(adapter, image_encoder, pixels), embeds_of(pipe, image)
    (their_tokens,) = pipe.unet.encoder_hid_proj(embeds)
    for half in (0, 1):
        assert relative_error(own_tokens.states[half], their_tokens[half, 0]) < 1e-5

    adapter.attach(base.attention_sites())
    own, theirs = predictions(base, own_tokens, pipe, embeds)
    assert relative_error(own, theirs) < 1e-5
    without, _ = predictions(base, None, pipe, embeds)
    assert relative_error(without, theirs) > 1e-2


@pytest.mark.parametrize(("family", "variant"), [*(("sd15", v) for v in VARIANTS), ("sdxl", "plus")])
@torch.no_grad()
def test_pictures_during_training_are_those_of_the_export(family, variant, models_of, image_encoder, tmp_path):
    base = load_base(str(models_of[family][0]), dtype="float32")
    adapter = random_adapter(base, image_encoder, variant)
    write_export(tmp_path, adapter, base.attention_sites())
    adapter.attach(base.attention_sites())
    pixels, image = picture(3)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0}
    kind = adapter.projector.feature_kinds[0]
    features, null_features = image_encoder.encode(pixels, kind), image_encoder.null_features(kind)
    (own,) = generate(base, adapter, [features], [null_features], ["a cat"], size=SIZE, seed=7, **options)
    pipe = load_in_diffusers(models_of[family], tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    theirs = pipe(
        "a cat",
        ip_adapter_image=image,
        height=SIZE[0],
        width=SIZE[1],
        generator=torch.Generator().manual_seed(7),
        **options,
    ).images[0]
    a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (own, theirs))
    assert (a - b).abs().max() <= 1
