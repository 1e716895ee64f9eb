"""The tables, how they are read, and the limits of a run."""

from __future__ import annotations

ACCOUNTS = 40
START = 1000
SUM = ACCOUNTS * START
GROUPS = {"bank": ("checking", "savings"), "till": ("front", "back")}
SINGLES = ("changed", "probed", "plain")
TABLES = (*GROUPS["bank"], *GROUPS["till"], *SINGLES)
WATCHED = (*GROUPS["bank"], "changed")
BANKS: tuple[tuple[str, ...], ...] = (*GROUPS.values(), *((name,) for name in SINGLES))
"""Tables whose sum is constant together."""

INTERVAL_S = 1.0
BEAT_S = 0.05
WRITES_PER_S = 15.0
WRITERS = 3
READ_PAUSE_S = 0.04
STANDBY_TOLERANCE_S = 2.0
"""What a standby has received a moment later than its primary committed, no standby knows."""
PRIMARY_TOLERANCE_S = 0.02
HTTP_LIMIT_S = 30.0
WAIT_MS = 3000
START_LIMIT_S = 300.0
RECOVERY_LIMIT_S = 180.0
EXAMPLES = 10

SCHEMA = "".join(
    f"CREATE TABLE {name} (id int PRIMARY KEY, n bigint NOT NULL, v bigint NOT NULL, beat bigint NOT NULL);"
    f"INSERT INTO {name} SELECT i, {START} * (i > 0)::int, 0, 0 FROM generate_series(0, {ACCOUNTS}) AS i;"
    for name in TABLES
)
SLOW = "SELECT id, n, v, beat FROM {name} WHERE pg_sleep(0.002) IS NOT NULL"
"""A read that takes a tenth of a second, so that faults happen during reads."""
