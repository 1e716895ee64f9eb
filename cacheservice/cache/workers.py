"""The workers of a service, as operators see them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cacheservice.cache.counts import Histogram

WorkerState = Literal["starting", "serving", "down"]
"""In order: it runs, and does not have all data yet; it serves clients; it has ended, and is to be started again."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker process.

    :param number: from 1; it stays when the process is started again.
    :param pid: None while it is down.
    :param connections: its clients by port.
    :param restarts: how often it was started again since the start of the service.
    :param memory_bytes: its memory in RAM, as of a second ago; 0 if it is not known.
    :param cpu_s: the CPU time of the worker since the start of the service.
    :param superseded: the superseded generations that answers of the worker keep in memory, and their bytes.
    :param stalls: how late the ticks of its reactor came, in seconds, since the start of the service.
    """

    number: int
    pid: int | None
    state: WorkerState
    connections: Mapping[str, int]
    restarts: int
    memory_bytes: int
    cpu_s: float
    superseded: tuple[int, int]
    stalls: Histogram
