"""Face adapters through the whole command: stored embeddings and masks in the shards, a LoRA in the export."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ipa_train.cli.main import main
from tests.data.conftest import encode, picture, write_shard
from tests.end_to_end.conftest import loss_curve

FACE_DIM = 20


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Shards whose samples hold the embedding of a face, and a mask around it."""
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    mask = np.zeros((40, 48), np.uint8)
    mask[8:32, 10:34] = 255
    for shard in range(2):
        samples = {}
        for n in range(shard * 10, shard * 10 + 10):
            embedding = io.BytesIO()
            np.save(embedding, rng.standard_normal(FACE_DIM).astype(np.float16))
            samples[f"{n:05d}"] = {
                "jpg": encode(picture(n)),
                "mask.png": encode(Image.fromarray(mask), "PNG"),
                "npy": embedding.getvalue(),
                "txt": f"person {n}",
            }
        write_shard(folder, shard, samples)
    return folder


@pytest.fixture
def command(train_command, faces, tiny_models):
    """A function from experiment, run name and overrides to arguments of `ipa`."""

    def make(experiment, name, *overrides):
        arguments = [a for a in train_command(name) if not a.startswith(("image_encoder.", "experiment="))]
        encoder = ["image_encoder.dim=20"]
        if experiment == "sd15_faceid_plus_v2":
            encoder += [
                f"image_encoder.path={tiny_models[1]}",
                "image_encoder.subfolder=''",
                "image_encoder.dtype=float32",
            ]
        options = [f"experiment={experiment}", f"data.shards={faces}", "adapter.sites.lora_rank=4", *encoder]
        return [*arguments, *options, *overrides]

    return make


def newest(run):
    return sorted((run / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize("experiment", ["sd15_faceid", "sd15_faceid_plus_v2"])
def test_it_trains_resumes_exports_and_starts_from_its_export(experiment, command, tmp_path, capfd):
    for name, max_steps in (("whole", 4), ("parts", 1), ("parts", 4)):
        assert main(command(experiment, name, f"trainer.max_steps={max_steps}")) == 0
    assert loss_curve(tmp_path / "parts") == loss_curve(tmp_path / "whole")
    whole, parts = (load_file(newest(tmp_path / name) / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    export = newest(tmp_path / "whole") / "ip_adapter.safetensors"
    assert main(command(experiment, "next", f"adapter.init_from={export}", "trainer.max_steps=1")) == 0
    first = load_file(tmp_path / "next" / "checkpoints" / "step-00000000" / "ip_adapter.safetensors")
    exported = load_file(export)
    assert all(torch.equal(first[name], exported[name]) for name in exported)
    capfd.readouterr()
    other = command(experiment, "other", f"adapter.init_from={export}", "adapter.sites.lora_rank=8")
    assert main(other) != 0
    assert "set adapter.sites.lora_rank=4" in capfd.readouterr().err
    assert main(["check", *command(experiment, "checked")[1:]]) == 0
    assert "diffusers" in capfd.readouterr().out


@pytest.mark.parametrize("experiment", ["sd15_faceid", "sd15_faceid_plus_v2"])
def test_from_the_cache_it_is_the_same_run(experiment, command, tmp_path):
    """Also where pictures are mirrored, and with them the prompt that is cut from them, but no embedding."""
    options = ["data.flip_rate=0.5", "trainer.max_steps=4"]
    assert main(command(experiment, "online", *options)) == 0
    overrides = [o for o in command(experiment, "unused")[1:] if not o.startswith("run.")]
    assert main(["data", "encode", *overrides, "--out", str(tmp_path / "cache"), "--flip"]) == 0
    assert main(command(experiment, "cached", *options, f"data.shards={tmp_path / 'cache'}")) == 0
    online, cached = loss_curve(tmp_path / "online"), loss_curve(tmp_path / "cached")
    assert online.keys() == cached.keys() == set(range(1, 5))
    assert [float(loss) for loss in cached.values()] == pytest.approx([*map(float, online.values())], rel=2e-3)
