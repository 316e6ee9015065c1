"""Pictures: seeds, precision, the grid, and what is refused before diffusers stumbles over it."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.bases import StableDiffusion
from ipa_train.bases.tiny import save_tiny_models, tiny_pipeline
from ipa_train.conditioning import CLIPImageEncoder
from ipa_train.errors import ConfigError, ExportError
from ipa_train.eval.generate import generate, grid, to_pil, to_tensor
from ipa_train.eval.pipeline import load_pipeline
from ipa_train.export import to_interchange, write_export

STEPS = {"size": (64, 64), "num_inference_steps": 2}


def adapter_for(base, num_tokens=4):
    projector = LinearProjector(feature_dim=24, context_dim=base.context_dim, num_tokens=num_tokens)
    return IPAdapter(projector=projector, sites=base.attention_sites())


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture
def exported(base, image_encoder, tmp_path):
    """A function that writes an adapter file for the tiny base."""

    def write(num_tokens=4):
        metadata = {"image_encoder": image_encoder.identity()}
        return write_export(tmp_path, adapter_for(base, num_tokens), base.attention_sites(), metadata=metadata)[0]

    return write


def draw(base, adapter, image_encoder, image_prompts, captions, **options):
    kind = adapter.projector.feature_kinds[0]
    features, null_features = image_encoder.encode(image_prompts, kind), image_encoder.null_features(kind)
    return generate(base, adapter, [features], [null_features], captions, **options)


def difference(a, b):
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (a, b)]
    return (pixels[0] - pixels[1]).abs().max()


def test_a_picture_depends_on_its_seed_and_not_on_its_neighbours(base, image_encoder, prompts):
    adapter = adapter_for(base).attach(base.attention_sites())
    both = draw(base, adapter, image_encoder, prompts, ["a", "b"], seed=5, **STEPS)
    (second,) = draw(base, adapter, image_encoder, prompts[1:], ["b"], seed=6, **STEPS)
    assert difference(both[1], second) <= 1
    (other,) = draw(base, adapter, image_encoder, prompts[1:], ["b"], seed=7, **STEPS)
    assert difference(both[1], other) > 1


def test_the_scale_is_for_one_drawing(base, image_encoder, prompts):
    adapter = adapter_for(base).attach(base.attention_sites())
    full, half, none, again = (
        draw(base, adapter, image_encoder, prompts[:1], ["a"], scale=scale, **STEPS)[0]
        for scale in (1.0, 0.5, 0.0, 1.0)
    )
    assert difference(full, half) > 1 < difference(half, none)
    assert difference(full, again) == 0
    adapter.detach()
    (base_alone,) = draw(
        base, adapter.attach(base.attention_sites()), image_encoder, prompts[1:], ["a"], scale=0.0, **STEPS
    )
    assert difference(base_alone, none) == 0, "at scale 0 no image prompt matters"


def test_guidance_of_one_takes_one_half(base, image_encoder, prompts):
    adapter = adapter_for(base).attach(base.attention_sites())
    assert len(draw(base, adapter, image_encoder, prompts, ["a", "b"], guidance_scale=1.0, **STEPS)) == 2


def test_the_vae_may_have_its_own_precision(tiny_models, image_encoder, prompts):
    base = StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="bfloat16", vae_dtype="float32")
    adapter = adapter_for(base).attach(base.attention_sites())
    assert len(draw(base, adapter, image_encoder, prompts, ["a", "b"], **STEPS)) == 2


def test_drawing_leaves_the_random_numbers_of_training_alone(base, image_encoder, prompts):
    adapter = adapter_for(base).attach(base.attention_sites())
    state = torch.get_rng_state()
    draw(base, adapter, image_encoder, prompts, ["a", "b"], **STEPS)
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_are_the_tensors_they_were():
    pixels = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_tensor(to_pil(pixels)), pixels)


def test_grid_has_a_row_for_each_label():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    picture = grid([[red, blue], [blue]], ["one", "two"], cell=50)
    assert picture.size == (2 * 54 + 4, 2 * 70)
    centres = [picture.getpixel((4 + 54 * column + 25, 70 * row + 16 + 25)) for row in (0, 1) for column in (0, 1)]
    assert centres == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 255, 255)]
    with pytest.raises(ValueError, match="zip"):
        grid([[red]], ["one", "two"], cell=50)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_encoder_is_itself_in_any_precision(dtype, exported, tiny_models):
    encoder = CLIPImageEncoder.from_pretrained(str(tiny_models[1]), dtype=dtype)
    assert {p.dtype for p in encoder.model.parameters()} == {getattr(torch, dtype)}
    pipeline = load_pipeline(str(tiny_models[0]), exported(), str(tiny_models[1]), dtype=dtype, device="cpu")
    assert {p.dtype for p in pipeline.base.unet.parameters()} == {getattr(torch, dtype)}


def test_what_does_not_belong_together_is_refused(exported, tiny_models, tiny_sd21, tmp_path):
    base, encoder = (str(path) for path in tiny_models)
    with pytest.raises(ConfigError, match=r"made for a base whose image tokens have width 64, and .* has 128"):
        load_pipeline(str(tiny_sd21[0]), exported(), encoder, dtype="float32", device="cpu")
    _, other = save_tiny_models(tmp_path / "other", seed=9)
    with pytest.raises(ExportError, match="trained with the image encoder 'image_encoder'"):
        load_pipeline(base, exported(), str(other), dtype="float32", device="cpu")
    with pytest.raises(ExportError, match=r"diffusers would not load this adapter: .* not 8"):
        load_pipeline(base, exported(num_tokens=8), encoder, dtype="float32", device="cpu")
    with pytest.raises(ExportError, match="no such file"):
        load_pipeline(base, tmp_path / "nothing.bin", encoder, dtype="float32", device="cpu")


def test_a_base_with_other_attentions_is_refused(tiny_models, exported, tmp_path):
    pipeline = tiny_pipeline()
    config = {**pipeline.unet.config, "block_out_channels": (16, 32, 32, 64)}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    pipeline.save_pretrained(tmp_path / "slim")
    message = r"ip_adapter\.9\.to_k_ip\.weight has width 64, and that attention of this base has width 32"
    with pytest.raises(ExportError, match=message):
        load_pipeline(str(tmp_path / "slim"), exported(), str(tiny_models[1]), dtype="float32", device="cpu")


def test_the_file_draws_what_training_drew(base, image_encoder, tiny_models, prompts, tmp_path):
    """Also out of a layout that diffusers itself refuses: a .bin without parts."""
    adapter = adapter_for(base)
    torch.save(to_interchange(adapter, base.attention_sites()), tmp_path / "flat.bin")
    adapter.attach(base.attention_sites())
    (own,) = draw(base, adapter, image_encoder, prompts[:1], ["a"], seed=3, **STEPS)
    pipeline = load_pipeline(
        str(tiny_models[0]), tmp_path / "flat.bin", str(tiny_models[1]), dtype="float32", device="cpu"
    )
    (theirs,) = pipeline.draw(
        "a",
        pipeline.features(to_pil(prompts[:1])),
        height=64,
        width=64,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
    )
    assert difference(own, theirs) <= 1
