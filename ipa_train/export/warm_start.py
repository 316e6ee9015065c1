"""Starting from an adapter file; and whether a file belongs to a base and an image encoder."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ipa_train.adapter import AttentionSite, FacePlusProjector, IPAdapter
from ipa_train.adapter.lora import LowRankSite
from ipa_train.conditioning import ImageEncoder
from ipa_train.errors import ExportError
from ipa_train.export.description import AdapterDescription, describe, describe_adapter
from ipa_train.export.file import face_plus_v2, read_adapter_file
from ipa_train.export.layouts import interchange_names

_log = logging.getLogger(__name__)
# Of an encoder's identity, what its features depend on. Names of folders do not count; that of what is stored does,
# being all that is known of it, and is part of "embedding".
_COMPARED = ("weights_sha256", "class", "layer", "image_size", "preprocessing", "embedding")


def init_from(adapter: IPAdapter, sites: Sequence[AttentionSite], path: Path, image_encoder: ImageEncoder) -> None:
    """Load the adapter file at ``path`` into ``adapter``.

    Raises:
        ExportError: it does not fit, or was trained with another image encoder.
    """
    state, metadata = read_adapter_file(path)
    if isinstance(adapter.projector, FacePlusProjector) and describe(state, source=str(path)).variant == "faceid_plus":
        version = face_plus_v2(path, metadata)
        if version is not None and version != adapter.projector.shortcut:
            there, here = (f"faceid_plus{'_v2' if v2 else ''}" for v2 in (version, adapter.projector.shortcut))
            raise ExportError(f"{path}: this is a {there}, but this run has a {here}: choose adapter={there}.")
    from_interchange(state, adapter, sites, source=str(path))
    check_image_encoder(metadata, image_encoder, source=str(path))
    _log.info("adapter starts from %s", path)


def from_interchange(
    state: Mapping[str, Tensor], adapter: IPAdapter, sites: Sequence[AttentionSite], *, source: str
) -> None:
    """Load an interchange state into an adapter of the same variant and sizes; strict.

    Raises:
        ExportError: names ``source``, the first thing that does not fit, and what would.
    """
    found, wanted = describe(state, source=source), describe_adapter(adapter, sites)
    for what, advice in (
        ("family", "give a file made for this base's family"),
        ("variant", "choose adapter={}"),
        ("feature_dim", "choose the image_encoder whose features have width {}"),
        ("context_dim", "choose a base whose image tokens have width {}"),
        ("num_tokens", "set adapter.projector.num_tokens={}"),
        ("resampler_dim", "set adapter.projector.dim={}"),
        ("resampler_heads", "set adapter.projector.heads={}"),
        ("hidden_dim", "choose the image_encoder whose hidden states have width {}"),
        ("lora_rank", f"choose adapter={found.variant} and set adapter.sites.lora_rank={{}}"),
    ):
        here, there = getattr(wanted, what), getattr(found, what)
        if here != there:
            raise ExportError(f"{source}: {what} is {there}, but this run has {here}: {advice.format(there)}.")
    check_sites(found, sites, source=source)
    own = interchange_names(adapter, sites)
    adapter.load_state_dict({ours: state[theirs] for ours, theirs in own.items()})


def check_sites(found: AdapterDescription, sites: Sequence[AttentionSite], *, source: str) -> None:
    """Refuse a base whose attentions are not those the adapter was made for.

    Raises:
        ExportError: names the first site that differs.
    """
    here = {site.index: site.hidden_dim for site in sites if not isinstance(site, LowRankSite)}
    for n in sorted(here.keys() | found.site_dims.keys()):
        if here.get(n) != found.site_dims.get(n):
            widths = [f"has width {d}" if d else "is missing" for d in (found.site_dims.get(n), here.get(n))]
            raise ExportError(
                f"{source}: ip_adapter.{n}.to_k_ip.weight {widths[0]}, and that attention of this base "
                f"{widths[1]}: the adapter was made for another base; choose one of its family."
            )


def image_encoder_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The account that an export's encoder gave of itself; nothing where the file does not say, or not in our way."""
    try:
        account = json.loads(metadata.get("image_encoder", "{}"))
    except ValueError:
        return {}
    return account if isinstance(account, dict) and _is_identity(account) else {}


def _is_identity(account: Mapping[str, Any]) -> bool:
    """Whether this is of the form of ``ImageEncoder.identity()``, which older files have in part."""
    embedding = account.get("embedding")
    numbers = [account.get("image_size"), account.get("layer")]
    if embedding is not None:
        if not isinstance(embedding, dict) or not {"name", "shape", "normalize"} <= embedding.keys():
            return False
        numbers += embedding["shape"] if isinstance(embedding["shape"], list) and embedding["shape"] else ["no shape"]
    return (
        isinstance(account.get("name"), str)
        and ("encoder" not in account or {"image_size", "layer", "embedding"} <= account.keys())
        and isinstance(account.get("diffusers_loader", []), list)
        and all(number is None or isinstance(number, int) for number in numbers)
    )


def check_image_encoder(metadata: Mapping[str, str], image_encoder: ImageEncoder, *, source: str) -> None:
    """Refuse an encoder that is not the one the file says it was trained with, or is read otherwise.

    Files may say nothing, and old ones say less: only what they do say is compared.

    Raises:
        ExportError: names both encoders, and what differs.
    """
    if "image_encoder" not in metadata:
        return
    try:
        trained_with = json.loads(metadata["image_encoder"])
        name, _ = str(trained_with["name"]), trained_with["weights_sha256"]
    except (ValueError, KeyError, TypeError):
        _log.warning("%s: its metadata does not say in our way which image encoder it was trained with", source)
        return
    here = image_encoder.identity()
    differ = [key for key in _COMPARED if key in trained_with and trained_with[key] != here[key]]
    if differ:
        there, ours = (", ".join(_said(encoder, key) for key in differ) for encoder in (trained_with, here))
        raise ExportError(
            f"{source}: trained with the image encoder {name!r} ({there}), not with {here['name']!r} ({ours}): "
            "features of another encoder mean nothing to it."
        )


def _said(encoder: Mapping[str, Any], key: str) -> str:
    return f"weights {str(encoder[key])[:12]}" if key == "weights_sha256" else f"{key} {encoder[key]}"
