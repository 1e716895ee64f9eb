"""An attacker of the ports: valid requests, mutated, on many connections at once, and a judge of what comes back.

    python -m tests.kit.fuzz

takes its orders from standard input as JSON (`Orders`) and writes what it found as JSON (`Found`). It is a process of
its own, so that it takes no time of the reactor that it attacks. What is sent on each connection follows from the seed
and from what is answered, but not from how fast it is.
"""

from __future__ import annotations

import json
import random
import re
import select
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import hiredis

from tests.kit.resp import encode
from tests.kit.waiting import GIVE_UP_S

CONNECTIONS = 32
MOST_FAILURES = 3
MAX_SHOWN_BYTES = 4000
MAX_LINE_BYTES = 256

DROPPED = 0.03  # of the sessions: the client goes without reading
CUT = 0.08  # of the sessions: they are sent in pieces
INTACT = 0.05  # of the inputs: they are sent as they are

HUGE = [b"0", b"-1", b"00", b"+1", b"1e9", b"0x10", b"65536", b"999999", b"1000000", b"2147483648", b"4294967296"]
HUGE += [b"9223372036854775807", b"-9223372036854775808", b"18446744073709551616", b"9" * 40, b"9" * 5000]
TOKENS = [
    b"*",
    b"$",
    b"%",
    b":",
    b";",
    b",",
    b"/",
    b"?",
    b"=",
    b"'",
    b'"',
    b"..",
    b"%00",
    b"\\x",
    b"A: b\r\n",
    b"HTTP/1.1",
]
TOKENS += [b"*1\r\n", b"$0\r\n\r\n", b"*-1\r\n", b"~2\r\n", b"_\r\n", b"quit\n", b"prompt\n", b"x" * 300]
TOKENS += [b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b"\xff", b"\xc3\xa9", b"\xe2\x80\xa8", b"\x1b[2J"]
RARE = [b"x" * 20_000, b"\xff" * 70_000, b"\r\n" * 3000, b"a:b\r\n" * 200, b"ruok\n" * 1000]
RARE += [b"*1\r\n$4\r\nPING\r\n" * 1000, b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * 100]
_NUMBER = re.compile(rb"\d+")


@dataclass(frozen=True)
class Input:
    """`intact` is one that nobody touched, and after which the connection goes on."""

    data: bytes
    intact: bool = False


@dataclass(frozen=True)
class Group:
    """Inputs of one connection, and how it is treated.

    `cuts` are the places, from 0 to 1, where the network cuts the input. A `dropped` client goes without reading, and
    with a reset if it is `aborted`.
    """

    inputs: Sequence[Input]
    cuts: Sequence[float] = ()
    dropped: bool = False
    aborted: bool = False


class Wrong(Exception):
    """A law was broken by the answer to a session; `number` is the input that it broke at."""

    def __init__(self, why: str, number: int = 0) -> None:
        super().__init__(why)
        self.number = number


class Talk(ABC):
    """One protocol: what valid clients send, how inputs share a connection, and the laws of what they receive."""

    most_inputs = 3
    corpus: Sequence[bytes]
    last: Sequence[bytes]
    """Valid as well, but they end the connection."""

    @abstractmethod
    def session(self, inputs: Sequence[Input]) -> bytes:
        """All that the client sends on one connection."""

    @abstractmethod
    def judge(self, inputs: Sequence[Input], sent: bytes, answer: bytes, was_reset: bool) -> int:
        """How many of the inputs the port has looked at: up to the one after which it was not in step any more.

        :raises Wrong: if the answer is not one that a port may send.
        """


# What is mutated


def groups_of(talk: Talk, seed: str) -> Iterator[Group]:
    """Without end."""
    rng = random.Random(seed)
    valid = [*talk.corpus, *talk.last]
    while True:
        inputs = []
        while len(inputs) < talk.most_inputs:
            if rng.random() < INTACT:
                data = rng.choice(valid)
                inputs.append(Input(data, data not in talk.last))
            else:
                inputs.append(Input(mutated(rng, valid)))
        dropped = rng.random() < DROPPED
        cuts = [rng.random() for _ in range(3)] if rng.random() < CUT else []
        yield Group(inputs, sorted(cuts), dropped, dropped and rng.random() < 0.5)


def mutated(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    data = bytearray(rng.choice(corpus))
    while True:
        mutation = rng.choice(_MUTATIONS)
        mutation(rng, data, corpus)
        if rng.random() < 0.5:
            return bytes(data)


def _place(rng: random.Random, data: bytearray) -> int:
    return int(rng.random() * (len(data) + 1))


def _part(rng: random.Random, data: bytearray) -> slice:
    start = _place(rng, data)
    length = 1 if rng.random() < 0.5 else int(rng.random() * 16) + 1
    return slice(start, start + length)


def _flip(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _ in range(1 + int(rng.random() * 3)):
        if data:
            position = int(rng.random() * len(data))
            data[position] ^= 1 << int(rng.random() * 8)


def _replace(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[int(rng.random() * len(data))] = int(rng.random() * 256)


def _delete(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_part(rng, data)]


def _insert(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    chance = rng.random()
    new = rng.choice(TOKENS) if chance < 0.7 else rng.randbytes(1 + int(rng.random() * 8))
    if chance > 0.995:
        new = rng.choice(RARE)
    position = _place(rng, data)
    data[position:position] = new


def _duplicate(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    part = data[_part(rng, data)]
    position = _place(rng, data)
    data[position:position] = part * (1 if rng.random() < 0.9 else 50)


def _duplicate_line(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    lines = data.splitlines(keepends=True)
    if lines:
        number = int(rng.random() * len(lines))
        lines.insert(number, lines[int(rng.random() * len(lines))])
        data[:] = b"".join(lines)


def _splice(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    other = bytearray(rng.choice(corpus))
    data[_place(rng, data) :] = other[_place(rng, other) :]


def _number(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    numbers = list(_NUMBER.finditer(data))
    if numbers:
        start, end = rng.choice(numbers).span()
        data[start:end] = rng.choice(HUGE)


def _truncate(rng: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_place(rng, data) :]


_MUTATIONS = [_flip, _replace, _delete, _insert, _duplicate, _duplicate_line, _splice, _number, _truncate]


# RESP

_NOTHING = object()


def _resp_corpus() -> list[bytes]:
    lines = """
        PING|PING hello|ECHO hi|GET products:7|GET products:nope|GET nope:1|GET products|get strict:1|GET prices:1
        MGET products:7 products:nope strict:1|EXISTS products:7 products products:nope|STRLEN products:7
        TYPE products|TTL products|PTTL products:7|SCAN 0 MATCH p* COUNT 100 TYPE string|SCAN 0|DBSIZE
        HGET products 7|HMGET products 7 nope 8|HEXISTS products 7|HLEN products|HSTRLEN products 7|HKEYS empty
        HVALS strict|HGETALL strict|HSCAN products 0 COUNT 5 MATCH *1*|HSCAN products 1099511627775|HGETALL products
        SELECT 0|SELECT 1|RESET|INFO|INFO server|COMMAND COUNT|COMMAND DOCS get|COMMAND INFO get mget
        CLIENT ID|CLIENT GETNAME|CLIENT SETNAME me|CLIENT SETINFO lib-name x|CLIENT INFO|CLIENT LIST|CLIENT NO-EVICT ON
        SET a b|DEL products:1|FLUSHALL|CLUSTER SLOTS|READONLY|FOO bar|HELLO|HELLO 2|HELLO 3|CACHE.LIST
        HELLO 3 SETNAME me|CACHE.INFO products|CACHE.AGE products|CACHE.WAIT products 0 10
        SUBSCRIBE cache:products cache:empty|SUBSCRIBE cache:nope|UNSUBSCRIBE|DISCARD|EXEC|EVAL x 0
    """
    commands = [line.strip().split() for line in lines.replace("\n", "|").split("|") if line.strip()]
    corpus = [encode(*words) for words in commands]
    corpus += [" ".join(words).encode() + ending for words in commands[::3] for ending in (b"\r\n", b"\n")]
    corpus += [
        encode("GET", "products:1") * 5,
        encode("GET", "products:1") + b"PING\r\n" + encode("MGET", "products:1", "products:2") + b"PING\n\r\n",
        encode("MULTI") + encode("GET", "products:1") + encode("HVALS", "products") + encode("PING") + encode("EXEC"),
        encode("MULTI") + encode("SET", "a", "b") + encode("EXEC"),
        encode("MULTI") + encode("CACHE.WAIT", "products", 99, 10) + encode("DISCARD"),
        encode("HELLO", 3) + encode("SUBSCRIBE", "cache:products") + encode("HGETALL", "products"),
        encode("SUBSCRIBE", "cache:products") + encode("PING") + encode("GET", "products:1") + encode("UNSUBSCRIBE"),
        encode("EXISTS", *["products:1"] * 300),
        encode("GET", b"products:\r\n\x00\xff"),
        encode("HGETALL", "products") * 3,
        b"ECHO \"a\\x41\\n\\\"b\" 'c\\''\r\n",
        b'GET "products:1"\r\n',
        b"*0\r\n*-1\r\n\r\n" + encode("PING"),
        b"*2\r\n$4\r\nECHOxx$1\r\nayy",
    ]
    return [each for each in corpus if not each.startswith((b"CACHE.WAIT", encode("CACHE.WAIT")[4:]))]


class RespTalk(Talk):
    """Each input is followed by RESET and a word to be echoed; a client that receives it is in step again."""

    corpus = _resp_corpus()
    last = (
        encode("QUIT"),
        b"QUIT\r\n",
        encode("PING") + encode("QUIT") + encode("PING"),
        encode("AUTH", "secret"),
        encode("AUTH", "default", "wrong"),
        encode("HELLO", 3, "AUTH", "default", "secret", "SETNAME", "me"),
        encode("HELLO", 3, "AUTH", "default", "wrong"),
        encode("CACHE.WAIT", "products", 99, 100_000),
        encode("MULTI") + encode("CACHE.WAIT", "products", 99, 10) + encode("EXEC"),
        b"POST / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        encode("COMMAND"),
        *[b"*1\r\n+PING\r\n", b"*2\r\n$3\r\nGET\r\n*1\r\n$1\r\na\r\n", b"*1\r\n%1\r\n$1\r\na\r\n$1\r\nb\r\n"],
        *[
            b"*1\r\n>1\r\n$1\r\na\r\n",
            b">1\r\n$4\r\nPING\r\n",
            b"*2\r\n$1\r\naxx~1\r\n:1\r\n",
            b"*2\r\n$1\r\naxx|0\r\n+a\r\n",
        ],
        *[b"~1\r\n$4\r\nPING\r\n", b"|1\r\n$1\r\na\r\n$1\r\nb\r\n", b"*1\r\n=8\r\ntxt:PING\r\n", b"*1\r\n(12\r\n"],
    )
    _may_end = re.compile(rb"post|host:|wait|auth|hello|quit|\\", re.IGNORECASE)

    def __init__(self, secret: str = "") -> None:
        self._auth = encode("AUTH", secret) if secret else b""

    @staticmethod
    def _mark(number: int) -> bytes:
        return b"<in step %d>" % number

    def session(self, inputs: Sequence[Input]) -> bytes:
        parts = [self._auth]
        for number, each in enumerate(inputs):
            parts += [each.data, self._auth, encode("RESET"), self._auth, encode("ECHO", self._mark(number))]
        return b"".join(parts)

    def judge(self, inputs: Sequence[Input], sent: bytes, answer: bytes, was_reset: bool) -> int:
        marks = {self._mark(number): number + 1 for number in range(len(inputs))}
        in_step, refused = 0, False
        reader = hiredis.Reader(notEnoughData=_NOTHING)
        reader.feed(answer)
        while True:
            try:
                reply = reader.gets(False)
            except hiredis.ProtocolError as error:
                raise Wrong(f"what came is no RESP: {error}", in_step) from error
            if reply is _NOTHING:
                break
            if refused:
                raise Wrong("something came after a protocol error", in_step)
            if isinstance(reply, bytes):
                in_step = marks.get(reply, in_step)
            elif isinstance(reply, hiredis.ReplyError):
                refused = str(reply).startswith("ERR Protocol error")
            if b"internal error" in _errors(reply):
                raise Wrong(f"a reply is {reply}", in_step)
        if was_reset:
            if not refused and not self._may_end.search(b"".join(each.data for each in inputs[in_step:])):
                raise Wrong("the connection was reset", in_step)
        elif not _is_between(reader):
            raise Wrong("the last reply has no end", in_step)
        elif in_step < len(inputs) and inputs[in_step].intact:
            raise Wrong("a valid request was not answered in step", in_step)
        return min(len(inputs), in_step + 1)


def _is_between(reader: hiredis.Reader) -> bool:
    """Whether the last reply has come to its end."""
    reader.feed(b"+end\r\n")
    try:
        return bool(reader.gets(False) == b"end" and not reader.has_data())
    except hiredis.ProtocolError:
        return False


def _errors(reply: Any) -> bytes:
    """The errors in a reply, which those of a transaction are within."""
    if isinstance(reply, hiredis.ReplyError):
        return str(reply).encode()
    return b"\n".join(map(_errors, reply)) if isinstance(reply, list) and len(reply) < 50 else b""


# HTTP


def _http(request_line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([request_line, *headers, "", ""]).encode("latin-1") + body


def _http_corpus() -> list[bytes]:
    of = "/v1/datasets/products"
    paths = ["/livez", "/readyz", "/", "/metrics", "/events", "/nothing", "/v1/datasets", "/v1/datasets/empty", of]
    paths += ["/v1/datasets/prices", "/v1/datasets/nope", "/v1/datasets/strict/rows/2?x=1", f"http://a{of}"]
    paths += [f"{of}/rows/1", f"{of}/rows/", f"{of}/rows/a%2Fb%00%C3%A9", f"{of}/status", f"{of}/rows/1?max_age=1e9"]
    paths += [f"{of}?max_age=99999999&max_age=1", f"{of}/why", f"{of}/history", f"{of}/refresh", "/assets/dashboard.js"]
    corpus = [_http(f"GET {path} HTTP/1.1", "Host: a") for path in paths]
    corpus += [_http(f"HEAD {path} HTTP/1.1", "Host: a") for path in paths[::3]]
    whole, row = "GET /v1/datasets/products HTTP/1.1", "GET /v1/datasets/products/rows/1 HTTP/1.1"
    since = "If-Modified-Since: Fri, 02 Jan 2026 03:04:05 GMT"
    corpus += [
        _http(whole, "Host: a", "Accept: application/x-ndjson"),
        _http(whole, "Host: a", "Accept: text/html;q=0.5, application/json;q=0.8, */*;q=0.1", "Accept-Encoding: gzip"),
        _http(whole, "Host: a", "Accept-Encoding: gzip;q=1.0, identity; q=0.5, *;q=0"),
        _http(whole, "Host: a", "Accept: image/png"),
        _http(row, "Host: a", 'If-None-Match: "abc", W/"def"'),
        _http(row, "Host: a", "If-None-Match: *"),
        _http(row, "Host: a", since),
        _http(row, "Host: a", since, "If-None-Match: *", "Accept-Encoding: gzip", "Accept: application/json"),
        _http(row, "Host: [::1]:8080", "User-Agent: x/1.0 (y)", "Cookie: a=b; c=d", "X-Empty:", "Content-Length: 0"),
        _http(row, "Host: a", "X-Folded: a", "\tb", " c"),
        _http(row, "Host: a", "Authorization: Bearer secret"),
        _http(row, "Host: a", "Expect: 100-continue"),
        _http(row, "Host: a", "Connection: keep-alive", "Range: bytes=0-5", "Upgrade: h2c"),
        _http("GET /livez HTTP/1.1", *[f"X-{n}: {n}" for n in range(90)], "Host: a"),
        _http("GET /livez HTTP/1.1", "Host: a") * 4,
        _http("HEAD /livez HTTP/1.1", "Host: a") + _http(row, "Host: a") + _http("POST / HTTP/1.1", "Host: a"),
        *[_http(f"{method} /v1/datasets HTTP/1.1", "Host: a") for method in ("POST", "DELETE", "OPTIONS", "get")],
    ]
    return corpus


class HttpTalk(Talk):
    """Each input is followed by a question for what is not there; its answer names it, and is in step."""

    corpus = _http_corpus()
    last = (
        _http("GET /livez HTTP/1.0"),
        _http("GET /v1/datasets/products HTTP/1.0", "Connection: keep-alive"),
        _http("GET /livez HTTP/1.1", "Host: a", "Connection: close"),
        _http("GET /v1/datasets/products/rows/1?max_age=0.001 HTTP/1.1", "Host: a"),
        _http("GET /v1/datasets/prices?max_age=1 HTTP/1.1", "Host: a"),
        _http("GET /livez HTTP/1.1"),
        _http("GET /v1/datasets/empty HTTP/1.1", "Host: a", "Authorization: Bearer wrong"),
        _http("GET /v1/datasets/empty HTTP/1.1", "Host: a", "Authorization: Basic YTpi"),
        _http("PRI * HTTP/2.0", "", "SM"),
        _http("GET /livez HTTP/1.1", "Host: a", "Content-Length: 5", body=b"hello"),
        _http("POST /livez HTTP/1.1", "Host: a", "Content-Length: 5", body=b"hello"),
        _http("POST /livez HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
        _http("GET /livez HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", body=b"1;x=y\r\na\r\n0\r\nT: x\r\n\r\n"),
        _http("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
        _http("CONNECT a:80 HTTP/1.1", "Host: a:80"),
        _http("OPTIONS * HTTP/1.1", "Host: a"),
    )
    _head = re.compile(rb"HTTP/1\.1 ([2-5]\d\d) [A-Z][A-Za-z \-]*\r\n((?:[A-Za-z\-]+: [ -~\x80-\xff]*\r\n)+)\r\n")

    def session(self, inputs: Sequence[Input]) -> bytes:
        parts = [each.data + _http(f"GET /in-step-{number} HTTP/1.1", "Host: a") for number, each in enumerate(inputs)]
        return b"".join(parts)

    def judge(self, inputs: Sequence[Input], sent: bytes, answer: bytes, was_reset: bool) -> int:
        in_step, position, closes, has_no_end = 0, 0, False, False
        marks = {f"/in-step-{number}": number + 1 for number in range(len(inputs))}
        with_head = b"HEAD" in sent
        while position < len(answer):
            if closes:
                raise Wrong("something came after an answer that closes", in_step)
            head = self._head.match(answer, position)
            if head is None:
                raise Wrong(f"no answer at {answer[position : position + 200]!r}", in_step)
            status = int(head[1])
            headers = dict(line.split(b": ", 1) for line in head[2].lower().splitlines())
            closes = headers.get(b"connection") == b"close"
            has_no_end = headers.get(b"content-type") == b"text/event-stream"
            position = head.end()
            if status == 500:
                raise Wrong("an internal error", in_step)
            if with_head and (position == len(answer) or answer.startswith(b"HTTP/1.1 ", position)):
                continue  # no body of this service begins so
            body, position = _body(status, headers, answer, position, in_step)
            if status >= 400 and headers[b"content-type"] == b"application/problem+json":
                problem = json.loads(body)
                if problem["status"] != status:
                    raise Wrong("a problem of another status", in_step)
                if status == 404:
                    in_step = marks.get(problem.get("instance"), in_step)
        if was_reset:
            raise Wrong("the connection was reset", in_step)
        if in_step < len(inputs) and inputs[in_step].intact and not has_no_end:  # events go on until we close
            raise Wrong("a valid request was not answered in step", in_step)
        return min(len(inputs), in_step + 1)


def _body(status: int, headers: dict[bytes, bytes], answer: bytes, position: int, in_step: int) -> tuple[bytes, int]:
    """What follows a head, and where it ends."""
    if status == 304:
        return b"", position
    length = headers.get(b"content-length")
    if length is not None:
        end = position + int(length)
        if end > len(answer):
            raise Wrong("a body is shorter than its length", in_step)
        return answer[position:end], end
    if headers.get(b"transfer-encoding") != b"chunked":
        if headers.get(b"connection") != b"close":
            raise Wrong("a body without an end", in_step)
        return answer[position:], len(answer)
    parts = []
    while True:
        size, crlf, _ = answer[position : position + 20].partition(b"\r\n")
        start = position + len(size) + 2
        if not crlf or not re.fullmatch(rb"[0-9a-f]+", size) or answer[start + int(size, 16) :][:2] != b"\r\n":
            raise Wrong("a chunk is malformed", in_step)
        position = start + int(size, 16) + 2
        if not int(size, 16):
            return b"".join(parts), position
        parts.append(answer[start : position - 2])


# Status


class StatusTalk(Talk):
    """The reply to a line is known exactly: `replies` to each command, and ERROR to everything else."""

    most_inputs = 6
    last = (b"quit\n", b"ruok\r\n", b"ruok; ready; version\n", b"status;;quit; ruok\n", b"nope\n", b"refresh all\n")

    def __init__(self, replies: dict[str, str]) -> None:
        self._replies = {command: re.compile(re.escape(f"{reply}\n")) for command, reply in replies.items()}
        # It reports how many clients are connected.
        self._replies["mntr"] = re.compile(re.sub(r"\d+", r"\\d+", re.escape(replies["mntr"])) + "\n")
        self._error = re.compile("ERROR [^\n]+\n")
        lines = [
            *replies,
            "show nope",
            "why",
            "ruok ruok",
            "nope",
            "refresh products",
            "ruok;ready ; version",
            ";",
            "PING",
        ]
        lines += ["prompt; ruok", "ruok; show products; nope; json", "a" * 256, "é" * 100]
        self.corpus = [line.encode() + ending for line in lines for ending in (b"\n", b"\r\n")]
        self.corpus += [
            b"prompt\n",
            b"prompt\nruok\n\nstatus\n",
            b"ruok\nready\nversion\n",
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        ]

    def session(self, inputs: Sequence[Input]) -> bytes:
        """Half of them keep the connection open."""
        sent = b"".join(each.data for each in inputs)
        return b"prompt\n" + sent if len(sent) % 2 else sent

    def judge(self, inputs: Sequence[Input], sent: bytes, answer: bytes, was_reset: bool) -> int:
        wanted, heard_bytes = self._expected(sent)
        ends = [len(sent) - sum(len(each.data) for each in inputs)]
        for each in inputs:
            ends.append(ends[-1] + len(each.data))
        heard = max(1, sum(end < heard_bytes for end in ends[:-1]))
        try:
            text = answer.decode()
        except UnicodeDecodeError as error:
            raise Wrong(f"what came is no text: {error}", heard - 1) from error
        position = 0
        for pattern in wanted:
            found = pattern.match(text, position)
            if found is None:
                raise Wrong(f"not {pattern.pattern[:200]!r} but {text[position : position + 200]!r}", heard - 1)
            if pattern is self._error and not found[0][:-1].isprintable():
                raise Wrong(f"an error with control characters: {found[0]!r}", heard - 1)
            position = found.end()
        if position < len(text):
            raise Wrong(f"more than was asked for: {text[position : position + 200]!r}", heard - 1)
        if was_reset:
            raise Wrong("the connection was reset", heard - 1)
        return heard

    def _expected(self, sent: bytes) -> tuple[list[re.Pattern[str]], int]:
        """What has to come, and how much of what was received is checked."""
        wanted: list[re.Pattern[str]] = []
        prompting, position = False, 0

        def expect(pattern: re.Pattern[str] | None) -> None:
            wanted.extend([pattern] if pattern else [])
            wanted.extend([_EMPTY_LINE] if prompting else [])

        while position < len(sent):
            end = sent.find(b"\n", position)
            end = len(sent) if end < 0 else end
            line = sent[position:end]
            position = end + 1
            if len(line) > MAX_LINE_BYTES + 1 or len(line.removesuffix(b"\r")) > MAX_LINE_BYTES:
                expect(self._error)
                break
            commands = [part.strip() for part in line.removesuffix(b"\r").decode("utf-8", "replace").split(";")]
            for command in filter(None, commands):
                if command == "quit":
                    return wanted, position
                if command == "prompt":
                    prompting = True
                    expect(None)
                else:
                    expect(self._replies.get(" ".join(command.split()), self._error))
            if not any(commands):
                expect(self._error)
            if not prompting:
                break
        return wanted, position


_EMPTY_LINE = re.compile("\n")


# The attack


@dataclass
class Orders:
    kind: str
    port: int
    seed: str
    inputs: int
    secret: str = ""
    replies: dict[str, str] = field(default_factory=dict)

    def talk(self) -> Talk:
        if self.kind == "status":
            return StatusTalk(self.replies)
        return RespTalk(self.secret) if self.kind == "resp" else HttpTalk()


@dataclass
class Found:
    inputs: int = 0
    connections: int = 0
    failures: list[str] = field(default_factory=list)


class Session:
    """One connection, on which a few inputs are sent."""

    def __init__(self, talk: Talk, port: int, group: Group) -> None:
        self.talk = talk
        self.inputs = group.inputs
        self.sent = talk.session(self.inputs)
        self.answer: list[bytes] = []
        self.was_reset = False
        self.dropped = group.dropped
        cuts = [int(cut * len(self.sent)) for cut in group.cuts]
        self._left = [self.sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(self.sent)], strict=True)]
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)
        if cuts:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if group.aborted:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def send(self) -> bool:
        """Send the next piece; True once all have been sent."""
        try:
            piece = self._left[0]
            sent = self.socket.send(piece) if piece else 0
            if sent < len(piece):
                self._left[0] = piece[sent:]
                return False
            del self._left[0]
            if self._left:
                return False
            if not self.dropped:
                self.socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return False
        except OSError:
            self._left.clear()  # what was sent before is still to be read
        return True

    def receive(self) -> bool:
        """Read what is there; True at the end."""
        try:
            while part := self.socket.recv(262_144):
                self.answer.append(part)
        except BlockingIOError:
            return False
        except ConnectionError:
            self.was_reset = True
        return True

    def judge(self) -> int:
        """:raises Wrong: if what came is not what may come."""
        return self.talk.judge(self.inputs, self.sent, b"".join(self.answer), self.was_reset)

    def report(self, why: Wrong) -> str:
        where = self.inputs[min(why.number, len(self.inputs) - 1)].data
        shown = [f"{why}, at the input {_shown(where)}", f"in {_shown(self.sent)}"]
        return ", ".join([*shown, f"which was answered {_shown(b''.join(self.answer))}"])


def _shown(data: bytes) -> str:
    more = len(data) - MAX_SHOWN_BYTES
    return repr(data[:MAX_SHOWN_BYTES]) + (f" and {more} bytes more" if more > 0 else "")


def attack(orders: Orders) -> Found:
    talk = orders.talk()
    coming = groups_of(talk, orders.seed)
    found = Found()
    again: deque[Group] = deque()
    drawn = 0
    reading: dict[int, Session] = {}
    sending: list[Session] = []
    poll = select.epoll()

    def done(session: Session) -> None:
        session.socket.close()
        found.connections += 1
        heard = len(session.inputs)
        if not session.dropped:
            try:
                heard = session.judge()
            except Wrong as why:
                found.failures.append(session.report(why))
        found.inputs += heard
        if heard < len(session.inputs):
            again.append(Group(session.inputs[heard:]))

    while len(found.failures) < MOST_FAILURES:
        while len(reading) + len(sending) < CONNECTIONS and (again or drawn < orders.inputs):
            if not again:
                again.append(next(coming))
                drawn += len(again[0].inputs)
            sending.append(Session(talk, orders.port, again.popleft()))
        if not (reading or sending):
            break
        for session in list(sending):
            if not session.send():
                session.receive()
                continue
            sending.remove(session)
            if session.dropped:
                done(session)
            else:
                reading[session.socket.fileno()] = session
                poll.register(session.socket, select.EPOLLIN)
        events = poll.poll(0 if sending or not reading else GIVE_UP_S)
        if reading and not (events or sending):
            hung = next(iter(reading.values()))
            found.failures.append(hung.report(Wrong(f"no end came within {GIVE_UP_S:g} s")))
            break
        for descriptor, _ in events:
            if reading[descriptor].receive():
                poll.unregister(descriptor)
                done(reading.pop(descriptor))
    return found


def exchange(talk: Talk, port: int, inputs: Sequence[Input], cuts: Sequence[float] = ()) -> None:
    """One session by a blocking client, cut at the given places.

    :raises AssertionError: if the answer breaks a law.
    """
    session = Session(talk, port, Group(inputs, sorted(cuts)))
    session.socket.settimeout(GIVE_UP_S)
    with session.socket:
        while not session.send():
            """On to the next piece."""
        session.receive()
    try:
        session.judge()
    except Wrong as why:
        raise AssertionError(session.report(why)) from why


def main() -> None:
    orders = Orders(**json.load(sys.stdin))
    json.dump(asdict(attack(orders)), sys.stdout)


if __name__ == "__main__":
    main()
