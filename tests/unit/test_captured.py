"""Laws of the changes that one stream has shown: each becomes a part of a read, and large sets take no long turn."""

from __future__ import annotations

from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.logical.captured import Captured
from cacheservice.sources.postgres.logical.kept import Bounds, Committed, Transactions, Trash, full_xid
from cacheservice.sources.postgres.logical.pgoutput import Begin, Changed, Commit
from cacheservice.sources.postgres.logical.tables import Sent

TABLE = 1
SENT = (Sent(frozenset({TABLE}), frozenset(), ("id",), frozenset()),)
KEY = frozenset({("1",)})


def seen(snapshot: str, *, in_recovery: bool = False) -> Visibility:
    return Visibility.of(snapshot, in_recovery=in_recovery)


def test_a_commit_that_no_session_sees_yet() -> None:
    """It is in the log before it is visible: a read that begins then misses it, and another one must follow."""
    captured = Captured(10)
    assert not captured.learn("products", SENT, seen("10:10:"))
    assert captured.committed(Committed(10, {TABLE: KEY})) == {"products"}
    assert captured.learn("products", SENT, seen("10:10:"))
    assert captured.learn("products", SENT, seen("10:11:10"))
    assert not captured.learn("products", SENT, seen("11:11:"))


def test_a_commit_before_the_first_read() -> None:
    """The first read that uses the stream may miss a transaction that was shown before the dataset was known."""
    captured = Captured(10)
    assert captured.committed(Committed(10, {TABLE: None})) == set()
    assert captured.learn("products", SENT, seen("10:10:"))
    assert not captured.learn("products", SENT, seen("11:11:"))


def test_a_standby() -> None:
    """It decodes a transaction after it has become visible, and its snapshots do not list those in progress."""
    captured = Captured(10)
    captured.learn("products", SENT, seen("10:10:", in_recovery=True))
    captured.committed(Committed(11, {TABLE: KEY}))
    assert not captured.learn("products", SENT, seen("10:12:", in_recovery=True))


def test_unread_transactions_have_a_bound() -> None:
    """A dataset that cannot be read for hours does not fill the memory."""
    captured = Captured(10)
    captured.learn("products", SENT, seen("10:10:"))
    for xid in range(10, 25_000):
        captured.committed(Committed(xid, {TABLE: None}))
    assert len(captured._unread["products"]) <= 10_000
    assert captured.learn("products", SENT, seen("24999:24999:"))
    assert not captured.learn("products", SENT, seen("25000:25000:"))


def test_a_large_transaction() -> None:
    """Its keys are in small sets, each quick to free, and all of them are found."""
    filled: list[int] = []
    trash = Trash(lambda: filled.append(1))
    captured = Captured(10, Bounds(20_000, 1 << 24), trash)
    captured.learn("products", SENT, seen("10:10:"))
    for message in (Begin(10), *(Changed(TABLE, ((str(number),),)) for number in range(10_000)), Commit(1)):
        if (committed := captured.open.take(message)) is not None:
            captured.committed(committed)
            assert max(len(part.keys) for part in committed.more) <= 4096
    assert captured.changed(SENT, seen("10:10:")) == {(str(number),) for number in range(10_000)}
    some = captured.changed(SENT, seen("10:10:"), 100)
    assert some is not None
    assert 100 < len(some) < 10_000
    assert (captured.keys, captured.kept.count, filled) == (10_000, 10_000, [])
    captured.kept.lose(TABLE)
    assert (captured.kept.count, filled) == (0, [1])
    assert trash.free()
    while trash.free():
        pass
    assert captured.changed(SENT, seen("10:10:")) is None


def test_a_transaction_beyond_the_bounds() -> None:
    """Its keys are given up, the parts as well as the last ones."""
    found = Transactions(Bounds(10_000, 1 << 24), lambda xid: full_xid(xid, 10))
    messages = [Begin(10), *(Changed(TABLE, ((str(number),),)) for number in range(10_001)), Commit(1)]
    (committed,) = [each for message in messages if (each := found.take(message)) is not None]
    assert committed == Committed(10, {TABLE: None})
