"""Tiny models of every family and encoder, small shards, and the findings that make the table in the docs."""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from ipa_train.bases.tiny import tiny_image_encoder, tiny_pipeline
from ipa_train.bases.tiny_encoders import tiny_dino, tiny_siglip, tiny_siglip2
from tests.compatibility.rows import Finding, write_table

FAMILIES = {"sd35_medium": "sd35m", "flux_dev": "flux", "flux_schnell": "schnell"}
EMBEDDING_DIM = 8


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A shard whose samples hold a picture, a caption and an embedding."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "00000.tar")) as writer:
        for i in range(24):
            picture, embedding = io.BytesIO(), io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((40, 40)).save(picture, format="JPEG", quality=95)
            np.save(embedding, rng.normal(size=EMBEDDING_DIM).astype(np.float16))
            sample = {"jpg": picture.getvalue(), "txt": f"picture {i}", "npy": embedding.getvalue()}
            writer.write({"__key__": f"{i:04d}", **sample})
    (folder / "00000_stats.json").write_text(json.dumps({"count": 24, "successes": 24}))
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A function from a choice of base to the folder of a tiny one."""
    root = tmp_path_factory.mktemp("bases")

    def folder(base):
        if not (root / base).exists():
            tiny_pipeline(FAMILIES.get(base, base)).save_pretrained(root / base)
        return root / base

    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A function from a choice of image encoder to the folder of a tiny one."""
    root = tmp_path_factory.mktemp("encoders")
    models = {"dinov2_large": tiny_dino, "siglip_so400m": tiny_siglip, "siglip2_so400m": tiny_siglip2}
    models["dinov3_large"] = lambda: tiny_dino("dinov3_vit")

    def folder(encoder):
        if not (root / encoder).exists():
            models.get(encoder, tiny_image_encoder)().save_pretrained(root / encoder)
        return root / encoder

    return folder


@pytest.fixture(scope="session")
def findings(request):
    """Gathers what the tests find; --write-table puts it into the docs."""
    found: list[Finding] = []
    yield found
    if request.config.getoption("--write-table"):
        write_table(found)
