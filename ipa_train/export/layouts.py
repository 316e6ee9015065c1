"""Our names <-> the interchange names.

The interchange layout is that of the released files: ``image_proj.*`` for the projector, and
``ip_adapter.N.to_k_ip.weight`` / ``to_v_ip.weight`` for the sites, N being a site's place among all attentions of the
denoiser; face adapters add ``ip_adapter.N.to_{q,k,v,out}_lora.{down,up}.weight``, for self-attentions too. Files are
made straight from our own modules: dumps with shared tensors lose the adapter without a word (the "empty ip_adapter"
of IP-Adapter issues 166, 164, 246, 375, 436).
"""

import re
from collections.abc import Sequence

from torch import Tensor

from ipa_train.adapter import (
    AttentionSite,
    FacePlusProjector,
    FaceProjector,
    IPAdapter,
    LinearProjector,
    MLPProjector,
    Projector,
    Resampler,
    TimeResampler,
)
from ipa_train.adapter.adapter import branch_key
from ipa_train.errors import ExportError

# Our parameter names on the left, the interchange names on the right; {i} is a layer's number.
_RESAMPLER_NAMES = {
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
}
_PROJECTOR_NAMES: dict[type[Projector], dict[str, str]] = {
    LinearProjector: {"proj": "proj", "norm": "norm"},
    MLPProjector: {"hidden": "proj.0", "proj": "proj.2", "norm": "proj.3"},
    Resampler: _RESAMPLER_NAMES,
    TimeResampler: {
        **_RESAMPLER_NAMES,
        "layers.{i}.modulation": "layers.{i}.2.1",
        "time_embedding.linear_1": "time_embedding.linear_1",
        "time_embedding.linear_2": "time_embedding.linear_2",
    },
    FaceProjector: {"hidden": "proj.0", "proj": "proj.2", "norm": "norm"},
    FacePlusProjector: {
        "identity.hidden": "proj.0",
        "identity.proj": "proj.2",
        "identity.norm": "norm",
        **{ours: f"perceiver_resampler.{theirs}" for ours, theirs in _RESAMPLER_NAMES.items()},
    },
}


def to_interchange(adapter: IPAdapter, sites: Sequence[AttentionSite]) -> dict[str, Tensor]:
    """Flat interchange state of an adapter, projector first and sites in the order of their numbers."""
    weights = adapter.state_dict()
    return {theirs: weights[ours] for ours, theirs in interchange_names(adapter, sites).items()}


def interchange_names(adapter: IPAdapter, sites: Sequence[AttentionSite]) -> dict[str, str]:
    """Interchange name of each entry of the adapter's state.

    Raises:
        ExportError: an adapter that no layout holds, such as a baseline.
    """
    if adapter.unexportable is not None:
        raise ExportError(f"this adapter has no interchange form: {adapter.unexportable}.")
    projector = projector_names(adapter.projector)
    names = {f"projector.{ours}": f"image_proj.{theirs}" for ours, theirs in projector.items()}
    for site in sorted(sites, key=lambda s: s.index):
        for name in adapter.branch(site).state_dict():
            names[f"branches.{branch_key(site)}.{name}"] = f"ip_adapter.{site.index}.{name}"
    return names


def projector_names(projector: Projector) -> dict[str, str]:
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
