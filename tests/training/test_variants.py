"""Every variant trains by the same step: what is to learn learns, what is frozen stays, and is not kept."""

import logging
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import FacePlusProjector, FaceProjector, LinearProjector
from ipa_train.bases import StableDiffusion, adapter_sites
from ipa_train.errors import ConfigError
from ipa_train.export import read_adapter_file
from ipa_train.training.callbacks.checkpointing import Checkpointing
from ipa_train.training.ema import AdapterEMA
from tests.training.conftest import make_batch
from tests.training.toy import make_trainer

LORA = partial(adapter_sites, lora_rank=4)
VARIANTS = {
    "faceid": {"projector": partial(FaceProjector), "sites": LORA},
    "faceid_portrait": {"projector": partial(FaceProjector, num_tokens=16)},
    "faceid_plus": {"projector": partial(FacePlusProjector), "sites": LORA},
    "faceid_plus_v2": {"projector": partial(FacePlusProjector, shortcut=True), "sites": LORA},
    "simple": {"projector": partial(LinearProjector), "sites": partial(adapter_sites, attention="concatenated")},
    "finetune": {
        "projector": partial(LinearProjector),
        "sites": partial(adapter_sites, attention="image_only"),
        "train_denoiser": True,
    },
}
BASELINES = {"simple": "concatenates", "finetune": "all of the denoiser is trained"}


def fit(module, folder):
    # Large enough for two by two tokens in the middle block: over a single one, queries and keys have no gradient.
    batches = DataLoader([make_batch(range(4 * i, 4 * i + 4), size=128) for i in range(3)], batch_size=None)
    make_trainer(3, [Checkpointing(folder=str(folder))]).fit(module, batches)
    return folder / "step-00000003"


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_adapter_learns_and_is_kept(variant, make_module, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ipa_train")
    module = make_module(**VARIANTS[variant], ema=AdapterEMA(decay=0.5))
    before = {name: weight.clone() for name, weight in module.adapter.state_dict().items()}
    others = {"base": module.base, "encoder": module.image_encoder}
    trained = "base.unet." if variant == "finetune" else "-"
    frozen = {f"{key}.{name}": w.clone() for key, part in others.items() for name, w in part.state_dict().items()}
    checkpoint = fit(module, tmp_path)
    for key, part in others.items():
        for name, weight in part.state_dict().items():
            if not f"{key}.{name}".startswith(trained):
                assert torch.equal(weight, frozen[f"{key}.{name}"]), name
    for name, weight in module.adapter.state_dict().items():
        assert not torch.equal(weight, before[name]), name

    exports = sorted(p.name for p in checkpoint.glob("ip_adapter.*"))
    said = [record.getMessage() for record in caplog.records if "hold no export" in record.getMessage()]
    if variant in BASELINES:
        assert exports == []
        (line,) = said
        assert BASELINES[variant] in line
        assert BASELINES[variant] in (checkpoint / "no_export.txt").read_text()
    else:
        assert exports == ["ip_adapter.bin", "ip_adapter.safetensors"]
        assert not said
        assert not (checkpoint / "no_export.txt").exists()
        state, metadata = read_adapter_file(checkpoint / "ip_adapter.safetensors")
        assert sum(weight.numel() for weight in state.values()) == sum(w.numel() for w in before.values())
        assert metadata["shortcut"] == {"faceid_plus": "false", "faceid_plus_v2": "true"}.get(variant, "null")


@pytest.mark.parametrize("variant", ["faceid_plus_v2", "simple"])
def test_a_bf16_base_follows_fp32(variant, make_module, tiny_models):
    bf16 = StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="bfloat16")
    Acceleration(checkpointing="full").apply(bf16)
    flat = []
    for options in ({}, {"base": bf16}):
        module = make_module(**VARIANTS[variant], **options)
        for name, weight in module.adapter.named_parameters():
            if name.endswith("_lora.up.weight"):
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        module.training_step(make_batch(range(4)), 0).backward()
        assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}
        flat.append(torch.cat([p.grad.flatten() for p in module.adapter.parameters()]))
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99


def test_a_denoiser_is_not_trained_in_bf16(make_module, tiny_models):
    base = StableDiffusion.from_pretrained(str(tiny_models[0]), dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"train_denoiser=true needs base\.dtype=float32, got bfloat16"):
        make_module(base=base, train_denoiser=True)


def test_only_the_denoisers_of_unets_are_trained(make_module, flux):
    with pytest.raises(ConfigError, match=r"adapter\.train_denoiser: fine-tuning is a baseline for UNets, not Flux"):
        make_module(base=flux, train_denoiser=True)


@pytest.mark.parametrize(("dtype", "warned"), [("float16", True), ("bfloat16", False)])
def test_a_range_too_small_for_gradients_is_said(make_module, tiny_models, caplog, dtype, warned):
    make_module(base=StableDiffusion.from_pretrained(str(tiny_models[0]), dtype=dtype))
    assert ("base.dtype=float16: small gradients are lost" in caplog.text) == warned
