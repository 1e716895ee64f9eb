"""Saves one generation after the other until it is killed: ``python -m tests.kit.persistence_child DIRECTORY ROWS``.

With ``renew`` after that it saves one, and renews it, each time a second later by the database's clock. A line on
standard output reports that a generation or a renewal is begun, another that it is complete.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from cacheservice.cache.cache import Cache
from cacheservice.cache.snapshot import Snapshot
from cacheservice.config import PersistenceSettings
from cacheservice.refresh.restore import restore
from cacheservice.sources.disk.store import SnapshotStore
from tests.kit.datasets import rows_builder
from tests.kit.paths import ROOT
from tests.kit.saved_files import rows_of_generation, saved_dataset

SETTINGS = saved_dataset()


class Child:
    """The log of its store: what is saved makes it publish the next."""

    def __init__(self, directory: Path, count: int, renews: bool) -> None:
        self.cache = Cache([SETTINGS], reactor.seconds)
        settings = PersistenceSettings(directory=str(directory), min_save_interval_s=0, keep_generations=2)
        self.store = SnapshotStore(self.cache, settings, lambda _: None, reactor, self)
        self.count = count
        self.renews = renews
        self.renewed = 0

    def bind(self, **_: Any) -> Child:
        return self

    def warning(self, event: str, **fields: Any) -> None:
        say(event, fields)

    error = warning

    def info(self, event: str, **fields: Any) -> None:
        if event == "snapshot_saved":
            say("saved", fields["generation"])
            reactor.callLater(0, self.renew if self.renews else self.publish)

    def debug(self, event: str, **_: Any) -> None:
        if event == "snapshot_renewed":
            say("saved", self.renewed)
            reactor.callLater(0, self.renew)

    def renew(self) -> None:
        dataset = self.cache.dataset("products")
        assert dataset.snapshot is not None
        since = dataset.snapshot.modified_as_of
        self.renewed += 1
        say("begun", self.renewed)
        as_of = since + timedelta(seconds=self.renewed)
        dataset.renew(replace(dataset.snapshot, as_of=as_of, content_since=since))

    async def run(self) -> None:
        await restore(self.store, self.cache, reactor, self)
        self.store.startService()
        self.publish()

    def publish(self) -> None:
        dataset = self.cache.dataset("products")
        generation = dataset.snapshot.generation + 1 if dataset.snapshot else 1
        builder = rows_builder()
        builder.add(rows_of_generation(generation, self.count))
        say("begun", generation)
        dataset.publish(Snapshot(generation, builder.finish(), datetime.now(UTC), reactor.seconds(), "1:1:"))


def killed_after(directory: Path, count: int, after_s: float) -> int:
    """The last generation that a child had begun when it was killed, so long after its first; it blocks."""
    lines = _lines_until_killed(directory, after_s, str(count))
    return max(int(number) for word, number in lines if word == "begun")


def killed_while_renewing(directory: Path, after_s: float) -> tuple[int, int]:
    """The last renewal that a child had begun when it was killed, and the last that was complete; it blocks."""
    lines = _lines_until_killed(directory, after_s, "10", "renew")
    saved = [int(number) for word, number in lines if word == "saved"]
    # The first pair is of the generation that it renews.
    return max([0, *(int(number) for word, number in lines[1:] if word == "begun")]), saved[-1] if len(saved) > 1 else 0


def _lines_until_killed(directory: Path, after_s: float, *arguments: str) -> list[list[str]]:
    """The lines of a child, which is killed so long after its first; with renewals, after its first save."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.kit.persistence_child", str(directory), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    output = "".join(child.stdout.readline() for _ in arguments)
    time.sleep(after_s)
    child.kill()
    output += child.communicate()[0]
    words = [line.split() for line in output[: output.rfind("\n") + 1].splitlines()]  # the last one may be cut
    assert {word for word, *_ in words} <= {"begun", "saved"}, output
    return words


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201  # to the test that started it


def main() -> None:
    child = Child(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["renew"])
    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(child.run()))
    reactor.run()


if __name__ == "__main__":
    main()
