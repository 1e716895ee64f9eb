"""Laws of errors that are let go: what they kept in memory is free, and nobody who handled another one is ended."""

from __future__ import annotations

import weakref

from twisted.internet.defer import Deferred

from cacheservice.base.errors import let_go


class Snapshot:
    """Something large."""


def test_what_a_cause_kept() -> None:
    """The frames of an error and of its causes keep nothing."""
    kept: list[weakref.ref[Snapshot]] = []

    def fail() -> None:
        snapshot = Snapshot()
        kept.append(weakref.ref(snapshot))
        raise ValueError("the first")

    def translate() -> None:
        try:
            fail()
        except ValueError as error:
            raise RuntimeError("the second") from error

    try:
        translate()
    except RuntimeError as error:
        let_go(error)
        assert kept[0]() is None


def test_somebody_who_handled_another_error() -> None:
    """A coroutine that waits after it handled an error continues, although that was the context of another error."""
    continues: Deferred[str] = Deferred()
    failed: list[BaseException] = []

    async def handle() -> str:
        try:
            raise ValueError("handled")
        except ValueError:
            fail()
        return await continues

    def fail() -> None:
        try:
            raise RuntimeError("raised meanwhile")
        except RuntimeError as error:
            failed.append(error)

    running = Deferred.fromCoroutine(handle())
    (error,) = failed
    assert isinstance(error.__context__, ValueError)
    let_go(error)
    continues.callback("it continues")
    assert running.result == "it continues"
