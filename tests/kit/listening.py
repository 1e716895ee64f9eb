"""What a listener reported, in its order."""

from __future__ import annotations

from typing import Any

from tests.kit.logs import Log


class Diary(list[tuple[Any, ...]]):
    """What happened, in its order: ("heard", channel, payload), ("missed",), ("listening_lost",) …"""

    def __init__(self) -> None:
        super().__init__()
        self.log = Log()
        self.log.info = self.log.warning = self.log.error = self.logged  # type: ignore[method-assign]

    def logged(self, event: str, **fields: Any) -> None:
        self.append((event,))
        self.log.add("any", event, fields)

    def heard(self, channel: str, payload: str) -> None:
        self.append(("heard", channel, payload))

    def missed(self) -> None:
        self.append(("missed",))

    @property
    def payloads(self) -> list[str]:
        return [entry[2] for entry in self if entry[0] == "heard"]
