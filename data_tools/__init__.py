"""Tools over shards, one file each, with ``add_arguments(parser)`` and ``run(args) -> int`` (see README.md)."""
