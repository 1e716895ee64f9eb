"""What was written, what was read, and what of it must not be."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.jepsen.money import (
    ACCOUNTS,
    BEAT_S,
    EXAMPLES,
    PRIMARY_TOLERANCE_S,
    STANDBY_TOLERANCE_S,
    START,
    SUM,
    TABLES,
)


@dataclass
class Claim:
    """One answer's claim to its age, judged once it is known which beats a promotion lost."""

    service: str
    via: str
    dataset: str
    sent_at: float
    age_s: float
    beat: int
    read_on_standby: bool


@dataclass
class Life:
    """One process of a service, and what it has shown so far."""

    number: int
    newest: dict[str, int] = field(default_factory=dict)
    """The generation of each dataset that an answer has shown."""
    contents: dict[tuple[str, int], int] = field(default_factory=dict)


class Judge:
    """What was written, what was read, and what of it must not be."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: dict[str, list[str]] = {}
        self.sums: Counter[str] = Counter()
        self.written: dict[tuple[str, int], dict[int, set[int]]] = {
            (table, number): {0: {START if number else 0}} for table in TABLES for number in range(ACCOUNTS + 1)
        }
        self.acknowledged: dict[int, float] = {}
        """When each beat was known to be committed."""
        self.lost: set[int] = set()
        self.claims: list[Claim] = []
        self.epoch = 0
        self.unsettled = False
        """A promotion is under way: which beats it loses is not known yet."""

    def found(self, what: str, example: str) -> None:
        with self.lock:
            self.counts[f"WRONG {what}"] += 1
            examples = self.wrong.setdefault(what, [])
            if len(examples) < EXAMPLES:
                examples.append(f"{time.strftime('%H:%M:%S')} {example}")
                print(f"WRONG {what}: {example}", flush=True)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def claim(self, claim: Claim) -> None:
        with self.lock:
            self.claims.append(claim)

    def floors(self, life: Life, names: Sequence[str]) -> dict[str, int]:
        """The newest generations that answers have shown, below which no later one may be."""
        with self.lock:
            return {name: life.newest.get(name, 0) for name in names}

    def acknowledge(self, beat: int, epoch: int) -> None:
        """It is committed, unless a promotion has begun meanwhile."""
        with self.lock:
            self.counts["beats"] += 1
            if epoch == self.epoch:
                self.acknowledged[beat] = time.monotonic()

    def promotion_begins(self) -> None:
        with self.lock:
            self.unsettled = True
            self.epoch += 1

    def promotion_ended(self, survived: int) -> None:
        """The new primary has the beat `survived`; nothing of the next epoch is written before this."""
        with self.lock:
            self.lost |= {beat for beat in self.acknowledged if beat > survived}
            self.unsettled = False

    def will_write(self, table: str, number: int, v: int, n: int) -> None:
        with self.lock:
            self.written[table, number].setdefault(v, set()).add(n)

    def forget(self, table: str, beat: int) -> None:
        """No reader sees a beat of an hour ago."""
        with self.lock:
            self.written[table, 0].pop(beat, None)

    def check_rows(self, where: str, names: Sequence[str], rows: Mapping[str, Mapping[int, Any]]) -> None:
        """One answer of the tables whose money is constant together."""
        total = sum(row["n"] for name in names for row in rows[name].values())
        with self.lock:
            self.sums[f"{'+'.join(names)}: {total - SUM * len(names):+d}"] += 1
        if total != SUM * len(names):
            self.found("sums", f"{where}: {total} instead of {SUM * len(names)}")
        for name in names:
            if len(rows[name]) != ACCOUNTS + 1:
                self.found("numbers of rows", f"{where}: {name} has {len(rows[name])} rows")
            for number, row in rows[name].items():
                if row["n"] not in self.written[name, number].get(row["v"], ()):
                    self.found("rows", f"{where}: {name} {row}")
        beats = {name: rows[name][0]["beat"] for name in names if 0 in rows[name]}
        if len(set(beats.values())) > 1:
            self.found("mixed moments", f"{where}: {beats}")

    def check_generation(self, life: Life, floor: int, dataset: str, generation: int, content: int, where: str) -> None:
        """Within a life a generation is of one content, and none comes after a later one was seen."""
        with self.lock:
            known = life.contents.setdefault((dataset, generation), content)
            life.newest[dataset] = max(life.newest.get(dataset, 0), generation)
        if generation < floor:
            self.found("generations that go back", f"{where}: {dataset} {generation} after {floor}")
        if known != content:
            self.found("generations that change", f"{where}: {dataset} {generation}")

    def judge_ages(self) -> None:
        """Judge the claims made so far. An answer with beat k, where k + 1 was committed by a moment, is that old."""
        with self.lock:
            if self.unsettled:
                return
            claims, self.claims = self.claims, []
            beats = sorted(set(self.acknowledged) - self.lost)
            following = dict(pairwise(beats))
        for claim in claims:
            following_beat = following.get(claim.beat)
            if claim.beat in self.lost or following_beat is None:
                self.count("ages not judged")
                continue
            true_s = claim.sent_at - self.acknowledged[following_beat]
            tolerance_s = STANDBY_TOLERANCE_S if claim.read_on_standby else PRIMARY_TOLERANCE_S
            self.count("ages judged")
            if claim.age_s < true_s - tolerance_s:
                self.found(f"ages understated by {claim.service}", f"{claim}: at least {true_s:.3f} s old")
        with self.lock:
            oldest = min((claim.beat for claim in self.claims), default=None)
            if oldest is None and beats:
                keep = beats[-int(600 / BEAT_S) :]
                self.acknowledged = {beat: self.acknowledged[beat] for beat in keep}
