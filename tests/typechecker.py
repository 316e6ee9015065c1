"""The checker of shapes and types in tests; an int is a float, as everywhere in Python's own typing."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
