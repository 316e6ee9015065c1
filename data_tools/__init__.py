"""Tools over shards: one file per tool."""
