"""What is refused, and that one way to run takes the place of another."""

import pytest
import torch

from ipa_train.acceleration import Acceleration
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


def test_compilation_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    from torch._inductor import cpp_builder

    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    with pytest.raises(ConfigError, match=r"acceleration\.compile needs a C\+\+ compiler, and none was found"):
        Acceleration(compile="blocks")
