"""Generating with an adapter, and measuring what comes out."""
