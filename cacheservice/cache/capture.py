"""How changes of watched tables are captured, as operators see it. Immutable records that their owner replaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

CaptureState = Literal["off", "starting", "waiting", "streaming", "impossible", "lost"]


@dataclass(frozen=True, slots=True)
class CaptureStatus:
    """The stream of changes from the write-ahead log.

    States: `off` (no dataset needs it, or `capture = "triggers"`), `starting` (a session or a slot is being opened),
    `waiting` (the slot waits for open transactions), `streaming`, `impossible` (something must be changed first) and
    `lost` (it is tried again soon).

    :param problem: why nothing is streamed; for `waiting`, the sessions with the open transactions.
    :param lag_bytes: of the log that the server had written at the last look and that is not decoded yet.
    :param lag_s: for how long changes have not been decoded.
    :param retained_bytes: of the log that the server keeps for the slot; None if that is not known.
    :param limit_bytes: beyond which the server invalidates the slot; None without a limit.
    :param kept_keys: changed keys in memory, until no dataset needs them.
    :param transactions: that have changed published tables, since the start of the service, as `keys` of their rows.
    :param restarts: how often a stream ended, by reason.
    """

    state: CaptureState = "off"
    problem: str | None = None
    slot: str | None = None
    lag_bytes: int = 0
    lag_s: float = 0.0
    retained_bytes: int | None = None
    limit_bytes: int | None = None
    kept_keys: int = 0
    kept_bytes: int = 0
    transactions: int = 0
    keys: int = 0
    restarts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class CapturedBy(NamedTuple):
    """How the changes since a snapshot are captured: by `logical` decoding, by `triggers`, or not at all (`nothing`).

    :param not_logical: why not by logical decoding, if that was tried.
    """

    way: Literal["logical", "triggers", "nothing"]
    not_logical: str | None = None


def captured_by(watch_state: str) -> CapturedBy:
    """Return how the changes since a snapshot are captured.

    :param watch_state: of the snapshot: a JSON object with `logical`, or with the `tables` of the triggers, and then
        perhaps `not_logical`; empty if no delta can start there.
    """
    if not watch_state:
        return CapturedBy("nothing")
    state = json.loads(watch_state)
    if "logical" in state:
        return CapturedBy("logical")
    return CapturedBy("triggers" if state.get("tables") else "nothing", state.get("not_logical"))
