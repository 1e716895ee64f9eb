"""Laws of listening without a server: canaries, what a failure means, the statements for channels."""

from __future__ import annotations

from cacheservice.base.errors import DatabaseUnavailable, NoSessionLeft, NotHeard, QueryFailed
from cacheservice.config import OWN_CHANNEL
from cacheservice.sources.postgres.listening.calls import Calls, Observer
from cacheservice.sources.postgres.listening.canaries import Canaries
from cacheservice.sources.postgres.listening.failures import Failures, HeardNothing, Problem
from cacheservice.sources.postgres.listening.pace import Pace
from cacheservice.sources.postgres.listening.session import listen_sql
from tests.kit.listening import Diary


def payload_of(sql: str) -> str:
    """The payload of the notification that a statement sends."""
    return sql.split("'")[-2]


def failures(share: float = 1.0) -> Failures:
    return Failures(Pace(random=lambda: share))


def test_a_canary_that_comes_back() -> None:
    """Only the newest canary of this listener counts; those of others are not handed on, either."""
    canaries, others = Canaries(), Canaries()
    older = payload_of(canaries.next_sql())
    newest = payload_of(canaries.next_sql())
    for payload in (older, payload_of(others.next_sql()), "canary of nobody"):
        assert canaries.received(OWN_CHANNEL, payload)
        assert not canaries.is_back()
    assert canaries.received(OWN_CHANNEL, newest)
    assert canaries.is_back()
    canaries.next_sql()
    assert not canaries.is_back()


def test_notifications_that_are_not_canaries() -> None:
    """Others on the service's own channel, and any on another one, are handed on."""
    canaries = Canaries()
    payload = payload_of(canaries.next_sql())
    assert not canaries.received("changes", payload)
    assert not canaries.received(OWN_CHANNEL, "changed 7")
    assert not canaries.is_back()


def test_retries_wait_longer_each_time() -> None:
    """From within 1 s to within 30 s, at random: a server that comes back is not flooded."""
    each = failures()
    assert [each.lost("x").retry_in_s for _ in range(7)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    half = failures(0.5)
    assert [half.lost("x").retry_in_s for _ in range(6)][-1] == 15.0
    each.proven()
    assert (each.count, each.lost("x").retry_in_s) == (0, 1.0)


def test_one_line_for_each_change() -> None:
    """The first loss is new, the following ones are not, until a session is proven."""
    each = failures()
    assert each.failed(DatabaseUnavailable("refused")) == Problem("lost", "refused", 1.0, is_new=True)
    assert each.failed(DatabaseUnavailable("no answer")) == Problem("lost", "no answer", 2.0, is_new=False)
    assert each.proven()
    assert not each.proven()
    assert each.failed(NotHeard("no canary")).is_new


def test_where_listen_cannot_work() -> None:
    """On a standby, without a connection, and behind a pool of transactions it is tried again slowly."""
    each = failures()
    standby = each.failed(QueryFailed("cannot execute LISTEN during recovery", sqlstate="25006"))
    assert (standby.kind, standby.text, standby.retry_in_s, standby.is_new) == (
        "impossible",
        "the server is a standby, where LISTEN cannot work",
        60.0,
        True,
    )
    assert not each.failed(QueryFailed("cannot execute LISTEN during recovery", sqlstate="25006")).is_new
    none_left = each.failed(NoSessionLeft("too many connections"))
    assert (none_left.kind, none_left.is_new) == ("impossible", True)
    assert none_left.text == "refreshes have priority, and no connection is left for listening: too many connections"
    assert each.failed(HeardNothing("no canary")).kind == "lost"
    assert "PgBouncer" in each.failed(HeardNothing("no canary")).text
    assert each.failed(DatabaseUnavailable("refused")).kind == "lost"
    assert each.failed(HeardNothing("no canary")).kind == "lost"


def test_channels_change_in_one_transaction() -> None:
    """Only what differs is changed, and names are quoted."""
    sql = listen_sql(frozenset({"gone", "kept"}), frozenset({"kept", 'a "b"'}))
    assert sql == 'BEGIN; UNLISTEN "gone"; LISTEN "a ""b"""; COMMIT'


def test_an_observer_that_raises() -> None:
    """Its failure is logged with its traceback, and does not reach the session."""
    diary = Diary()
    seen: list[bool] = []

    def raise_() -> None:
        seen.append(calls.running)
        raise RuntimeError("a mistake")

    calls = Calls(Observer(diary.heard, raise_), diary.log)
    calls.missed()
    calls.heard("changes", "1")
    assert (seen, calls.running) == ([True], False)
    assert diary == [("internal_error",), ("heard", "changes", "1")]
    assert "a mistake" in diary.log.named("internal_error")[0]["traceback"]
