"""Runs commands on the server that has their key: a single server, the primary of sentinels, or a node of a cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from cacheservice.base.errors import CacheServiceError
from cacheservice.base.interfaces import Reactor
from cacheservice.config.valkey_url import Address, Target
from cacheservice.replication.valkey.errors import ValkeyDown, ValkeyRefused
from cacheservice.replication.valkey.node import Connection, Login, Node, Redirected, Word
from cacheservice.replication.valkey.slots import SlotMap

_MOST_REDIRECTIONS = 5


class Valkey:
    """A connection to each server that is needed.

    Where a key is, is found out with the first command: from the sentinels, or from CLUSTER SLOTS, which a server
    without a cluster refuses. It is found out again after a command has failed.

    :param timeout_s: the most seconds that connecting to a server, and each reply, may take.
    """

    def __init__(self, target: Target, reactor: Reactor, timeout_s: float = 2.0) -> None:
        self._target = target
        self._reactor = reactor
        self._login = Login(target.user, target.password, target.database, target.tls, timeout_s)
        self._nodes: dict[Address, Node] = {}
        self._slots: SlotMap | None = None
        self._primary: Node | None = None
        self._is_closed = False

    async def run(self, key: bytes, *words: Word) -> Any:
        """Run a command on the server that has `key`.

        Return its reply: None, an integer, bytes or a list of these. A command whose connection fails may have been
        carried out.

        :raises ValkeyDown: if no server can carry it out in time.
        :raises ValkeyRefused: if the server refuses it.
        """
        try:
            node = await self._node_of(key)
            for _ in range(_MOST_REDIRECTIONS):
                try:
                    return await node.run(*words)
                except Redirected as redirected:
                    node = self._node(redirected.node)
                    if redirected.asks:
                        return await node.run_asked(*words)
                    if self._slots is None:
                        self._slots = SlotMap()
                    self._slots.moved(redirected.slot, redirected.node)
        except ValkeyDown:
            self._forget()
            raise
        except Redirected:
            pass
        self._forget()
        raise ValkeyDown(f"the nodes of the cluster disagree about where {key[:100]!r} is; it may be changing")

    async def open(self, protocol: Callable[[], Connection]) -> Connection:
        """Open a connection of its own to a server that is a primary, for a subscription; return its protocol.

        :raises ValkeyDown: if none can be reached.
        :raises ValkeyRefused: if the login is refused.
        """
        try:
            node = await self._node_of(b"")
            return await node.open(protocol)
        except ValkeyDown:
            self._forget()
            raise

    def close(self) -> None:
        """Close all connections; commands fail from now on."""
        self._is_closed = True
        for node in self._nodes.values():
            node.close()

    def _node(self, address: Address, login: Login | None = None) -> Node:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = Node(address, login or self._login, self._reactor)
        return node

    def _forget(self) -> None:
        self._slots = self._primary = None

    async def _node_of(self, key: bytes) -> Node:
        if self._is_closed:
            raise ValkeyDown("the connections are closed")
        if self._slots is None and self._primary is None:
            await self._find()
        address = self._slots.node_of(key) if self._slots is not None else None
        if address is not None:
            return self._node(address)
        if self._primary is None:
            raise ValkeyDown("no node of the cluster has all slots now; see CLUSTER INFO")
        return self._primary

    async def _find(self) -> None:
        if self._target.service:
            self._primary = await self._first(self._ask_sentinel)
        else:
            self._primary = await self._first(self._ask_node)

    async def _first(self, ask: Callable[[Address], Awaitable[Node]]) -> Node:
        """Return the answer of the first node that has one; the node that answered last time is asked first."""
        problems: list[CacheServiceError] = []
        for address in self._target.nodes:
            try:
                return await ask(address)
            except ValkeyDown as error:
                problems.append(error)
        raise ValkeyDown("; ".join(map(str, problems)))

    async def _ask_node(self, address: Address) -> Node:
        node = self._node(address)
        try:
            reply = await node.run("CLUSTER", "SLOTS")
        except ValkeyRefused as error:
            if error.code in ("NOAUTH", "WRONGPASS", "NOPERM"):
                raise
            return node  # it is no cluster
        self._slots = SlotMap()
        self._slots.learn(reply, address)
        return node

    async def _ask_sentinel(self, address: Address) -> Node:
        """Return the primary that a sentinel reports, if it is one."""
        service = self._target.service
        sentinel = Node(address, Login(tls=self._login.tls, timeout_s=self._login.timeout_s), self._reactor)
        try:
            reply = await sentinel.run("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        finally:
            sentinel.close()
        if not reply:
            raise ValkeyDown(f"the sentinel {sentinel.name} knows no service '{service}'")
        primary = self._node((reply[0].decode(), int(reply[1])))
        role = await primary.run("ROLE")
        if role[0] != b"master":
            raise ValkeyDown(f"{primary.name} is not a primary, although the sentinel {sentinel.name} reports it")
        return primary
