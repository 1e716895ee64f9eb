"""The link between the main process and a worker, as its users see it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Protocol, TypeAlias

from twisted.internet.defer import Deferred

Plain: TypeAlias = "bool | int | float | str | bytes | Sequence[Plain] | Mapping[str, Plain] | None"
"""A value that a link carries."""
Handler = Callable[..., "Plain | Deferred[Plain] | Coroutine[Deferred[object], object, Plain]"]
"""Takes the fields of a message by keyword. Only calls use the result."""

ANSWER_S = 5.0
"""The time that a process has to answer the other one."""


class Link(Protocol):
    """One end of a connection between two processes; messages arrive in the order in which they were sent."""

    def send(self, name: str, **fields: Plain) -> None:
        """Send an event. It is dropped if the link is lost."""

    def call(self, name: str, timeout_s: float = ANSWER_S, **fields: Plain) -> Deferred[Plain]:
        """Return the answer of the other process.

        The Deferred fails if the link is lost, if the other process answers with an error, and after `timeout_s`.
        """

    def handle(self, name: str, handler: Handler) -> None:
        """Have `handler` take the events and answer the calls of this name."""
