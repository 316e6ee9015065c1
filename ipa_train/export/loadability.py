"""Who can load an adapter of these sizes: known before a run begins, since no loader says so clearly afterwards.

The rules are the loaders' own, read in their code and tried: diffusers 0.42 (loaders/unet.py), ComfyUI_IPAdapter_plus
(IPAdapterPlus.py) and Tencent's ip_adapter.py. All three also want resamplers of depth 4 and head width 64, which ours
always have.
"""

from dataclasses import dataclass

from ipa_train.errors import ExportError
from ipa_train.export.description import AdapterDescription

_SDXL_CONTEXT_DIM = 2048
_KOLORS_RESAMPLER_DIM = 2048


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
    """The verdicts of diffusers, ComfyUI_IPAdapter_plus and Tencent's classes, in this order."""
    numbers = []
    if list(adapter.site_dims) != list(range(1, 2 * len(adapter.site_dims), 2)):
        numbers.append("it looks for sites numbered 1, 3, 5 and so on, without a gap")
    tokens = []
    if adapter.variant == "linear" and adapter.num_tokens != 4:
        tokens.append(f"it knows linear adapters of 4 tokens only, not {adapter.num_tokens}")
    return [
        Loadability("diffusers", (*tokens, *numbers)),
        Loadability("ComfyUI_IPAdapter_plus", (*tokens, *_comfy(adapter), *numbers)),
        # The number of tokens is an argument of Tencent's classes, so that any loads.
        Loadability("Tencent ip_adapter", (*_resampler(adapter), *numbers)),
    ]


def require_loadable(adapter: AdapterDescription, *, source: str) -> None:
    """Refuse an adapter that diffusers could not load.

    Raises:
        ExportError: why not.
    """
    verdict = loadability(adapter)[0]
    if not verdict.ok:
        raise ExportError(f"{source}: diffusers would not load this adapter: {'; '.join(verdict.reasons)}.")


def _comfy(adapter: AdapterDescription) -> list[str]:
    sdxl = adapter.context_dim == _SDXL_CONTEXT_DIM
    if adapter.variant == "full" and sdxl:
        return ["it knows no full adapters for SDXL"]
    reasons = []
    if adapter.variant == "plus" and adapter.num_tokens != 16:
        reasons.append(f"it knows plus adapters of 16 tokens only, not {adapter.num_tokens}")
    if sdxl and adapter.resampler_dim == _KOLORS_RESAMPLER_DIM:
        return [*reasons, f"it takes a resampler of width {_KOLORS_RESAMPLER_DIM} for Kolors, not SDXL"]
    return [*reasons, *_resampler(adapter)]


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
