"""A lock: only one process at a time trains in a folder."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from drpo.errors import InputError
from drpo.files import opened_here

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder.

    Raises:
        InputError: another process is training there.
    """
    path = folder / LOCK
    busy = InputError(f"{folder}: another process is training there; wait for it, or give --out")
    with open(path, "ab", opener=opened_here) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise busy from None
            # a file system without locks
        if not os.fstat(file.fileno()).st_nlink:  # its holder has removed it since it was opened: others take a new one
            raise busy
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that became read-only: what ended the run is to be said, not that
                path.unlink()
