"""Who can load an adapter of these sizes: known before a run begins, since no loader says so clearly afterwards.

The rules are the loaders' own, read in their code and tried: diffusers 0.42 (loaders/unet.py, transformer_sd3.py,
transformer_flux.py), ComfyUI_IPAdapter_plus (IPAdapterPlus.py), Tencent's ip_adapter.py and XLabs' x-flux. All also
want resamplers of depth 4 and head width 64, which ours always have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ipa_train.errors import ExportError
from ipa_train.export.description import AdapterDescription

_FACE_NOTES = {
    "faceid": "face embeddings as ip_adapter_image_embeds",
    "faceid_plus": "face embeddings as ip_adapter_image_embeds, with clip_embeds and shortcut set by hand",
}
_SDXL_CONTEXT_DIM = 2048
_KOLORS_RESAMPLER_DIM = 2048
_FACE_DIM = 512
_FLUX_ROWS_OF_16_TOKENS = 65_536
_FAMILY_NAMES = {"unet": "UNets", "sd3": "SD 3", "flux": "Flux", "instantx_flux": "Flux"}


@dataclass(frozen=True)
class Loadability:
    """One loader's verdict."""

    loader: str
    reasons: tuple[str, ...]
    """Why it will not load the file, or will load it wrongly; empty if it will."""
    note: str = ""
    """What a user of this loader has to know, where it does load."""

    @property
    def ok(self) -> bool:
        """Whether the loader takes the file."""
        return not self.reasons

    def __str__(self) -> str:
        return "; ".join(self.reasons) if self.reasons else f"loads{', ' if self.note else ''}{self.note}"


def loadability(adapter: AdapterDescription, image_encoder: Mapping[str, Any] | None = None) -> list[Loadability]:
    """The verdict of each loader; ``image_encoder`` is its account of itself in an export's metadata, where known."""
    foreign = _foreign_encoder(adapter, image_encoder or {})
    computed = "by ip_adapter_image_embeds" if foreign else ""
    own_features = [f"it encodes pictures with CLIP, and this adapter reads {foreign}"] if foreign else []
    if adapter.family != "unet":
        unets = (f"it knows adapters of UNets only, not of {_FAMILY_NAMES[adapter.family]}",)
        others = [Loadability(loader, unets) for loader in ("ComfyUI_IPAdapter_plus", "Tencent ip_adapter")]
        if adapter.family == "sd3":
            return [Loadability("diffusers", tuple(_numbers(adapter, step=1)), computed), *others]
        if adapter.family == "instantx_flux":
            other = ("it knows Flux adapters with one linear projection and biases, not InstantX' kind",)
            return [Loadability("diffusers", other), *others, Loadability("XLabs x-flux", other)]
        note = "in its own names, which ipa export --layout xlabs writes"
        xlabs = Loadability("XLabs x-flux", tuple(own_features), note)
        return [Loadability("diffusers", tuple(_diffusers_flux(adapter)), computed), *others, xlabs]
    numbers, tokens = _numbers(adapter, step=2), _tokens(adapter)
    face_note = _FACE_NOTES.get(adapter.variant, "")
    return [
        Loadability("diffusers", (*tokens, *numbers), face_note or computed),
        Loadability("ComfyUI_IPAdapter_plus", (*tokens, *_comfy(adapter), *own_features, *numbers)),
        # The number of tokens is an argument of Tencent's classes, so that any loads.
        Loadability("Tencent ip_adapter", (*_tencent(adapter), *own_features, *numbers)),
    ]


def require_loadable(adapter: AdapterDescription, *, source: str) -> None:
    """Refuse an adapter that diffusers could not load.

    Raises:
        ExportError: why not.
    """
    verdict = loadability(adapter)[0]
    if not verdict.ok:
        raise ExportError(f"{source}: diffusers would not load this adapter: {'; '.join(verdict.reasons)}.")


def _foreign_encoder(adapter: AdapterDescription, image_encoder: Mapping[str, Any]) -> str:
    """Name of an encoder that diffusers' loader cannot hold for this family; nothing if it can, or is unknown."""
    if adapter.variant.startswith("faceid") or adapter.family in image_encoder.get(
        "diffusers_loader", [adapter.family]
    ):
        return ""
    return str(image_encoder.get("name", "another encoder"))


def _numbers(adapter: AdapterDescription, *, step: int) -> list[str]:
    count = len(adapter.site_dims)
    if list(adapter.site_dims) == list(range(step - 1, step * count, step)):
        return []
    return [f"it looks for sites numbered {'1, 3, 5' if step == 2 else '0, 1, 2'} and so on, without a gap"]


def _tokens(adapter: AdapterDescription) -> list[str]:
    if adapter.variant in ("linear", "faceid_plus") and adapter.num_tokens != 4:
        return [f"it knows {adapter.variant} adapters of 4 tokens only, not {adapter.num_tokens}"]
    return []


def _diffusers_flux(adapter: AdapterDescription) -> list[str]:
    reasons = _numbers(adapter, step=1)
    sixteen = (adapter.num_tokens or 0) * adapter.context_dim == _FLUX_ROWS_OF_16_TOKENS
    if adapter.num_tokens != (16 if sixteen else 4):
        reasons.append(f"it knows Flux adapters of 4 tokens, or 16 of width 4096, not {adapter.num_tokens}")
    return reasons


def _comfy(adapter: AdapterDescription) -> list[str]:
    sdxl = adapter.context_dim == _SDXL_CONTEXT_DIM
    if adapter.variant.startswith("faceid"):
        return _comfy_face(adapter)
    if adapter.variant == "full" and sdxl:
        return ["it knows no full adapters for SDXL"]
    reasons = []
    if adapter.variant == "plus" and adapter.num_tokens != 16:
        reasons.append(f"it knows plus adapters of 16 tokens only, not {adapter.num_tokens}")
    if sdxl and adapter.resampler_dim == _KOLORS_RESAMPLER_DIM:
        return [*reasons, f"it takes a resampler of width {_KOLORS_RESAMPLER_DIM} for Kolors, not SDXL"]
    return [*reasons, *_resampler(adapter)]


def _comfy_face(adapter: AdapterDescription) -> list[str]:
    reasons = _face_width(adapter)
    expected = 4 if adapter.lora_rank else 16
    if adapter.variant == "faceid" and adapter.num_tokens != expected:
        having = "with" if adapter.lora_rank else "without"
        reasons.append(f"it takes face adapters {having} LoRA to have {expected} tokens, not {adapter.num_tokens}")
    if adapter.lora_rank:
        reasons.append("it leaves out the LoRA, which it wants as a file of its own")
    return reasons


def _tencent(adapter: AdapterDescription) -> list[str]:
    return _face_width(adapter) if adapter.variant.startswith("faceid") else _resampler(adapter)


def _face_width(adapter: AdapterDescription) -> list[str]:
    if adapter.feature_dim == _FACE_DIM:
        return []
    return [f"it knows face embeddings of width {_FACE_DIM} only, not {adapter.feature_dim}"]


def _resampler(adapter: AdapterDescription) -> list[str]:
    if adapter.variant != "plus":
        return []
    dim, heads = (1280, 20) if adapter.context_dim == _SDXL_CONTEXT_DIM else (adapter.context_dim, 12)
    if (adapter.resampler_dim, adapter.resampler_heads) == (dim, heads):
        return []
    return [
        f"it builds a resampler of width {dim} with {heads} heads, and this one has width {adapter.resampler_dim} with "
        f"{adapter.resampler_heads}"
    ]
