"""Reserves a directory of saved snapshots for one process.

A second process would delete the files of the first. The lock is a kernel lock on the directory itself. It leaves no
file behind, and ends with its process, however the process ends.
"""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

from cacheservice.base.errors import CacheServiceError


class DirectoryTaken(CacheServiceError):
    """Another process saves in the directory: two services need two directories.

    The first process goes on. The other restores and saves nothing, and takes over when the first has ended.
    """


class DirectoryLock:
    """The lock of one store on its directory. Threads may call it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None
        self._mutex = threading.Lock()

    def take(self) -> None:
        """Lock the directory until `release`.

        If another directory was put in its place, the next call locks that one.

        :raises DirectoryTaken: if another process holds the lock.
        :raises OSError: if the directory does not exist, or its file system has no locks.
        """
        with self._mutex:
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if self._descriptor is not None and os.path.sameopenfile(self._descriptor, descriptor):
                    os.close(descriptor)
                    return
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise DirectoryTaken(
                    f"{self._directory}: another process saves there, so nothing is restored or saved; set another "
                    "persistence.directory for one of the two"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            self._close()
            self._descriptor = descriptor

    def release(self) -> None:
        """Unlock the directory."""
        with self._mutex:
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
