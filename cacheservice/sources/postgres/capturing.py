"""Finds the changes since a snapshot: in the stream from the write-ahead log if that is possible, else by triggers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cacheservice.cache.identity import Visibility
from cacheservice.cache.snapshot import Snapshot
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.full_or_delta import Changes, Key
from cacheservice.sources.postgres import deltas
from cacheservice.sources.postgres.logical import tables
from cacheservice.sources.postgres.logical.service import Capture
from cacheservice.sources.postgres.transaction import Transaction, Transactions

Mode = Literal["triggers", "logical", "auto"]

_MOST_WAIT_S = 5.0
"""For the stream, within a read; afterwards all rows are read."""


class _FromLog(NamedTuple):
    """What the stream shows.

    :param state: the start of the next delta; None if the stream cannot be used.
    :param problem: why the changes are not known.
    """

    state: dict[str, object] | None
    problem: str | None
    keys: tuple[Key, ...] = ()


class Capturing:
    """Decides by which way the changes of watched tables are found, in each transaction.

    The state that a snapshot keeps has `logical` if the next delta can use the stream, and the `tables` of the triggers
    if it can use those. If a stream begins while triggers work, one delta still uses the triggers.
    """

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._capture: Capture | None = None
        self._mode: Mode = "triggers"

    def configure(self, mode: Mode, capture: Capture) -> None:
        """Use a stream, or not, from now on."""
        self._mode, self._capture = mode, capture

    async def settle(self) -> None:
        """Wait for a stream that is being opened, but not for long."""
        if self._mode != "triggers" and self._capture is not None:
            await self._capture.settle()

    def can_ask(self, transaction: Transaction) -> bool:
        """Return whether changes can be known at all."""
        has_stream = self._mode != "triggers" and self._capture is not None and self._capture.streaming is not None
        return has_stream or (transaction.can_record and self._mode != "logical")

    async def changes(self, transaction: Transaction, read: ReadPlan) -> Changes:
        """Return the changes since the snapshot that a read starts from."""
        if self._mode == "triggers" or self._capture is None:
            return await self._recorded(transaction, read)
        found = await self._from_log(self._capture, transaction, read)
        before = _state_of(read.since)
        if found.state is not None and found.problem is None:
            return Changes(_text({"logical": found.state}), None, found.keys)
        if self._mode == "logical":
            state = "" if found.state is None else _text({"logical": found.state})
            return Changes(state, found.problem, ())
        if found.state is None:
            recorded = await self._recorded(transaction, read)
            state = _text({**json.loads(recorded.state or "{}"), "not_logical": found.problem})
            if recorded.problem is None:
                return recorded._replace(state=state)
            has_triggers = recorded.state and json.loads(recorded.state).get("tables")
            problem = (
                recorded.problem if has_triggers else f"{found.problem}; without logical decoding, {recorded.problem}"
            )
            return Changes(state if has_triggers else "", problem, ())
        if before.get("tables"):
            recorded = await self._recorded(transaction, read)
            if recorded.problem is None:
                return recorded._replace(state=_text({**json.loads(recorded.state), "logical": found.state}))
        return Changes(_text({"logical": found.state}), found.problem, ())

    async def _recorded(self, transaction: Transaction, read: ReadPlan) -> Changes:
        """Return the changes that triggers have recorded."""
        if not transaction.can_record:
            return Changes("", deltas.CANNOT_ASK, ())
        dataset, since = read.dataset, read.since
        cursor = await transaction.guard.execute(deltas.changes_sql(dataset, since, read.most_keys))
        return deltas.changes(cursor.fetchall(), dataset, since)

    async def _from_log(self, capture: Capture, transaction: Transaction, read: ReadPlan) -> _FromLog:
        dataset, since, stream = read.dataset, read.since, capture.streaming
        if stream is None:
            return _FromLog(None, capture.why_not())
        sql = tables.facts_sql(dataset, capture.publication, stream.slot, transaction.guard.server_version)
        found = tables.facts((await self._transactions.ask(transaction, sql)).fetchone())
        problem = tables.problem(found, dataset, capture.publication)
        if not found.is_here:
            problem = "the stream of changes has ended, or is of another server"
        server = transaction.moment.server
        assert server is not None, "each transaction identifies its server"
        now = Visibility.of(transaction.moment.database_snapshot, in_recovery=server.in_recovery)
        sent = () if problem is not None else tables.sent(found, dataset)
        stream.learn(dataset.name, sent, now)
        if problem is not None:
            return _FromLog(None, problem)
        state = {"slot": stream.slot, **tables.state(found, dataset)}
        if since is None:
            return _FromLog(_since(state, now), None)
        before = _state_of(since).get("logical")
        if before is None or before["slot"] != stream.slot:
            return _FromLog(_since(state, now), "changes are captured from the log only since the last refresh")
        if (moved := tables.moved(before, state)) is not None:
            return _FromLog(_since(state, now), moved)
        base = Visibility.of(since.database_snapshot, in_recovery=server.in_recovery)
        state["unsure"] = _still_unsure(before["unsure"], now)
        if _has_ended_unseen(before["unsure"], base, now):
            return _FromLog(state, "a transaction had begun before its changes could be captured")
        within_s = min(_MOST_WAIT_S, transaction.guard.remaining_s() / 4)
        if not await stream.pass_by(found.lsn, within_s, may_write=not server.in_recovery):
            return _FromLog(state, f"the stream of changes was not as far as the transaction within {within_s:.3g} s")
        keys = stream.captured.changed(sent, base, read.most_keys)
        if keys is None:
            because = (
                "a watched table was truncated, its key or replica identity was changed, or more keys changed than are "
                "kept in memory"
            )
            return _FromLog(state, because)
        return _FromLog(state, None, tuple(keys))


def _since(state: Mapping[str, object], now: Visibility) -> dict[str, object]:
    """Return a state that begins with a snapshot.

    A transaction that is still open then may have changed a table before the slot existed, or before the table was
    published, so that not all of its changes are sent. PostgreSQL lists none on a standby, where all before xmax may be
    open.
    """
    unsure = {"below": now.xmax} if now.in_progress is None else {"open": sorted(now.in_progress)}
    return {**state, "unsure": unsure}


def _still_unsure(unsure: Mapping[str, Any], now: Visibility) -> Mapping[str, Any]:
    """Return the transactions that a snapshot does not include either."""
    if "below" in unsure:
        return unsure if now.xmin < unsure["below"] else {"open": []}
    return {"open": [xid for xid in unsure["open"] if not now.includes(xid)]}


def _has_ended_unseen(unsure: Mapping[str, Any], base: Visibility, now: Visibility) -> bool:
    """Return whether such a transaction may have ended between two snapshots."""
    if "below" in unsure:
        return base.xmin < int(unsure["below"])
    return any(now.includes(xid) and not base.includes(xid) for xid in unsure["open"])


def _state_of(since: Snapshot | None) -> Mapping[str, Any]:
    return json.loads(since.watch_state) if since is not None and since.watch_state else {}


def _text(state: Mapping[str, object]) -> str:
    return json.dumps(state, separators=(",", ":"))
