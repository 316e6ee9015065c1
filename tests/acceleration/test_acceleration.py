"""What is refused, and that one way to run takes the place of another."""

import pytest
import torch
import torch._inductor.config

from ipa_train.acceleration import Acceleration
from ipa_train.adapter import IPAdapter, LinearProjector
from ipa_train.cli.build import build_module
from ipa_train.cli.config import load_config
from ipa_train.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing": "selektive"}, r"acceleration\.checkpointing='selektive' is unknown\. Did you mean 'select"),
        ({"compile": "block"}, r"acceleration\.compile='block' is unknown\. Did you mean 'blocks'"),
        ({"cuda_graphs": True}, r"cuda_graphs=true replays compiled kernels: add acceleration\.compile=blocks"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Acceleration(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu():
    with pytest.raises(ConfigError, match=r"cuda_graphs=true needs a GPU, and there is none"):
        Acceleration(compile="blocks", cuda_graphs=True)


def test_compilation_needs_a_compiler():
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ConfigError, match=r"acceleration\.compile needs a C\+\+ compiler, and none was found"):
        Acceleration(compile="blocks")


def test_one_way_to_run_takes_the_place_of_another(base):
    plain = [module.forward for module in base.unet.modules()]
    adapter = IPAdapter(
        projector=LinearProjector(feature_dim=24, context_dim=base.context_dim), sites=base.attention_sites()
    ).attach(base.attention_sites())

    def saved_bytes():
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: storages.setdefault(x.data_ptr(), x), lambda x: x):
            latents = torch.randn(2, 4, 16, 16)
            base.predict(latents, torch.tensor([10, 900]), base.encode_text(["a", "b"]), adapter(torch.ones(2, 24)))
        return sum(x.untyped_storage().nbytes() for x in storages.values())

    kept = {}
    for checkpointing in ("none", "full", "full", "none"):
        Acceleration(checkpointing=checkpointing).apply(base)
        kept.setdefault(checkpointing, []).append(saved_bytes())
    assert kept["none"][0] == kept["none"][1]
    assert kept["full"][0] == kept["full"][1] < kept["none"][0] / 2
    assert [module.forward for module in base.unet.modules()] == plain


def test_graphs_refuse_pictures_of_several_sizes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ipa_train.acceleration.acceleration.require_compilers", lambda: None)
    config = load_config(
        [
            "run.name=x",
            "data.shards=x.tar",
            "data.bucket_step=64",
            "acceleration.compile=blocks",
            "acceleration.cuda_graphs=true",
        ]
    )
    with pytest.raises(ConfigError, match=r"cuda_graphs=true .* data\.bucket_step=64 makes several"):
        build_module(config)
