"""Adapter files in the interchange layout, both ways."""

from ipa_train.export.file import read_adapter_file, write_export
from ipa_train.export.layouts import AdapterDescription, describe, from_interchange, to_interchange
from ipa_train.export.loadability import Loadability, loadability, require_loadable

__all__ = [
    "AdapterDescription",
    "Loadability",
    "describe",
    "from_interchange",
    "loadability",
    "read_adapter_file",
    "require_loadable",
    "to_interchange",
    "write_export",
]
