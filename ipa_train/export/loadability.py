"""Who can load an adapter of these sizes: known before a run begins, since no loader says so clearly afterwards.

The rules are the loaders' own, read in their code and tried: diffusers 0.42 (loaders/unet.py), ComfyUI_IPAdapter_plus
(IPAdapterPlus.py) and Tencent's ip_adapter.py.
"""

from dataclasses import dataclass

from ipa_train.adapter import AttentionSite, IPAdapter
from ipa_train.errors import ExportError
from ipa_train.export.layouts import AdapterDescription, describe, to_interchange

_SDXL_CONTEXT_DIM = 2048
_HEAD_DIM = 64


@dataclass(frozen=True)
class Loadability:
    """One loader's verdict."""

    loader: str
    reasons: tuple[str, ...]
    """Why it will not load the file, or will load it wrongly; empty if it will."""

    @property
    def ok(self) -> bool:
        """Whether the loader takes the file."""
        return not self.reasons


def loadability(adapter: AdapterDescription) -> list[Loadability]:
    """The verdicts of diffusers, ComfyUI_IPAdapter_plus and Tencent's classes."""
    common = []
    if adapter.variant == "linear" and adapter.num_tokens != 4:
        common.append(f"it knows linear adapters of 4 tokens only, not {adapter.num_tokens}")
    if adapter.resampler_heads_dim is not None and adapter.resampler_heads_dim % _HEAD_DIM:
        common.append(f"resampler heads must be {_HEAD_DIM} wide, and {adapter.resampler_heads_dim} is no multiple")
    if any(n % 2 == 0 for n in adapter.site_numbers):
        common.append("cross-attentions must have odd numbers")
    comfy, tencent = list(common), list(common)
    if adapter.variant == "plus":
        sdxl = adapter.context_dim == _SDXL_CONTEXT_DIM
        dim, heads = (1280, 20) if sdxl else (adapter.context_dim, 12)
        if adapter.num_tokens != 16:
            comfy.append(f"it knows plus adapters of 16 tokens only, not {adapter.num_tokens}")
        if adapter.resampler_dim != dim or adapter.resampler_heads_dim != heads * _HEAD_DIM:
            reason = f"it builds a resampler of width {dim} with {heads} heads"
            comfy.append(reason)
            tencent.append(reason)
    if 1 not in adapter.site_numbers:
        comfy.append("it looks for site number 1")
    return [
        Loadability("diffusers", tuple(common)),
        Loadability("ComfyUI_IPAdapter_plus", tuple(comfy)),
        Loadability("Tencent ip_adapter", tuple(tencent)),
    ]


def require_loadable(adapter: IPAdapter, sites: list[AttentionSite]) -> None:
    """Refuse an adapter that diffusers could not load.

    Raises:
        ExportError: why not.
    """
    verdict = loadability(describe(to_interchange(adapter, sites), source="this adapter"))[0]
    if not verdict.ok:
        raise ExportError(f"diffusers would not load this adapter: {'; '.join(verdict.reasons)}.")
