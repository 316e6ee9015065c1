"""Drawing with and without the image prompts, in every family and for adapters that read embeddings."""

import numpy as np
import pytest
import torch
from PIL import Image

from ipa_train.adapter import FaceProjector, IPAdapter, LinearProjector, TimeResampler
from ipa_train.bases import load_base
from ipa_train.bases.tiny import randomise, save_tiny_models
from ipa_train.bases.tiny_encoders import tiny_siglip
from ipa_train.conditioning import StoredEmbeddings
from ipa_train.errors import ConfigError
from ipa_train.eval.pipeline import load_pipeline
from ipa_train.eval.playground import Playground, Settings
from ipa_train.export import write_export

RED = Image.new("RGB", (64, 64), "red")


@pytest.fixture
def playground(tmp_path):
    """A function from an adapter's projector to a playground of it, with settings to draw by."""

    def make(family, projector, metadata=None, **sizes):
        path, encoder = save_tiny_models(tmp_path, family)
        if projector is TimeResampler:
            encoder = tmp_path / "siglip"
            tiny_siglip().save_pretrained(encoder)
        base = load_base(str(path), dtype="float32")
        sites = base.attention_sites()
        adapter = randomise(IPAdapter(projector=projector(context_dim=base.context_dim, **sizes), sites=sites), seed=5)
        file = write_export(tmp_path / "adapter", adapter, sites, metadata=metadata or {})[0]
        made = Playground(lambda base: load_pipeline(base, file, str(encoder), dtype="float32", device="cpu"))
        return made, Settings(
            base=str(path),
            prompt="a cat",
            scale=1.0,
            layers="all",
            seed=0,
            num_inference_steps=2,
            guidance_scale=made.pipeline(str(path)).own_guidance_scale,
            size=32,
        )

    return make


@pytest.mark.parametrize(
    ("family", "projector", "sizes", "own_size"),
    [
        ("sd15", LinearProjector, {"feature_dim": 24}, 64),
        ("sd3", TimeResampler, {"feature_dim": 40, "dim": 64, "heads": 1, "num_tokens": 4}, 64),
        ("flux", LinearProjector, {"feature_dim": 24}, 1024),
    ],
)
def test_every_family_is_drawn_beside_scale_0(family, projector, sizes, own_size, playground):
    made, settings = playground(family, projector, **sizes)
    steps = []
    drawn, reference = made.draw(settings, [RED], None, lambda done, of: steps.append((done, of)))
    assert (np.array(drawn) != np.array(reference)).any()
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    steps.clear()
    off, same = made.draw(Settings(**{**vars(settings), "scale": 0.0}), [RED], None, lambda *step: steps.append(step))
    assert (np.array(off) == np.array(same)).all()
    assert same is reference
    assert steps == [(1, 2), (2, 2)], "what is known is not drawn again"
    assert made.pipeline(settings.base).own_size == own_size


def test_embeddings_are_image_prompts_too(playground):
    account = StoredEmbeddings(dim=8, normalize=True).identity()
    made, settings = playground("sd15", FaceProjector, metadata={"image_encoder": account}, feature_dim=8)
    drawn, reference = made.draw(settings, [], torch.linspace(-1, 1, 8)[None], lambda *_: None)
    assert (np.array(drawn) != np.array(reference)).any()
    with pytest.raises(ConfigError, match="there is no embedding: add"):
        made.draw(settings, [], None, lambda *_: None)
