"""Adapter files in the interchange layout, both ways."""

from ipa_train.export.description import AdapterDescription, describe, describe_adapter
from ipa_train.export.file import read_adapter_file, write_export
from ipa_train.export.layouts import to_interchange
from ipa_train.export.loadability import Loadability, loadability, require_loadable
from ipa_train.export.warm_start import from_interchange, init_from

__all__ = [
    "AdapterDescription",
    "Loadability",
    "describe",
    "describe_adapter",
    "from_interchange",
    "init_from",
    "loadability",
    "read_adapter_file",
    "require_loadable",
    "to_interchange",
    "write_export",
]
