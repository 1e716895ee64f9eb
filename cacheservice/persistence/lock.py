"""Keeps a directory of saved snapshots to one process: a second one would delete the files of the first.

The lock is the kernel's and on the directory itself, so that nothing is left behind and it ends with its process,
however that ends. Several stores of one process share it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import NamedTuple

from cacheservice.errors import CacheServiceError


class _Held(NamedTuple):
    descriptor: int
    owners: set[int]


_held: dict[tuple[int, int], _Held] = {}
"""By device and inode of the directories that this process holds."""


class DirectoryTaken(CacheServiceError):
    """Another process saves in the directory: two services need two directories.

    The first one goes on. The other restores and saves nothing, and takes over when the first has ended.
    """


def take(directory: Path, owner: object) -> None:
    """Hold `directory` until `release` of the same owner.

    :raises DirectoryTaken: if another process has it.
    :raises OSError: if there is no such directory, or its file system has no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        key = (status.st_dev, status.st_ino)
        if key in _held:
            _held[key].owners.add(id(owner))
            os.close(descriptor)
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DirectoryTaken(
            f"{directory}: another process saves there, so nothing is restored or saved; set another "
            "persistence.directory for one of the two"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    _held[key] = _Held(descriptor, {id(owner)})


def release(owner: object) -> None:
    """Hold nothing any more for `owner`."""
    for key, held in list(_held.items()):
        held.owners.discard(id(owner))
        if not held.owners:
            del _held[key]
            os.close(held.descriptor)
