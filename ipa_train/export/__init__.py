"""Adapter files in the interchange layout, both ways."""
