"""Which modules a file's tensors belong to, told by their names and shapes alone.

A projector of the file's variant and sizes is built on the meta device, which takes no memory; its names and shapes,
and those of the family's branches, are what the file has to hold, no more and no less.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch

from ipa_train.adapter import (
    FacePlusProjector,
    FaceProjector,
    LinearProjector,
    MLPProjector,
    Projector,
    Resampler,
    TimeResampler,
)
from ipa_train.errors import ConfigError, ExportError

_Shape = tuple[int, ...]
Shapes = Mapping[str, _Shape]
Family = Literal["unet", "sd3", "flux", "instantx_flux"]
_LORA_PARTS = ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora")


def family_of(shapes: Shapes, numbers: list[int]) -> Family:
    """The family of bases that a file's branches fit: UNets count from 1, transformers from 0."""
    if any(name.startswith("image_proj.time_embedding.") or ".norm_ip." in name for name in shapes):
        return "sd3"
    if numbers[0] > 0:
        return "unet"
    has_biases = any(name.endswith(("to_k_ip.bias", "to_v_ip.bias")) for name in shapes)
    return "flux" if has_biases else "instantx_flux"


def lora_rank_of(shapes: Shapes) -> int:
    """Rank of the LoRA that FaceID adapters have beside their branches; 0 without one."""
    ranks = [shape[0] for name, shape in shapes.items() if name.endswith("to_q_lora.down.weight") and shape]
    return ranks[0] if ranks else 0


def branch_shapes(
    family: Family, shapes: Shapes, number: int, *, context_dim: int, lora_rank: int
) -> dict[str, _Shape]:
    """What a file of this family must hold for a site, by the width of its keys."""
    name = f"ip_adapter.{number}"
    hidden_dim = (*shapes[f"{name}.to_k_ip.weight"], 0)[0]
    wanted: dict[str, _Shape] = {f"{name}.{part}.weight": (hidden_dim, context_dim) for part in ("to_k_ip", "to_v_ip")}
    if family == "flux":
        wanted |= {f"{name}.{part}.bias": (hidden_dim,) for part in ("to_k_ip", "to_v_ip")}
    if family == "sd3":
        time_dim = (*shapes.get("image_proj.latents", ()), 0, 0, 0)[2]
        head_dim = (*shapes.get(f"{name}.norm_q.weight", ()), 0)[0]
        wanted |= {f"{name}.norm_ip.linear.weight": (2 * hidden_dim, time_dim)}
        wanted |= {f"{name}.norm_ip.linear.bias": (2 * hidden_dim,)}
        wanted |= {f"{name}.{part}.weight": (head_dim,) for part in ("norm_q", "norm_k", "norm_ip_k")}
    if lora_rank:
        # A self-attention of the same width stands before every cross-attention.
        for n, key_dim in ((number - 1, hidden_dim), (number, context_dim)):
            for part in _LORA_PARTS:
                in_dim = key_dim if part in ("to_k_lora", "to_v_lora") else hidden_dim
                wanted[f"ip_adapter.{n}.{part}.down.weight"] = (lora_rank, in_dim)
                wanted[f"ip_adapter.{n}.{part}.up.weight"] = (hidden_dim, lora_rank)
    return wanted


def projector_of(family: Family, shapes: Shapes, context_dim: int, source: str) -> Projector:
    """A projector of the variant and sizes that the most telling tensors have.

    Raises:
        ExportError: names ``source``, where no projector has such tensors.
    """
    part = {name.removeprefix("image_proj."): shape for name, shape in shapes.items()}
    try:
        with torch.device("meta"):
            for telling, make in _MAKERS[family].items():
                if set(telling.split()) <= part.keys():
                    return make(part, context_dim)
    except (ConfigError, IndexError, ValueError) as error:
        raise ExportError(f"{source}: its tensors have shapes that no adapter has: {error}") from error
    image_proj = sorted(name for name in shapes if name.startswith("image_proj."))
    raise ExportError(f"{source}: its projector is of an unknown kind, or incomplete: {', '.join(image_proj[:3])}.")


def _linear(part: Shapes, context_dim: int) -> Projector:
    rows, feature_dim = part["proj.weight"]
    tokens = max(1, rows // max(1, context_dim))
    return LinearProjector(feature_dim=feature_dim, context_dim=context_dim, num_tokens=tokens)


def _full(part: Shapes, context_dim: int) -> Projector:
    return MLPProjector(feature_dim=part["proj.0.weight"][-1], context_dim=context_dim)


def _face(part: Shapes, context_dim: int) -> Projector:
    (rows, _), feature_dim = part["proj.2.weight"], part["proj.0.weight"][-1]
    tokens = max(1, rows // max(1, context_dim))
    return FaceProjector(feature_dim=feature_dim, context_dim=context_dim, num_tokens=tokens)


def _face_plus(part: Shapes, context_dim: int) -> Projector:
    hidden_dim = part["perceiver_resampler.proj_in.weight"][-1]
    if (tokens := part["proj.2.weight"][0] // max(1, context_dim)) > FacePlusProjector.num_tokens:
        raise ValueError(f"{tokens} tokens, as Kolors' FaceID-Plus, where others have {FacePlusProjector.num_tokens}")
    return FacePlusProjector(feature_dim=part["proj.0.weight"][-1], hidden_dim=hidden_dim, context_dim=context_dim)


def _resampler(kind: type[Resampler] | type[TimeResampler], part: Shapes, context_dim: int) -> Projector:
    _, tokens, dim = part["latents"]
    return kind(
        feature_dim=part["proj_in.weight"][-1],
        context_dim=context_dim,
        num_tokens=tokens,
        dim=dim,
        heads=_heads(part["layers.0.0.to_q.weight"]),
    )


def _heads(to_q: tuple[int, ...]) -> int:
    return max(1, to_q[0] // Resampler.dim_head)


_RESAMPLER = "latents proj_in.weight layers.0.0.to_q.weight"
# The tensors that give a projector away, most telling first; in the order in which diffusers looks for them.
_MAKERS: dict[Family, dict[str, Callable[[Shapes, int], Projector]]] = {
    "unet": {
        "proj.weight": _linear,
        "proj.0.weight proj.3.weight": _full,
        "proj.0.weight proj.2.weight perceiver_resampler.proj_in.weight": _face_plus,
        "proj.0.weight proj.2.weight norm.weight": _face,
        _RESAMPLER: partial(_resampler, Resampler),
    },
    "flux": {"proj.weight": _linear},
    "instantx_flux": {"proj.0.weight proj.2.weight norm.weight": _face},
    "sd3": {_RESAMPLER: partial(_resampler, TimeResampler)},
}


def site_numbers(shapes: Shapes) -> list[int]:
    """Numbers of the sites that have keys."""
    return sorted({int(m[1]) for name in shapes if (m := re.match(r"ip_adapter\.(\d+)\.to_k_ip\.weight$", name))})
