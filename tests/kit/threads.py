"""A reactor whose threads end when a test has them end."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock


class Pool:
    """Threads that end when the test has them end."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def callInThreadWithCallback(self, ended: Any, call: Any, *arguments: Any, **named: Any) -> None:
        self.calls.append((ended, lambda: call(*arguments, **named)))

    def run(self) -> None:
        calls, self.calls = self.calls, []
        for ended, call in calls:
            try:
                result, succeeded = call(), True
            except Exception as error:
                result, succeeded = error, False
            ended(succeeded, result)


class ReactorWithThreads(Clock):
    """A clock with a pool of threads."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()

    def getThreadPool(self) -> Pool:
        return self.pool

    def callFromThread(self, call: Any, *arguments: Any) -> None:
        call(*arguments)
