"""The numbers of connected clients, in memory that all processes of the service share.

`limits.max_connections` is of the whole service. A message for each client would be late, so each worker writes its own
numbers, and reads those of the others, in one page of shared memory.
"""

from __future__ import annotations

import mmap
import os
import weakref

PORTS = ("resp", "http")
"""The ports of workers."""
MOST_WORKERS = 64
_SIZE_BYTES = MOST_WORKERS * len(PORTS) * 8


class SharedConnections:
    """One number of clients for each worker and port. Only the worker writes it, as long as it lives.

    Writing and reading a number is one access to memory, so that no process reads a part of it.

    :param descriptor: of a `SharedMemory`; it can be closed afterwards.
    """

    def __init__(self, descriptor: int) -> None:
        memory = mmap.mmap(descriptor, _SIZE_BYTES)
        self._numbers = memoryview(memory).cast("q")

    def tally(self, worker: int, port: str) -> SharedTally:
        """Return the numbers of one port, as worker `worker` (from 1) sees them."""
        return SharedTally(self._numbers, PORTS.index(port) * MOST_WORKERS, worker - 1)

    def total(self, port: str) -> int:
        """Return the clients of a port in all workers."""
        start = PORTS.index(port) * MOST_WORKERS
        return sum(self._numbers[start : start + MOST_WORKERS])

    def clear(self, worker: int) -> None:
        """Note that a worker has ended, and its connections with it."""
        for port in PORTS:
            self.tally(worker, port).note(0)


class SharedTally:
    """The clients of one port; implements `admission.Tally` for one worker."""

    def __init__(self, numbers: memoryview[int], start: int, place: int) -> None:
        self._of_port = numbers[start : start + MOST_WORKERS]
        self._place = place

    def note(self, inside: int) -> None:
        self._of_port[self._place] = inside

    def others(self) -> int:
        return sum(self._of_port) - self._of_port[self._place]


class SharedMemory:
    """New memory for `SharedConnections`, without any client.

    `descriptor` is closed when this object is not used any more.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("cacheservice-connections")
        os.ftruncate(self.descriptor, _SIZE_BYTES)
        weakref.finalize(self, os.close, self.descriptor)
