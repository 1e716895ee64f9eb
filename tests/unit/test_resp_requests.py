"""Laws of the parser of Redis requests: what a client means does not depend on how the network cuts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.resp import requests
from cacheservice.ports.resp.requests import ProtocolViolation, RequestParser, split_arguments

Command = list[bytes]

# Bytes that mean something to the protocol, so that they are often where they could be taken for it.
tricky = st.sampled_from(
    [b"\r\n*", b"*", b"$", b"\r\n", b"\r", b"*1\r\n$4\r\nPING\r\n", b"\n+", b"~1\r\n", b"", b"=", b"\x00", b"\xff"]
)
words = st.one_of(
    st.binary(max_size=20), st.lists(tricky, max_size=4).map(b"".join), st.sampled_from([b"GET", b"x" * 5000])
)
commands = st.lists(words, min_size=1, max_size=5)
inline_words = st.binary(min_size=1, max_size=8)
GARBAGE = [
    b"*1\r\n+PING\r\n",
    b"*1\r\n:5\r\n",
    b"*2\r\n$3\r\nGET\r\n*1\r\n$1\r\na\r\n",
    b"*01\r\n$4\r\nPING\r\n",
    b"*1\r\n$04\r\nPING\r\n",
    b"*1\r\n$-1\r\n",
    b"*1\r\n$4294967296\r\n",
    b"*3000000000\r\n",
    b"*1000000000\r\n$1\r\na\r\n",
    b"*\r\n",
    b"*x\r\n",
    b"*1\r\n=8\r\ntxt:PING\r\n",
    # Behind a word that does not end with CRLF, which neither hiredis nor Redis looks at.
    b"*2\r\n$1\r\naxx+b\r\n",
    b"*2\r\n$1\r\naxx(1\r\n",
    b"*1\r\n$1\r\naxx#f\r\n",
    b"*2\r\n$1\r\naxx|1\r\n$1\r\na\r\n$1\r\nb\r\n",
    b"*1\r\n>1\r\n$1\r\na\r\n",
    b"#f\r\n",
    b"*1\r\n(12\r\n",
    b"~1\r\n$4\r\nPING\r\n",
    b"|1\r\n$1\r\na\r\n$1\r\nb\r\n",
    b">1\r\n$4\r\nPING\r\n",
    b"*1\r\n%1\r\n$1\r\na\r\n$1\r\nb\r\n",
    b"*1\r\n%1\r\n*1\r\n$1\r\na\r\n$1\r\nb\r\n",
    b"*1\r\n%1\r\n*1\r\n$1\r\na\r\n",
    b"GET 'a\r\n",
    b'GET "a"b\r\n',
    b"*-1\r\n",
    b"*0\r\n",
    b"\r\n",
    b"  \n",
    b"PING\n",
    b"SET \"\\x41\\n\" '\\''\r\n",
    b"+\r\n",
]


def as_array(command: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(command) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in command)


def as_inline(command: Sequence[bytes]) -> bytes:
    """Every byte by its number, so that any word can be written."""
    return b" ".join(b'"%b"' % b"".join(b"\\x%02x" % byte for byte in word) for word in command) + b"\r\n"


@st.composite
def pieces_of(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    """Bytes, cut at any places."""
    whole = draw(data)
    cuts = sorted(draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    ends = [*cuts, len(whole)]
    return [whole[start:end] for start, end in zip([0, *cuts], ends, strict=True) if start < end]


def parse(pieces: Sequence[bytes], most: int = 512, *, authenticated: bool = True) -> tuple[list[Command], str | None]:
    """All commands, and the violation that ended them, if one did."""
    parser = RequestParser()
    parser.authenticated = authenticated
    parsed: list[Command] = []
    try:
        for piece in pieces:
            parser.feed(piece)
            while True:
                taken = parser.take(most)
                assert len(taken) <= most
                parsed += taken
                if parser.exhausted:
                    break
    except ProtocolViolation as violation:
        return parsed, str(violation)
    return parsed, None


class Laws(SynchronousTestCase):
    @given(st.data(), st.integers(1, 20))
    def test_what_went_in_comes_out(self, data: st.DataObject, most: int) -> None:
        """Commands written as arrays and inline, one after the other and cut anywhere, come out as they went in."""
        sent = data.draw(st.lists(commands, max_size=12))
        written = [as_array(c) if data.draw(st.booleans()) else as_inline(c) for c in sent]
        pieces = data.draw(pieces_of(st.just(b"".join(written))))
        self.assertEqual(parse(pieces, most), (sent, None))

    @given(st.lists(st.one_of(commands.map(as_array), st.sampled_from(GARBAGE)), max_size=8).map(b"".join), st.data())
    def test_cuts_do_not_matter(self, data: bytes, draw: st.DataObject) -> None:
        """Good and malformed requests result in the same commands and the same violation, whole or in pieces."""
        pieces = draw.draw(pieces_of(st.just(data)))
        whole = parse([data]) if data else ([], None)
        self.assertEqual(parse(pieces), whole)
        self.assertEqual(parse(pieces, 1), whole)
        if len(data) < 1000:
            self.assertEqual(parse([data[i : i + 1] for i in range(len(data))]), whole)

    @given(st.lists(st.one_of(commands.map(as_array), st.sampled_from(GARBAGE)), max_size=8).map(b"".join), st.data())
    def test_cuts_do_not_matter_before_auth(self, data: bytes, draw: st.DataObject) -> None:
        """Nor do they before AUTH."""
        pieces = draw.draw(pieces_of(st.just(data)))
        whole = parse([data], authenticated=False) if data else ([], None)
        self.assertEqual(parse(pieces, authenticated=False), whole)

    def test_end_of_a_word(self) -> None:
        """The two bytes after a word are skipped, whatever they are, as by Redis."""
        self.assertEqual(parse([b"*2\r\n$4\r\nPINGxx$1\r\nayy" * 2]), ([[b"PING", b"a"]] * 2, None))

    @given(pieces_of(st.binary(max_size=60)))
    def test_any_bytes(self, pieces: list[bytes]) -> None:
        """Any bytes at all are commands, a violation, or the beginning of a request."""
        parsed, _ = parse(pieces)
        for command in parsed:
            self.assertTrue(command and all(type(word) is bytes for word in command))

    @given(st.lists(st.lists(inline_words, min_size=1, max_size=4), max_size=6))
    def test_inline(self, sent: list[Command]) -> None:
        """Words of an inline command are what stands between its quotes."""
        lines = [as_inline(command).removesuffix(b"\r\n") for command in sent]
        self.assertEqual([split_arguments(line) for line in lines], sent)

    @given(st.binary(max_size=30))
    def test_split_arguments_ends(self, line: bytes) -> None:
        """Any line is words or quotes that do not close, and a line without quotes is split at blanks."""
        try:
            found = split_arguments(line)
        except ProtocolViolation:
            self.assertTrue(b'"' in line or b"'" in line)
            return
        if b'"' not in line and b"'" not in line:
            self.assertEqual(found, line.split())


class Arguments(SynchronousTestCase):
    def test_quotes(self) -> None:
        """Quotes and escapes are those of redis-cli."""
        for line, expected in (
            (b"", []),
            (b" \t ", []),
            (b"GET  a\t b", [b"GET", b"a", b"b"]),
            (b'"a b" c', [b"a b", b"c"]),
            (b'"\\x41\\n\\r\\t\\b\\a\\q\\""', [b'A\n\r\t\b\aq"']),
            (b'"\\xZZ"', [b"xZZ"]),
            (b"'a\\nb'", [b"a\\nb"]),
            (b"'it\\'s'", [b"it's"]),
            (b"''", [b""]),
            (b"a''", [b"a"]),
            (b'a"b"', [b"ab"]),
        ):
            self.assertEqual(split_arguments(line), expected, line)

    def test_unbalanced(self) -> None:
        """Quotes that are not closed, or are not followed by a blank, are a violation."""
        for line in (b'"', b"'", b'GET "a', b"GET 'a", b'"a"b', b"'a'b", b'"a\\', b'"a\\"'):
            with self.assertRaisesRegex(ProtocolViolation, "unbalanced quotes"):
                split_arguments(line)


class Limits(SynchronousTestCase):
    def violation(self, *pieces: bytes, authenticated: bool = True) -> str:
        parsed, violation = parse(pieces, authenticated=authenticated)
        self.assertEqual(parsed, [])
        assert violation is not None
        return violation

    def test_malformed(self) -> None:
        """Each malformed request is reported in Redis's words, as soon as it is known to be one."""
        for data, words in (
            (b"*3000000000\r\n", "invalid multibulk length"),
            (b"*1000000000\r\n", "invalid multibulk length"),
            (b"*1000000\r\n", "invalid multibulk length"),
            (b"*99999999999999999999\r\n", "invalid multibulk length"),
            (b"*+1\r\n", "invalid multibulk length"),
            (b"*1\r\n$-1\r\n", "invalid bulk length"),
            (b"*1\r\n$536870913\r\n", "invalid bulk length"),
            (b"*1\r\n$x\r\n", "invalid bulk length"),
            (b"*2\r\n:1\r\n", "expected '$', got ':'"),
            (b"*2\r\n$3\r\nGET\r\n+OK\r\n", "expected '$', got '+'"),
            (b"*2\r\n*1\r\n", "expected '$', got '*'"),
            (b"'\r\n", "unbalanced quotes in request"),
        ):
            self.assertEqual(self.violation(data), f"Protocol error: {words}")

    def test_violation_is_told_again(self) -> None:
        """After a violation there is nothing but that violation, however often one asks."""
        parser = RequestParser()
        parser.feed(as_array([b"PING"]) + b"*x\r\n" + as_array([b"PING"]))
        self.assertEqual(parser.take(10), [[b"PING"]])
        for _ in range(3):
            with self.assertRaises(ProtocolViolation):
                parser.take(10)

    def test_lines_without_end(self) -> None:
        """A line of more than 64 KiB is refused, whatever kind it is of, however it comes."""
        for begin, words in (
            (b"x", "too big inline request"),
            (b"*", "too big mbulk count string"),
            (b"*1\r\n$", "too big bulk count string"),
        ):
            line = begin + b"1" * (64 * 1024 + 1)
            self.assertEqual(self.violation(line), f"Protocol error: {words}")
            self.assertEqual(
                self.violation(*(line[i : i + 1000] for i in range(0, len(line), 1000))), f"Protocol error: {words}"
            )

    def test_before_auth(self) -> None:
        """Before AUTH a command has at most 10 words of at most 16 KiB; after it, more."""
        self.assertEqual(parse([as_array([b"a"] * 10)], authenticated=False)[1], None)
        self.assertEqual(parse([as_array([b"a" * 16_384])], authenticated=False)[1], None)
        self.assertEqual(
            self.violation(b"*11\r\n", authenticated=False), "Protocol error: unauthenticated multibulk length"
        )
        self.assertEqual(
            self.violation(b"*1\r\n$16385\r\n", authenticated=False), "Protocol error: unauthenticated bulk length"
        )

    def test_after_auth_in_the_same_write(self) -> None:
        """What follows AUTH is taken by the limits that hold after it, though it came with it."""
        parser = RequestParser()
        parser.authenticated = False
        many = [b"MGET", *[b"a"] * 50]
        parser.feed(as_array([b"AUTH", b"x"]) + as_array(many) * 2)
        self.assertEqual(parser.take(512), [[b"AUTH", b"x"]])
        self.assertFalse(parser.exhausted)
        parser.authenticated = True
        self.assertEqual(parser.take(512), [many, many])
        # What follows a failed one is not.
        parser = RequestParser()
        parser.authenticated = False
        parser.feed(as_array([b"AUTH", b"x"]) + as_array(many))
        self.assertEqual(parser.take(512), [[b"AUTH", b"x"]])
        with self.assertRaises(ProtocolViolation):
            parser.take(512)

    def test_request_without_end(self) -> None:
        """A request that does not end is refused at 64 MiB, as one argument or as many."""
        for begin, piece in ((b"*2\r\n$400000000\r\n", b"x" * 2**20), (b"*999999\r\n", as_array([b"x" * 2**20])[4:])):
            parser = RequestParser()
            parser.feed(begin)
            with self.assertRaisesRegex(ProtocolViolation, "too big request"):
                for _ in range(70):
                    parser.feed(piece)
                    self.assertEqual(parser.take(512), [])

    def test_large_but_fair(self) -> None:
        """A command of 200,000 words and one with a word of 10 MB are commands, in pieces of a socket's size."""
        for command in (
            [b"MGET", *(b"products:%d" % number for number in range(200_000))],
            [b"SET", b"a", b"\r\n*1" * 2_500_000],
        ):
            data = as_array(command)
            pieces = [data[start : start + 65_536] for start in range(0, len(data), 65_536)]
            self.assertEqual(parse(pieces), ([command], None))


class TwoWords(SynchronousTestCase):
    def test_short_cut(self) -> None:
        """The short cut for two words takes only what is exactly that."""
        self.assertEqual(requests._two_words(as_array([b"GET", b"a"])), [b"GET", b"a"])
        for data in (
            as_array([b"GET", b"a"]) * 2,
            as_array([b"GET", b"a\r\nb"]),
            as_array([b"GET"]),
            as_array([b"GET", b"a" * 2000]),
            b"*2\r\n$03\r\nGET\r\n$1\r\na\r\n",
            b"*2\r\n$4\r\nGET\r\n$1\r\na\r\n",
            b"*2\r\n$3\r\nGET\r\n$2\r\na\r\n",
            b"*3\r\n$3\r\nGET\r\n$1\r\na\r\n",
            b"*2\r\n$3\r\nGET\r\n$1\r\na",
            b"*2\r\n$3\r\nGET\r\n$1\r\na\r\nPING",
        ):
            self.assertIsNone(requests._two_words(data), data)

    def sizes(self) -> Iterator[int]:
        yield from (0, 1, 9, 10, 99, 100, 999, 1000, 1023, 1024, 1025, 4096)

    def test_sizes(self) -> None:
        """Words of any length come out whole, at the lengths where something changes too."""
        for size in self.sizes():
            for other in self.sizes():
                command = [b"a" * size, b"b" * other]
                self.assertEqual(parse([as_array(command)]), ([command], None))
