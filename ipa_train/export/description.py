"""What an adapter is, told by the names and shapes of its tensors alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipa_train.adapter import AttentionSite, IPAdapter, LinearProjector, MLPProjector, Projector, Resampler
from ipa_train.errors import ConfigError, ExportError
from ipa_train.export.layouts import projector_names, to_interchange

_FACE = "face embeddings from a recognition model"
# Layouts that exist and that this version does not read: a name that gives each away, most telling first.
_FOREIGN = (
    (r"image_proj\.perceiver_resampler\..*", f"a FaceID-Plus adapter, which needs {_FACE} and LoRA weights"),
    (r"ip_adapter\.\d+\.to_q_lora\..*", f"a FaceID adapter, which needs {_FACE} and LoRA weights"),
    (r"image_proj\.time_embedding\..*", "an SD 3 adapter, which needs a projector that knows the timestep"),
    (r"ip_adapter_proj_model\..*", "a Flux adapter in XLabs' layout, which needs a Flux base"),
    (r"ip_adapter\.0\.to_k_ip\.weight", "an adapter of a transformer such as Flux, which needs such a base"),
    (r"image_proj\.norm\.weight", f"a FaceID adapter, which needs {_FACE}"),
)


@dataclass(frozen=True)
class AdapterDescription:
    """Sizes that decide what an adapter fits and who can load it."""

    variant: str
    """``linear``, ``plus`` or ``full``."""
    feature_dim: int
    """Width of the image features it reads."""
    context_dim: int
    """Width of the text tokens beside which its image tokens stand."""
    num_tokens: int | None
    """Image tokens; None where there is one for each of the encoder's hidden states."""
    resampler_dim: int | None
    resampler_heads: int | None
    site_dims: dict[int, int]
    """Width of keys and values at each site, by the site's number."""
    num_parameters: int


def describe(state: Mapping[str, Tensor], *, source: str) -> AdapterDescription:
    """Recognise a flat interchange state; it must be whole, with nothing missing and nothing over.

    Raises:
        ExportError: names ``source`` and the tensor at fault, or the kind of adapter where it is one that this version
            does not read.
    """
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    _refuse_foreign(shapes, source)
    numbers = sorted({int(m[1]) for name in shapes if (m := re.match(r"ip_adapter\.(\d+)\.to_k_ip\.weight$", name))})
    if not numbers or not any(name.startswith("image_proj.") for name in shapes):
        raise ExportError(
            f"{source}: no IP-Adapter: it needs tensors named image_proj.* and ip_adapter.N.to_k_ip.weight, and has "
            f"{', '.join(sorted(shapes)[:2]) or 'none at all'}."
        )
    keys = {n: shapes[f"ip_adapter.{n}.to_k_ip.weight"] for n in numbers}
    context_dim = keys[numbers[0]][-1] if keys[numbers[0]] else 0
    projector = _projector_of(shapes, context_dim, source)
    expected = {f"image_proj.{theirs}": ours for ours, theirs in projector_names(projector).items()}
    wanted = {name: tuple(projector.state_dict()[ours].shape) for name, ours in expected.items()}
    for n in numbers:
        wanted |= dict.fromkeys((f"ip_adapter.{n}.to_k_ip.weight", f"ip_adapter.{n}.to_v_ip.weight"), keys[n])
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            raise ExportError(f"{source}: {name} is missing: the file is incomplete.")
        if name not in wanted:
            raise ExportError(f"{source}: {name} has no place in a {projector.variant} adapter that loaders know.")
        if shapes[name] != wanted[name] or (name.startswith("ip_adapter.") and shapes[name][1:] != (context_dim,)):
            raise ExportError(
                f"{source}: {name} has shape {shapes[name]}, which does not go with the rest: a {projector.variant} "
                f"adapter for text of width {context_dim}."
            )
    heads_dim, resampler_dim = wanted.get("image_proj.layers.0.0.to_q.weight", (None, None))
    return AdapterDescription(
        variant=projector.variant,
        feature_dim=projector.feature_dim,
        context_dim=context_dim,
        num_tokens=getattr(projector, "num_tokens", None),
        resampler_dim=resampler_dim,
        resampler_heads=None if heads_dim is None else heads_dim // Resampler.dim_head,
        site_dims={n: shape[0] for n, shape in keys.items()},
        num_parameters=sum(weight.numel() for weight in state.values()),
    )


def describe_adapter(adapter: IPAdapter, sites: Sequence[AttentionSite]) -> AdapterDescription:
    """Describe an adapter of this run, as its export will be."""
    return describe(to_interchange(adapter, sites), source="this run")


def _refuse_foreign(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    for pattern, kind in _FOREIGN:
        # Linear adapters have a norm of that name too; what tells them from FaceID is one layer before it, not two.
        if pattern.endswith(r"norm\.weight") and "image_proj.proj.weight" in shapes:
            continue
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise ExportError(f"{source}: this is {kind}; this version reads linear, plus and full adapters of UNets.")


def _projector_of(shapes: Mapping[str, tuple[int, ...]], context_dim: int, source: str) -> Projector:
    """A projector of the variant and sizes that the most telling tensors have; it takes no memory."""
    part = {name.removeprefix("image_proj."): shape for name, shape in shapes.items()}
    try:
        with torch.device("meta"):
            if "proj.weight" in part:
                rows, feature_dim = part["proj.weight"]
                tokens = max(1, rows // max(1, context_dim))
                return LinearProjector(feature_dim=feature_dim, context_dim=context_dim, num_tokens=tokens)
            if "proj.0.weight" in part and "proj.3.weight" in part:
                return MLPProjector(feature_dim=part["proj.0.weight"][-1], context_dim=context_dim)
            if {"latents", "proj_in.weight", "layers.0.0.to_q.weight"} <= part.keys():
                _, tokens, dim = part["latents"]
                return Resampler(
                    feature_dim=part["proj_in.weight"][-1],
                    context_dim=context_dim,
                    num_tokens=tokens,
                    dim=dim,
                    heads=max(1, part["layers.0.0.to_q.weight"][0] // Resampler.dim_head),
                )
    except (ConfigError, IndexError, ValueError) as error:
        raise ExportError(f"{source}: its tensors have shapes that no adapter has: {error}") from error
    raise ExportError(f"{source}: its projector is of an unknown kind, or incomplete: {', '.join(sorted(part)[:3])}.")
