"""The slots of a cluster: which node has which keys. No I/O.

The rules are those of the cluster specification (valkey.io/topics/cluster-spec).
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Sequence

from cacheservice.replication.valkey.target import Address

SLOTS = 16384


def slot_of(key: bytes) -> int:
    """Return the slot of a key; keys with the same text in their first braces have the same slot."""
    start = key.find(b"{")
    end = key.find(b"}", start + 1) if start >= 0 else -1
    return crc_hqx(key[start + 1 : end] if end > start + 1 else key, 0) % SLOTS


class SlotMap:
    """The nodes of the slots, as one node of the cluster has reported them."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, Address]] = []
        self._moved: dict[int, Address] = {}

    @property
    def nodes(self) -> list[Address]:
        """The primaries of the cluster."""
        return list(dict.fromkeys([*(node for _, _, node in self._ranges), *self._moved.values()]))

    def learn(self, reply: object, asked: Address) -> None:
        """Take the reply to CLUSTER SLOTS.

        :param asked: the node that has replied; it stands for an empty host in its reply.
        """
        ranges: list[tuple[int, int, Address]] = []
        if isinstance(reply, Sequence):
            for entry in reply:
                first, last, primary = entry[0], entry[1], entry[2]
                host = primary[0].decode() if isinstance(primary[0], bytes) else ""
                ranges.append((int(first), int(last), (asked[0] if host in ("", "?") else host, int(primary[1]))))
        self._ranges, self._moved = ranges, {}

    def moved(self, slot: int, node: Address) -> None:
        """Note that a node has reported another one for a slot."""
        self._moved[slot] = node

    def node_of(self, key: bytes) -> Address | None:
        """Return the primary that has a key; None if that is not known."""
        slot = slot_of(key)
        if slot in self._moved:
            return self._moved[slot]
        return next((node for first, last, node in self._ranges if first <= slot <= last), None)
