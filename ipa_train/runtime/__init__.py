"""Process-level matters: seeds, precision, logging, ranks."""
