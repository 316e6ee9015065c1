"""Files and folders that are either there whole or not at all, whenever the machine dies."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what was written there becomes ``path`` if the block succeeds.

    Written beside the target because a rename is only atomic within one file system. The mode follows the umask
    (``safetensors`` would leave 0600).
    """
    # The token tells apart processes of one number on two nodes that share the folder.
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        follow_umask(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def follow_umask(path: Path) -> None:
    """Give a file the mode that an ordinary ``open`` would have given it."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
