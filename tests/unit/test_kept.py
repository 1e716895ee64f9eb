"""Laws of the changed keys that are kept: none is missing that a delta needs, and the memory has a bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.logical.kept import Bounds, Committed, Kept, Transactions, full_xid, size_bytes
from cacheservice.sources.postgres.logical.pgoutput import Begin, Changed, Commit, Decoded, Key, Truncated

MANY = Bounds(1000, 1 << 20)
A, B = 1, 2

keys = st.tuples(st.sampled_from(["1", "2", "3", None]))
changes = st.dictionaries(st.sampled_from([A, B]), st.none() | st.frozensets(keys, min_size=1, max_size=3), min_size=1)
histories = st.lists(changes, max_size=12)


@st.composite
def snapshots(draw: st.DrawFn, last: int) -> tuple[str, set[int]]:
    """A snapshot as the server writes it, and the transactions up to `last` that it does not see."""
    xmax = draw(st.integers(1, last + 2))
    running = draw(st.sets(st.integers(1, max(1, xmax - 1)), max_size=4)) if xmax > 1 else set()
    xmin = min(running, default=xmax)
    unseen = {xid for xid in range(1, last + 1) if xid >= xmax or xid in running}
    return f"{xmin}:{xmax}:{','.join(map(str, sorted(running)))}", unseen


def seen(snapshot: str, *, in_recovery: bool = False) -> Visibility:
    return Visibility.of(snapshot, in_recovery=in_recovery)


def model(history: list[tuple[int, dict[int, frozenset[Key] | None]]], oid: int, unseen: set[int]) -> object:
    found: set[Key] = set()
    for xid, changed in history:
        if xid in unseen and oid in changed:
            more = changed[oid]
            if more is None:
                return None
            found |= more
    return frozenset(found)


@given(histories, st.data())
def test_what_a_delta_needs(history: list[dict[int, frozenset[Key] | None]], data: st.DataObject) -> None:
    """The keys of the transactions that a snapshot does not see, also after others have been forgotten."""
    numbered = list(enumerate(history, 1))
    order = data.draw(st.permutations(numbered))
    kept = Kept(MANY)
    for xid, changed in order:
        kept.add(Committed(xid, changed))
    pairs = [data.draw(snapshots(len(history))) for _ in range(2)]
    for _ in range(2):
        for snapshot, unseen in pairs:
            for oid in (A, B):
                assert kept.changed(oid, seen(snapshot)) == model(order, oid, unseen)
        kept.forget([seen(snapshot) for snapshot, _ in pairs])
    needed = {xid for _, unseen in pairs for xid in unseen}
    assert kept.count == sum(len(more or ()) for xid, changed in numbered if xid in needed for more in changed.values())
    kept.forget([])
    assert (kept.count, kept.size_bytes) == (0, 0)


def test_a_standby() -> None:
    """A snapshot of a standby lists no running transactions, so that all from its xmin on are taken for unseen."""
    kept = Kept(MANY)
    for xid in (4, 5, 6):
        kept.add(Committed(xid, {A: frozenset({(str(xid),)})}))
    assert kept.changed(A, seen("5:7:", in_recovery=True)) == {("5",), ("6",)}
    assert kept.changed(A, seen("5:7:")) == frozenset()
    kept.forget([seen("5:7:", in_recovery=True)])
    assert kept.count == 2


def test_bounds() -> None:
    """Beyond the bounds the keys of the largest table are forgotten, and a delta that needs them is not possible."""
    kept = Kept(Bounds(10, 1 << 20))
    kept.add(Committed(1, {B: frozenset({("b",)})}))
    for xid in range(2, 12):
        kept.add(Committed(xid, {A: frozenset({(str(xid),)})}))
    assert kept.count == 1
    assert kept.changed(A, seen("1:1:")) is None
    assert kept.changed(A, seen("12:12:")) == frozenset()
    assert kept.changed(B, seen("1:1:")) == {("b",)}
    kept.add(Committed(12, {A: frozenset({("new",)})}))
    assert kept.changed(A, seen("12:12:")) == {("new",)}
    large = Kept(Bounds(10, 3000))
    large.add(Committed(1, {A: frozenset({("x" * 4000,)})}))
    assert (large.count, large.changed(A, seen("1:1:"))) == (0, None)


def test_lost_transactions() -> None:
    """Few of them are known exactly; of many, only the last, so that the memory has a bound."""
    kept = Kept(MANY)
    for xid in range(10, 20):
        kept.add(Committed(xid, {A: None}))
    assert kept.changed(A, seen("5:30:5")) == frozenset()
    assert kept.changed(A, seen("5:30:5,19")) is None
    kept.forget([seen("5:19:5")])
    assert kept.changed(A, seen("5:19:5")) is None
    kept.forget([seen("5:20:5")])
    assert kept.changed(A, seen("5:19:5")) == frozenset()
    for xid in range(20, 2000):
        kept.add(Committed(xid, {A: None}))
    assert kept.changed(A, seen("5:3000:5")) is None
    assert kept.changed(A, seen("3000:3000:")) == frozenset()


def taken(messages: list[Decoded], bounds: Bounds = MANY) -> list[Committed]:
    transactions = Transactions(bounds, lambda xid: full_xid(xid, (1 << 32) + 5))
    return [found for message in messages if (found := transactions.take(message)) is not None]


def test_transactions() -> None:
    """A transaction has the keys of all of its changes; one without changes of watched tables is not kept."""
    one, two = ("1",), ("2",)
    messages: list[Decoded] = [
        Begin(7),
        Changed(A, (one,)),
        Changed(A, (one, two)),
        Changed(B, None),
        Changed(B, (one,)),
        Commit(100),
        Begin(8),
        Commit(200),
        Begin(0xFFFFFFFF),
        Changed(A, (one,)),
        Truncated((A, B)),
        Changed(A, (two,)),
        Commit(300),
    ]
    assert taken(messages) == [
        Committed((1 << 32) + 7, {A: frozenset({one, two}), B: None}),
        Committed(0xFFFFFFFF, {A: None, B: None}),
    ]


def test_a_transaction_that_loses_a_table() -> None:
    """If another key is needed, the keys of the transaction in progress are not known."""
    found = Transactions(MANY, lambda xid: xid)
    found.lose(A)
    for message in (Begin(7), Changed(B, (("1",),))):
        assert found.take(message) is None
    found.lose(A)
    assert found.take(Changed(A, (("1",),))) is None
    assert found.take(Commit(1)) == Committed(7, {A: None, B: frozenset({("1",)})})


def test_a_large_transaction() -> None:
    """Its keys are not collected beyond the bounds, and repeated ones take nothing."""
    few = [Changed(A, ((str(number % 5),),)) for number in range(100)]
    many = [Changed(A, ((str(number),),)) for number in range(100)]
    first, second = taken(
        [Begin(1), *few, Commit(1), Begin(2), *many, Changed(B, (("b",),)), Commit(2)], Bounds(50, 1 << 20)
    )
    assert first.changed == {A: {(str(number),) for number in range(5)}}
    assert second.changed == {A: None, B: {("b",)}}
    (third,) = taken([Begin(1), *few, Commit(1)], Bounds(50, 2 * size_bytes(("1",))))
    assert third.changed == {A: None}


@given(st.integers(1 << 33, 1 << 62), st.integers(-(1 << 31) + 1, (1 << 31) - 1))
def test_full_xid(near: int, distance: int) -> None:
    """All bits of a number are known from those of a number nearby."""
    assert full_xid((near + distance) & 0xFFFFFFFF, near) == near + distance
