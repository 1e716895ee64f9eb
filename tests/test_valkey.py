"""Commands on real Valkey servers: one, a cluster, the primary of a sentinel; and what each failure is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from contextlib import closing
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from cacheservice.config.valkey_url import parse
from cacheservice.replication.valkey.client import Valkey
from cacheservice.replication.valkey.errors import ValkeyDown, ValkeyRefused
from tests.kit.certificates import make_certificates
from tests.kit.ports import free_port
from tests.kit.tls import TlsFront
from tests.kit.valkey import running_cluster, running_sentinel, running_valkey

LONG_S = 30.0
"""The time limit of replies that come, on a busy machine as well."""


class Commands(TestCase):
    timeout = 120

    def connected(self, url: str, timeout_s: float = LONG_S) -> Valkey:
        client = Valkey(parse(url), reactor, timeout_s)
        self.addCleanup(client.close)
        return client

    async def closed(self, client: Valkey) -> None:
        """Close a client and wait until its connections are gone."""
        client.close()
        await deferLater(reactor, 0.01)

    async def test_one_server(self) -> None:
        """Bytes come back as they were sent; commands of many callers share a connection."""
        with running_valkey() as server:
            client = self.connected(f"redis://{server.address}/3")
            value = bytes(range(256)) * 4096
            written = [Deferred.fromCoroutine(client.run(b"k", "SET", f"k{n}", value)) for n in range(20)]
            self.assertEqual(await gatherResults(written), [b"OK"] * 20)
            self.assertEqual(await client.run(b"k7", "GET", "k7"), value)
            self.assertEqual(await client.run(b"n", "SET", "n", "12"), b"OK")
            self.assertEqual(await client.run(b"n", "GET", "n"), b"12")
            self.assertIsNone(await client.run(b"none", "GET", "none"))
            self.assertEqual(server.cli("-n", "3", "DBSIZE"), "21")
            self.assertEqual(server.cli("CLIENT", "LIST").count("db=3"), 1)
            await self.closed(client)
            with self.assertRaisesRegex(ValkeyDown, "closed"):
                await client.run(b"n", "GET", "n")

    async def test_refusals(self) -> None:
        """A refusal has its code, and the connection stays; that of a login names the setting, not the secret."""
        with running_valkey("--requirepass", "right") as server:
            client = self.connected(f"redis://:right@{server.address}")
            await client.run(b"k", "SET", "k", "text")
            with self.assertRaises(ValkeyRefused) as caught:
                await client.run(b"k", "LPUSH", "k", "x")
            self.assertEqual(caught.exception.code, "WRONGTYPE")
            self.assertEqual(await client.run(b"k", "GET", "k"), b"text")
            wrong = self.connected(f"redis://:topsecret@{server.address}")
            with self.assertRaises(ValkeyRefused) as caught:
                await wrong.run(b"k", "GET", "k")
            self.assertEqual(caught.exception.code, "WRONGPASS")
            self.assertIn("cluster.valkey_url", str(caught.exception))
            self.assertNotIn("topsecret", str(caught.exception))
            nobody = self.connected(f"redis://{server.address}")
            with self.assertRaises(ValkeyRefused) as caught:
                await nobody.run(b"k", "GET", "k")
            self.assertEqual(caught.exception.code, "NOAUTH")
            for each in (client, wrong, nobody):
                await self.closed(each)

    async def test_a_server_that_is_gone_and_back(self) -> None:
        """Commands fail while it is gone, and succeed once it is back, without a new client."""
        with running_valkey() as server:
            client = self.connected(f"redis://{server.address}")
            await client.run(b"k", "SET", "k", "1")
            server.kill()
            with self.assertRaises(ValkeyDown):
                await client.run(b"k", "GET", "k")
            with self.assertRaisesRegex(ValkeyDown, f"{server.address} cannot be reached"):
                await client.run(b"k", "GET", "k")
            server.start()
            server.wait("PING", until="PONG")
            self.assertIsNone(await client.run(b"k", "GET", "k"))
            await self.closed(client)

    async def test_a_server_that_hangs(self) -> None:
        """No reply in time fails every command that waits for the connection, and the next one opens another."""
        with running_valkey() as server:
            client = self.connected(f"redis://{server.address}", 0.5)
            await client.run(b"k", "SET", "k", "1")
            server.process.send_signal(signal.SIGSTOP)
            waiting = [Deferred.fromCoroutine(client.run(b"k", "GET", "k")) for _ in range(3)]
            for each in waiting:
                with self.assertRaises(ValkeyDown):
                    await each
            server.process.send_signal(signal.SIGCONT)
            patient = self.connected(f"redis://{server.address}")
            self.assertEqual(await patient.run(b"k", "GET", "k"), b"1")
            await self.closed(client)
            await self.closed(patient)

    async def test_a_cluster(self) -> None:
        """Each command reaches the node of its key, also after a slot has moved."""
        with running_cluster() as servers:
            client = self.connected("redis://" + ",".join(server.address for server in servers))
            for number in range(60):
                key = b"{%d}:head" % number
                self.assertEqual(await client.run(key, "SET", key, number), b"OK")
                self.assertEqual(await client.run(key, "GET", key), b"%d" % number)
            sizes = [int(server.cli("DBSIZE")) for server in servers]
            self.assertEqual((sum(sizes), 0 in sizes), (60, False))
            # Move the slot of one key to another node, while it is away and after it.
            slot = servers[0].cli("CLUSTER", "KEYSLOT", "{1}:head")
            ids = [server.cli("CLUSTER", "MYID") for server in servers]
            source = next(
                n for n, server in enumerate(servers) if "{1}:head" in server.cli("CLUSTER", "GETKEYSINSLOT", slot, "9")
            )
            target = (source + 1) % 3
            servers[target].cli("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
            servers[source].cli("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
            servers[source].cli("MIGRATE", "127.0.0.1", str(servers[target].port), "{1}:head", "0", "5000")
            self.assertEqual(await client.run(b"{1}:head", "GET", "{1}:head"), b"1")
            for server in servers:
                server.cli("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
            self.assertEqual(await client.run(b"{1}:head", "GET", "{1}:head"), b"1")
            await self.closed(client)

    async def test_a_failover_by_a_sentinel(self) -> None:
        """The commands follow the primary that the sentinel reports."""
        with running_sentinel("shop") as (primary, replica, sentinel):
            client = self.connected(f"redis+sentinel://{sentinel.address}/shop", 2.0)
            self.assertEqual(await client.run(b"k", "SET", "k", "1"), b"OK")
            primary.wait("INFO", "replication", until="connected_slaves:1")
            replica.wait("GET", "k", until="1")
            primary.kill()
            sentinel.wait("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shop", until=str(replica.port))
            replica.wait("ROLE", until="master")
            while True:
                try:
                    self.assertEqual(await client.run(b"k", "SET", "k", "2"), b"OK")
                    break
                except ValkeyDown:
                    await deferLater(reactor, 0.05)
            self.assertEqual(replica.cli("GET", "k"), "2")
            await self.closed(client)
            unknown = self.connected(f"redis+sentinel://{sentinel.address}/other")
            with self.assertRaisesRegex(ValkeyDown, "knows no service 'other'"):
                await unknown.run(b"k", "GET", "k")

    async def test_tls(self) -> None:
        """The certificate has to be of a trusted authority and for the name; each error names the next step."""
        folder = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, folder)
        make_certificates(folder)
        self.addCleanup(os.environ.pop, "SSL_CERT_FILE")
        with running_valkey() as server:
            front = await deferToThread(TlsFront, folder, server.port)
            self.addCleanup(deferToThread, front.close)
            for authority, host, problem in (
                ("ca", "localhost", ""),
                ("other", "localhost", "certificate verify failed; .* name its file in SSL_CERT_FILE"),
                ("ca", "127.0.0.1", "not for this name; use a name of the certificate"),
            ):
                os.environ["SSL_CERT_FILE"] = str(folder / f"{authority}.crt")
                client = self.connected(f"rediss://{host}:{front.port}")
                if problem:
                    with self.assertRaisesRegex(ValkeyDown, f"{host}:{front.port}: TLS failed: .*{problem}"):
                        await client.run(b"k", "GET", "k")
                else:
                    self.assertEqual(await client.run(b"k", "SET", "k", bytes(1 << 20)), b"OK")
                    self.assertEqual(await client.run(b"k", "GET", "k"), bytes(1 << 20))
                await self.closed(client)

    async def test_tls_on_one_side(self) -> None:
        """A URL with TLS for a port without it, which may wait for more, is not reported as a slow server."""
        with running_valkey() as server:
            client = self.connected(f"rediss://{server.address}", 2.0)
            with self.assertRaisesRegex(ValkeyDown, f"{server.address}: TLS failed: "):
                await client.run(b"k", "GET", "k")
            await self.closed(client)
        with closing(socket.create_server(("127.0.0.1", 0))) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            client = self.connected(f"rediss://{address}", 0.2)
            problem = f"{address}: TLS failed: no handshake; a port without TLS needs redis:// in cluster.valkey_url"
            with self.assertRaisesRegex(ValkeyDown, problem):
                await client.run(b"k", "GET", "k")
            await self.closed(client)

    async def test_a_connect_that_is_cancelled(self) -> None:
        """The caller that is cancelled ends; another one that waits for the same connection fails or succeeds."""
        with running_valkey() as server:
            client = self.connected(f"redis://{server.address}")
            first = Deferred.fromCoroutine(client.run(b"k", "GET", "k"))
            second = Deferred.fromCoroutine(client.run(b"k", "GET", "k"))
            first.cancel()
            with self.assertRaises(CancelledError):
                await first
            try:
                self.assertIsNone(await second)
            except ValkeyDown as error:
                self.assertIn("given up", str(error))
            self.assertIsNone(await client.run(b"k", "GET", "k"))
            await self.closed(client)

    async def test_nobody_there(self) -> None:
        one, other = free_port(), free_port()
        client = self.connected(f"redis://127.0.0.1:{one},127.0.0.1:{other}")
        with self.assertRaises(ValkeyDown) as caught:
            await client.run(b"k", "GET", "k")
        for port in (one, other):
            self.assertIn(f"127.0.0.1:{port} cannot be reached", str(caught.exception))
