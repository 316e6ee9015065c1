"""Starting from a released adapter."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ipa_train.adapter import AttentionSite, IPAdapter
from ipa_train.conditioning import CLIPImageEncoder
from ipa_train.errors import ExportError
from ipa_train.export.file import read_adapter_file
from ipa_train.export.layouts import from_interchange

_log = logging.getLogger(__name__)


def init_from(adapter: IPAdapter, sites: Sequence[AttentionSite], path: Path, image_encoder: CLIPImageEncoder) -> None:
    """Load the adapter file at ``path`` into ``adapter``.

    Raises:
        ExportError: it does not fit, or was trained with another image encoder.
    """
    state, metadata = read_adapter_file(path)
    check_image_encoder(metadata, image_encoder, source=str(path))
    from_interchange(state, adapter, sites, source=str(path))
    _log.info("adapter starts from %s", path)


def check_image_encoder(metadata: dict[str, str], image_encoder: CLIPImageEncoder, *, source: str) -> None:
    """Refuse an encoder whose weights are not those the file says it was trained with; files may say nothing."""
    if "image_encoder" not in metadata:
        return
    trained_with, here = json.loads(metadata["image_encoder"]), image_encoder.identity()
    if trained_with["weights_sha256"] != here["weights_sha256"]:
        raise ExportError(
            f"{source}: trained with the image encoder {trained_with['name']!r} "
            f"(weights {trained_with['weights_sha256'][:12]}), not with {here['name']!r} "
            f"({here['weights_sha256'][:12]}): features of another encoder mean nothing to it."
        )
