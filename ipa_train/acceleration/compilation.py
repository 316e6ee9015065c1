"""Compilation of the denoiser: each block by itself, or the whole forward."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch._inductor import exc
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.utils._triton import has_triton

from ipa_train.errors import ConfigError

Compile = Literal["none", "blocks", "whole"]

_MAX_VARIANTS = 128
"""Of one function: kinds of blocks (15 in SD 1.5) x one shape and any shape x with and without gradients, and to spare.

torch's own limit of 8 would leave most kinds of a UNet's blocks uncompiled.
"""


def require_compilers() -> None:
    """Look for what compilation itself needs.

    Raises:
        ConfigError: no C++ compiler, or on a GPU no Triton.
    """
    try:
        get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ConfigError(
            "acceleration.compile needs a C++ compiler, and none was found: install g++ or set CXX to one, or set "
            "acceleration.compile=none."
        ) from error
    if torch.cuda.is_available() and not has_triton():
        raise ConfigError(
            "acceleration.compile needs Triton for this GPU, and it is not there: pip install triton, or set "
            "acceleration.compile=none."
        )


def compiled(
    function: Callable[..., Any], *, cuda_graphs: bool, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """Compile for the shapes of the first call, and for any shape when a second one comes.

    What reaches torch's limit of variants stops the run: to go on uncompiled would be slow without a word.
    """
    torch._dynamo.config.recompile_limit = _MAX_VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = max(
        _MAX_VARIANTS, torch._dynamo.config.accumulated_recompile_limit
    )
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options: dict[str, Any] = {"triton.cudagraphs": True} if cuda_graphs else {}
    return torch.compile(function, dynamic=False if cuda_graphs else None, backend=backend, options=options or None)
