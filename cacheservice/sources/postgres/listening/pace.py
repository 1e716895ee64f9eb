"""The intervals of a listener."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """The intervals of a listener, in seconds.

    - `canary_interval_s`: from one proof that notifications arrive to the next.
    - `answer_within_s`: for the answer to a statement, and for a canary to come back.
    - `retry_initial_s`, `retry_max_s`: the bounds of the delay after the first failure, and after many.
    - `retry_slowly_s`: the delay while LISTEN cannot work, until a promotion, a new connection string or a direct
      connection.
    - `random`: returns a number from 0 to 1, the share of a delay's bound that is waited.
    """

    canary_interval_s: float = 10.0
    answer_within_s: float = 5.0
    retry_initial_s: float = 1.0
    retry_max_s: float = 30.0
    retry_slowly_s: float = 60.0
    random: Callable[[], float] = random.random
