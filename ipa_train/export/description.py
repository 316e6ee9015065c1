"""What an adapter is, told by the names and shapes of its tensors alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ipa_train.adapter import AttentionSite, IPAdapter, Resampler
from ipa_train.adapter.projector import FeatureKind
from ipa_train.errors import ExportError
from ipa_train.export.layouts import projector_names, to_interchange
from ipa_train.export.recognise import (
    Family,
    branch_shapes,
    family_of,
    lora_rank_of,
    projector_of,
    site_numbers,
)


@dataclass(frozen=True)
class AdapterDescription:
    """Sizes that decide what an adapter fits and who can load it."""

    family: Family
    """Of bases: ``unet`` (SD 1.x, SD 2.x, SDXL, Kolors), ``sd3`` or ``flux``; ``instantx_flux`` are InstantX' adapters
    of all of Flux' blocks, which nothing here trains and diffusers does not load."""
    variant: str
    """``linear``, ``plus``, ``full``, ``faceid``, ``faceid_plus``, ``time_resampler`` or ``instantx``."""
    feature_dim: int
    """Width of the image features it reads."""
    hidden_dim: int | None
    """Width of the hidden states that FaceID-Plus reads beside them."""
    context_dim: int
    """Width of its image tokens; in UNets that of the text tokens beside which they stand."""
    num_tokens: int | None
    """Image tokens; None where there is one for each of the encoder's hidden states."""
    resampler_dim: int | None
    resampler_heads: int | None
    lora_rank: int
    """Of the LoRA on every attention; 0 without one."""
    site_dims: dict[int, int]
    """Width of keys and values at each site, by the site's number."""
    num_parameters: int

    @property
    def feature_kinds(self) -> tuple[FeatureKind, ...]:
        """The image features it reads."""
        if self.variant == "faceid_plus":
            return ("pooled", "penultimate")
        return ("pooled",) if self.variant in ("linear", "faceid", "instantx") else ("penultimate",)


def describe(state: Mapping[str, Tensor], *, source: str) -> AdapterDescription:
    """Recognise a flat interchange state; it must be whole, with nothing missing and nothing over.

    Raises:
        ExportError: names ``source`` and the tensor at fault, or the kind of adapter where it is one that nothing here
            can train or load.
    """
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    numbers = site_numbers(shapes)
    if not numbers or not any(name.startswith("image_proj.") for name in shapes):
        raise ExportError(
            f"{source}: no IP-Adapter: it needs tensors named image_proj.* and ip_adapter.N.to_k_ip.weight, and has "
            f"{', '.join(sorted(shapes)[:2]) or 'none at all'}."
        )
    family = family_of(shapes, numbers)
    keys = {n: shapes[f"ip_adapter.{n}.to_k_ip.weight"] for n in numbers}
    context_dim, lora_rank = (0, *keys[numbers[0]])[-1], lora_rank_of(shapes)
    projector = projector_of(family, shapes, context_dim, source)
    wanted = {
        f"image_proj.{theirs}": tuple(projector.state_dict()[ours].shape)
        for ours, theirs in projector_names(projector).items()
    }
    for n in numbers:
        wanted |= branch_shapes(family, shapes, n, context_dim=context_dim, lora_rank=lora_rank)
    for name in sorted(wanted.keys() | shapes.keys()):
        if name not in shapes:
            raise ExportError(f"{source}: {name} is missing: the file is incomplete.")
        if name not in wanted:
            raise ExportError(f"{source}: {name} has no place in a {projector.variant} adapter that loaders know.")
        if shapes[name] != wanted[name]:
            raise ExportError(
                f"{source}: {name} has shape {shapes[name]}, which does not go with the rest: a {projector.variant} "
                f"adapter with image tokens of width {context_dim}."
            )
    to_q = (wanted.get(f"image_proj.{prefix}layers.0.0.to_q.weight") for prefix in ("", "perceiver_resampler."))
    heads_dim, resampler_dim = next(filter(None, to_q), (None, None))
    return AdapterDescription(
        family=family,
        variant="instantx" if family == "instantx_flux" else projector.variant,
        feature_dim=projector.feature_dim,
        hidden_dim=getattr(projector, "hidden_dim", None),
        context_dim=context_dim,
        num_tokens=getattr(projector, "num_tokens", None),
        resampler_dim=resampler_dim,
        resampler_heads=None if heads_dim is None else heads_dim // Resampler.dim_head,
        lora_rank=lora_rank,
        site_dims={n: shape[0] for n, shape in keys.items()},
        num_parameters=sum(weight.numel() for weight in state.values()),
    )


def describe_adapter(adapter: IPAdapter, sites: Sequence[AttentionSite]) -> AdapterDescription:
    """Describe an adapter of this run, as its export will be."""
    return describe(to_interchange(adapter, sites), source="this run")
