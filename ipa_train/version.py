"""The version, from this one source."""

__version__ = "0.1.0"
