"""Streaming from WebDataset shards: exact order, exact resume."""
