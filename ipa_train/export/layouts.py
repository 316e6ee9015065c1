"""Our names <-> the interchange names, both ways and bit for bit.

The interchange layout is that of the released files: ``image_proj.*`` for the projector, and
``ip_adapter.N.to_k_ip.weight`` / ``to_v_ip.weight`` for the sites, N being a site's place among all attentions of the
denoiser. Files are made straight from our own modules: dumps with shared tensors lose the adapter without a word (the
"empty ip_adapter" of IP-Adapter issues 166, 164, 246, 375, 436).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ipa_train.adapter import AttentionSite, IPAdapter, LinearProjector, MLPProjector, Projector, Resampler
from ipa_train.adapter.adapter import branch_key
from ipa_train.errors import ExportError

# Our parameter names on the left, the interchange names on the right; {i} is a layer's number.
_PROJECTOR_NAMES: dict[type[Projector], dict[str, str]] = {
    LinearProjector: {"proj": "proj", "norm": "norm"},
    MLPProjector: {"hidden": "proj.0", "proj": "proj.2", "norm": "proj.3"},
    Resampler: {
        "latents": "latents",
        "proj_in": "proj_in",
        "proj_out": "proj_out",
        "norm_out": "norm_out",
        "layers.{i}.norm_features": "layers.{i}.0.norm1",
        "layers.{i}.norm_latents": "layers.{i}.0.norm2",
        "layers.{i}.to_q": "layers.{i}.0.to_q",
        "layers.{i}.to_kv": "layers.{i}.0.to_kv",
        "layers.{i}.to_out": "layers.{i}.0.to_out",
        "layers.{i}.norm_ff": "layers.{i}.1.0",
        "layers.{i}.ff_in": "layers.{i}.1.1",
        "layers.{i}.ff_out": "layers.{i}.1.3",
    },
}
# Layouts that exist and that this version does not train, by a key that gives them away, most telling first.
_FOREIGN = (
    ("image_proj.perceiver_resampler.proj_in.weight", "a FaceID-Plus adapter"),
    ("image_proj.time_embedding.linear_1.weight", "an SD 3 adapter"),
    ("ip_adapter_proj_model.proj.weight", "a Flux adapter in XLabs' layout"),
    ("ip_adapter.0.to_q_lora.down.weight", "a FaceID adapter (it has LoRA weights)"),
    ("image_proj.proj.0.bias", "a FaceID adapter"),
)


def to_interchange(adapter: IPAdapter, sites: Sequence[AttentionSite]) -> dict[str, Tensor]:
    """Flat interchange state of an adapter, projector first and sites in the order of their numbers."""
    weights = adapter.state_dict()
    return {theirs: weights[ours] for ours, theirs in interchange_names(adapter, sites).items()}


def interchange_names(adapter: IPAdapter, sites: Sequence[AttentionSite]) -> dict[str, str]:
    """Interchange name of each entry of the adapter's state."""
    projector = _projector_names(adapter.projector)
    names = {f"projector.{ours}": f"image_proj.{theirs}" for ours, theirs in projector.items()}
    for site in sorted(sites, key=lambda s: s.index):
        for part in ("to_k_ip", "to_v_ip"):
            names[f"branches.{branch_key(site)}.{part}.weight"] = f"ip_adapter.{site.index}.{part}.weight"
    return names


def from_interchange(
    state: Mapping[str, Tensor], adapter: IPAdapter, sites: Sequence[AttentionSite], *, source: str
) -> None:
    """Load an interchange state into an adapter of the same variant and sizes; strict.

    Raises:
        ExportError: names ``source``, the first thing that does not fit, and what would.
    """
    found = describe(state, source=source)
    wanted = describe(to_interchange(adapter, sites), source="this run")
    for what, advice in (
        ("variant", "choose adapter={}"),
        ("feature_dim", "choose the image_encoder whose features have width {}"),
        ("context_dim", "choose a base whose text has width {}"),
        ("num_tokens", "set adapter.projector.num_tokens={}"),
    ):
        here, there = getattr(wanted, what), getattr(found, what)
        if here != there:
            raise ExportError(f"{source}: {what} is {there}, but this run has {here}: {advice.format(there)}.")
    own = {theirs: ours for ours, theirs in interchange_names(adapter, sites).items()}
    shapes = adapter.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise ExportError(f"{source}: {name} is missing, which this base's sites need: made for another base?")
        if name not in own:
            raise ExportError(f"{source}: {name} has no place in this adapter: made for another base?")
        if state[name].shape != shapes[own[name]].shape:
            there, here = tuple(state[name].shape), tuple(shapes[own[name]].shape)
            raise ExportError(
                f"{source}: {name} has shape {there}, but this adapter's is {here}: made for another base?"
            )
    adapter.load_state_dict({own[name]: weight for name, weight in state.items()})


@dataclass(frozen=True)
class AdapterDescription:
    """What a file's keys and shapes say of it."""

    variant: str
    feature_dim: int
    """Width of the image features it reads."""
    context_dim: int
    num_tokens: int | None
    """Image tokens; None where there is one for each of the encoder's hidden states."""
    resampler_dim: int | None
    resampler_heads_dim: int | None
    """Heads times head width of the resampler."""
    num_sites: int
    site_numbers: tuple[int, ...]
    num_parameters: int


def describe(state: Mapping[str, Tensor], *, source: str) -> AdapterDescription:
    """Recognise an interchange state.

    Raises:
        ExportError: no adapter, or one of a kind that this version does not read, by name.
    """
    sites = sorted({int(m[1]) for name in state if (m := re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", name))})
    for key, kind in _FOREIGN:
        if key in state and not (key.endswith("proj.0.bias") and "image_proj.proj.3.weight" in state):
            raise ExportError(f"{source}: this is {kind}; this version reads linear, plus and full adapters of UNets.")
    if not sites or not any(name.startswith("image_proj.") for name in state):
        raise ExportError(
            f"{source}: no IP-Adapter: it needs tensors named image_proj.* and ip_adapter.N.to_k_ip.weight, "
            f"and has {len(state)} others."
        )
    context_dim = state[f"ip_adapter.{sites[0]}.to_k_ip.weight"].shape[1]
    tokens: int | None
    dim = heads_dim = None
    if "image_proj.proj.weight" in state:
        variant, feature_dim = LinearProjector.variant, state["image_proj.proj.weight"].shape[1]
        tokens = state["image_proj.proj.weight"].shape[0] // context_dim
    elif "image_proj.proj.3.weight" in state:
        variant, feature_dim, tokens = MLPProjector.variant, state["image_proj.proj.0.weight"].shape[1], None
    elif "image_proj.latents" in state and "image_proj.proj_in.weight" in state:
        variant, feature_dim = Resampler.variant, state["image_proj.proj_in.weight"].shape[1]
        tokens, dim = state["image_proj.latents"].shape[1:]
        heads_dim = state["image_proj.layers.0.0.to_q.weight"].shape[0]
    else:
        raise ExportError(f"{source}: an adapter with a projector of an unknown kind.")
    return AdapterDescription(
        variant=variant,
        feature_dim=feature_dim,
        context_dim=context_dim,
        num_tokens=tokens,
        resampler_dim=dim,
        resampler_heads_dim=heads_dim,
        num_sites=len(sites),
        site_numbers=tuple(sites),
        num_parameters=sum(weight.numel() for weight in state.values()),
    )


def _projector_names(projector: Projector) -> dict[str, str]:
    """Interchange name of each of a projector's parameters."""
    table = _PROJECTOR_NAMES[type(projector)]
    names = {}
    for name in projector.state_dict():
        layer = re.match(r"layers\.(\d+)\.", name)
        pattern = name if layer is None else name.replace(layer[0], "layers.{i}.", 1)
        module, suffix = (pattern, "") if pattern in table else pattern.rsplit(".", 1)
        new = table[module] + (f".{suffix}" if suffix else "")
        names[name] = new if layer is None else new.replace("{i}", layer[1])
    return names
