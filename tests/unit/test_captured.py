"""Laws of captured changes: which datasets they concern, and by which keys, without a server."""

from __future__ import annotations

from cacheservice.cache.identity import Visibility
from cacheservice.sources.postgres.logical import environment
from cacheservice.sources.postgres.logical.captured import Captured
from cacheservice.sources.postgres.logical.environment import Environment
from cacheservice.sources.postgres.logical.kept import Bounds, Committed, Transactions, Trash, full_xid
from cacheservice.sources.postgres.logical.pgoutput import Begin, Changed, Column, Commit, Key, Relation
from cacheservice.sources.postgres.logical.tables import Sent, moved

T, LEAF, U = 100, 101, 200
SEEN = Visibility.of("10:10:", in_recovery=False)
LATER = Visibility.of("50:50:", in_recovery=False)


def watching(
    key: str | tuple[str, ...] = "id", oid: int = T, above: int = 0, *, booleans: bool = False
) -> tuple[Sent, ...]:
    names = (key,) if isinstance(key, str) else key
    over = frozenset({above} if above else ())
    return (Sent(frozenset({oid}), over, names, frozenset({0} if booleans else ())),)


def snapshot(text: str, *, in_recovery: bool = False) -> Visibility:
    return Visibility.of(text, in_recovery=in_recovery)


def relation(*columns: str, oid: int = T, identity: tuple[str, ...] = ()) -> Relation:
    return Relation(oid, "public", "t", tuple(Column(name, 23, name in identity) for name in columns))


def keys(*values: str) -> frozenset[Key]:
    return frozenset((value,) for value in values)


def places(captured: Captured, found: Relation) -> list[int] | None:
    return captured._places(found)


def test_whom_a_change_concerns() -> None:
    """Datasets that watch a table, and whose last read did not include the transaction."""
    captured = Captured(10)
    assert not captured.learn("t", watching(), SEEN)
    assert not captured.learn("u", watching(oid=U), SEEN)
    assert captured.committed(Committed(11, {T: keys("1")})) == {"t"}
    assert captured.committed(Committed(9, {T: keys("2")})) == set()
    assert captured.committed(Committed(12, {T: keys("3"), U: None})) == {"t", "u"}
    assert captured.changed(watching(), SEEN) == keys("1", "3")
    assert captured.changed(watching(), LATER) == frozenset()
    assert captured.changed(watching(oid=U), SEEN) is None
    captured.keep_only(["u"])
    assert captured.committed(Committed(13, {T: keys("1")})) == set()
    assert (captured.transactions, captured.keys) == (4, 4)


def test_a_change_before_its_table_is_known() -> None:
    """It was decoded after the snapshot of the first read, and before that read named its tables: it is read again."""
    captured = Captured(10)
    assert captured.committed(Committed(11, {T: None})) == set()
    assert captured.learn("t", watching(), SEEN)
    assert captured.changed(watching(), SEEN) is None
    assert not captured.learn("t", watching(), LATER)
    assert captured.changed(watching(), LATER) == frozenset()


def test_two_keys_of_one_table() -> None:
    """All of their columns are kept; those that were kept before another key became known are not enough."""
    captured = Captured(10)
    captured.learn("by_id", watching(), SEEN)
    assert places(captured, relation("id", "other", identity=("id", "other"))) == [0]
    captured.committed(Committed(11, {T: keys("1")}))
    captured.learn("by_other", watching("other"), SEEN)
    assert places(captured, relation("id", "other", identity=("id", "other"))) == [0, 1]
    assert captured.changed(watching(), SEEN) is None
    now = Visibility.of("12:12:", in_recovery=False)
    captured.committed(Committed(12, {T: frozenset({("1", "7")})}))
    assert captured.changed(watching(), now) == keys("1")
    assert captured.changed(watching("other"), now) == keys("7")


def test_booleans() -> None:
    """They are keys as casts to text write them."""
    captured = Captured(10)
    captured.learn("t", watching(booleans=True), SEEN)
    captured.committed(Committed(11, {T: frozenset({("t",), ("f",), (None,)})}))
    assert captured.changed(watching(booleans=True), SEEN) == {("true",), ("false",), (None,)}


def test_an_identity_without_the_key() -> None:
    """While old rows are sent without the key, no change of the table is known, whatever name it is sent under."""
    captured = Captured(10)
    captured.learn("t", watching(oid=LEAF, above=T), SEEN)
    root, leaf = relation("id", "other"), relation("id", "other", oid=LEAF, identity=("id",))
    # Of a partitioned table only what its partitions have matters.
    assert (places(captured, root), places(captured, leaf)) == ([0], [0])
    captured.committed(Committed(11, {T: keys("1")}))
    assert captured.changed(watching(oid=LEAF, above=T), SEEN) == keys("1")
    assert places(captured, relation("id", "other", oid=LEAF, identity=("other",))) is None
    captured.committed(Committed(12, {T: keys("2")}))
    assert captured.changed(watching(oid=LEAF, above=T), SEEN) is None
    assert places(captured, leaf) == [0]
    now = Visibility.of("13:13:", in_recovery=False)
    captured.committed(Committed(13, {T: keys("3")}))
    assert captured.changed(watching(oid=LEAF, above=T), now) == keys("3")
    assert places(captured, relation("other", oid=U)) is None


def test_forgetting() -> None:
    """Changes are forgotten that all snapshots include; not those that a read in progress may still need."""
    captured = Captured(10)
    captured.learn("t", watching(), SEEN)
    for xid in range(11, 2200):
        captured.committed(Committed(xid, {T: keys(str(xid))}))
        captured.forget(lambda: [LATER])
    assert captured.kept.count == 2189
    captured.learn("t", watching(), Visibility.of("3000:3000:", in_recovery=False))
    for xid in range(3000, 6000):
        captured.committed(Committed(xid, {T: keys(str(xid))}))
        captured.forget(lambda: [Visibility.of("3000:3000:", in_recovery=False)])
    assert captured.kept.count < 5000
    assert captured.changed(watching(), Visibility.of("5999:5999:", in_recovery=False)) == keys("5999")


def test_a_commit_that_no_session_sees_yet() -> None:
    """It is in the log before it is visible: a read that begins then misses it, and another one must follow."""
    captured = Captured(10)
    assert not captured.learn("products", watching(), snapshot("10:10:"))
    assert captured.committed(Committed(10, {T: keys("1")})) == {"products"}
    assert captured.learn("products", watching(), snapshot("10:10:"))
    assert captured.learn("products", watching(), snapshot("10:11:10"))
    assert not captured.learn("products", watching(), snapshot("11:11:"))


def test_a_standby() -> None:
    """It decodes a transaction after it has become visible, and its snapshots do not list those in progress."""
    captured = Captured(10)
    captured.learn("products", watching(), snapshot("10:10:", in_recovery=True))
    captured.committed(Committed(11, {T: keys("1")}))
    assert not captured.learn("products", watching(), snapshot("10:12:", in_recovery=True))


def test_unread_transactions_have_a_bound() -> None:
    """A dataset that cannot be read for hours does not fill the memory."""
    captured = Captured(10)
    captured.learn("products", watching(), snapshot("10:10:"))
    for xid in range(10, 25_000):
        captured.committed(Committed(xid, {T: None}))
    assert len(captured._unread["products"]) <= 10_000
    assert captured.learn("products", watching(), snapshot("24999:24999:"))
    assert not captured.learn("products", watching(), snapshot("25000:25000:"))


def test_a_large_transaction() -> None:
    """Its keys are in small sets, each quick to free, and all of them are found."""
    filled: list[int] = []
    trash = Trash(lambda: filled.append(1))
    captured = Captured(10, Bounds(20_000, 1 << 24), trash)
    captured.learn("products", watching(), snapshot("10:10:"))
    for message in (Begin(10), *(Changed(T, ((str(number),),)) for number in range(10_000)), Commit(1)):
        if (committed := captured.open.take(message)) is not None:
            captured.committed(committed)
            assert max(len(part.keys) for part in committed.more) <= 4096
    assert captured.changed(watching(), snapshot("10:10:")) == {(str(number),) for number in range(10_000)}
    some = captured.changed(watching(), snapshot("10:10:"), 100)
    assert some is not None
    assert 100 < len(some) < 10_000
    assert (captured.keys, captured.kept.count, filled) == (10_000, 10_000, [])
    captured.kept.lose(T)
    assert (captured.kept.count, filled) == (0, [1])
    assert trash.free()
    while trash.free():
        pass
    assert captured.changed(watching(), snapshot("10:10:")) is None


def test_a_transaction_beyond_the_bounds() -> None:
    """Its keys are given up, the parts as well as the last ones."""
    found = Transactions(Bounds(10_000, 1 << 24), lambda xid: full_xid(xid, 10))
    messages = [Begin(10), *(Changed(T, ((str(number),),)) for number in range(10_001)), Commit(1)]
    (committed,) = [each for message in messages if (each := found.take(message)) is not None]
    assert committed == Committed(10, {T: None})


ABLE = Environment("logical", False, 180004, "reader", True, True, 10, 0, 10, 0, 700)


def test_environments() -> None:
    """Each obstacle has its sentence, with the step that removes it."""
    assert environment.problem(ABLE, "cacheservice") is None
    assert environment.problem(ABLE._replace(in_recovery=True), "cacheservice") is None
    for found, words in (
        (ABLE._replace(wal_level="replica"), "run ALTER SYSTEM SET wal_level = logical and restart the server"),
        (ABLE._replace(wal_level="replica", in_recovery=True), "logical on the primary and here and restart"),
        (ABLE._replace(in_recovery=True, server_version=150010), "from PostgreSQL 16 on"),
        (ABLE._replace(may_replicate=False), "run cacheservice migrate --reader reader --replication"),
        (ABLE._replace(has_publication=False), "run cacheservice watch --logical"),
        (ABLE._replace(slots=10), "ALTER SYSTEM SET max_replication_slots = 14"),
        (ABLE._replace(senders=10), "ALTER SYSTEM SET max_wal_senders = 14"),
    ):
        assert words in (environment.problem(found, "cacheservice") or ""), words


def test_states() -> None:
    """What differs between two states is named."""
    member = [1, 10, "", None]
    table: dict[str, object] = {"oid": 1, "key": ["id"], "columns": ["1 id 23 -1"], "above": [], "entries": ["7/9"]}
    table |= {"schemas": None, "members": [member]}
    state = {"publication": "5/6", "tables": {"t": table}}

    def why(**changed: object) -> str | None:
        return moved(state, {"publication": "5/6", "tables": {"t": table | changed}})

    assert why() is None
    assert moved(state, {**state, "publication": "5/7"}) == "the publication was changed or created again"
    assert why(members=[[1, 11, "", None]]) == "t was truncated or rewritten"
    assert why(entries=["8/10"]) == "t was removed from the publication or added to it"
    assert why(key=["other"]) == "t has been watched by that key only since the last refresh"
    for changed in ({"columns": []}, {"members": [member, [2, 12, "1/9", None]]}, {"members": [[1, 11, "x", None]]}):
        assert why(**changed) == "the definition, the storage or the partitions of t changed"
