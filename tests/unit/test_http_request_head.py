"""Laws of the parser of HTTP request heads, on bytes alone."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.http.request_head import MAX_HEAD_BYTES, MAX_HEADERS, Head, HeadParser, Refusal, State

GET = b"GET /livez HTTP/1.1\r\n"
WHOLE = GET + b"Host: a\r\n\r\n"

Result = tuple[bytes, bytes, bool, bool, dict[bytes, bytes]] | Refusal


def results_of(*pieces: bytes) -> list[Result]:
    """Parse all heads in bytes that arrive in these pieces."""
    parser, results = HeadParser(), list[Result]()
    for piece in pieces:
        parser.receive(piece)
        while (parsed := parser.next()) is not None:
            results.append(as_result(parsed))
    return results


def as_result(parsed: Head | Refusal) -> Result:
    if isinstance(parsed, Refusal):
        return parsed
    return parsed.method, parsed.target, parsed.is_1_0, parsed.persistent, parsed.headers


def status_of(*pieces: bytes) -> int:
    (refusal,) = results_of(*pieces)
    assert isinstance(refusal, Refusal), refusal
    return refusal.status


lines = st.sampled_from(
    [
        b"GET /livez HTTP/1.1",
        b"HEAD /v1/datasets/products?max_age=1 HTTP/1.0",
        b"POST http://a/ HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"Host: a",
        b"Host: [::1]:80",
        b"host:",
        b"X: a, b",
        b"X:",
        b" folded\t",
        b"\t",
        b"",
        b"",
        b"Connection: keep-alive, close",
        b"Content-Length: 0",
        b"Content-Length: 7",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
        b"\x16\x03\x01",
        b"X: " + b"x" * 5000,
        b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1",
    ]
)
ends = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b""])
heads = st.lists(
    st.tuples(lines, ends).map(b"".join) | st.sampled_from([WHOLE, GET]) | st.binary(max_size=4), max_size=12
).map(b"".join)


class Pieces(SynchronousTestCase):
    @given(heads, st.lists(st.integers(0, 400), max_size=8), st.data())
    @example(b"X" * MAX_HEAD_BYTES + b"\r\r\n", [], None)
    def test_the_result_does_not_depend_on_the_pieces(
        self, data: bytes, cuts: list[int], draw: st.DataObject | None
    ) -> None:
        """Heads and refusals are the same however the bytes are cut: whole, in pieces, or byte by byte."""
        anywhere = [] if draw is None else draw.draw(st.lists(st.integers(0, len(data)), max_size=4))
        places = sorted({0, len(data), *anywhere, *(cut for cut in cuts if cut < len(data))})
        pieces = [data[start:end] for start, end in pairwise(places)]
        whole = results_of(data)
        self.assertEqual(results_of(*pieces), whole)
        if len(data) < 3000:
            self.assertEqual(results_of(*(data[at : at + 1] for at in range(len(data)))), whole)

    def test_each_place_of_a_cut(self) -> None:
        """So it is at each byte of pipelined heads, and around the greatest length of a line."""
        data = b"\r\n" + WHOLE + b"HEAD / HTTP/1.0\r\nX: a,\r\n b\r\n\r\n" + WHOLE + b"GET /\n"
        whole = results_of(data)
        self.assertEqual(len(whole), 4)
        for cut in range(len(data)):
            self.assertEqual(results_of(data[:cut], data[cut:]), whole)
        for length in range(MAX_HEAD_BYTES - 3, MAX_HEAD_BYTES + 4):
            for end in (b"\r\n", b"\n", b"\r\r\n", b"\r"):
                for start in (b"GET /", GET + b"X: "):
                    data = start.ljust(length, b"x") + end
                    whole = results_of(data)
                    for cut in range(length - 2, len(data)):
                        self.assertEqual(results_of(data[:cut], data[cut:]), whole, (length, end))
                    self.assertEqual(
                        results_of(data[: length - 2], *(data[at : at + 1] for at in range(length - 2, len(data)))),
                        whole,
                    )

    def test_a_refusal_does_not_wait(self) -> None:
        """Bytes are refused with the first one that no continuation could make valid."""
        for data, status in (
            (b"\x16\x03", 400),
            (b"\n", 400),
            (GET + b"Host: a\n", 400),
            (b"GET  /livez HTTP/1.1\r\n", 400),
            (GET + b" X", 0),
            (GET + b" X\r\n", 400),
            (GET + b"X: \x00\r\n", 400),
            (GET + b"Host: a\r\nHost: b\r\n", 400),
            (b"x" * (MAX_HEAD_BYTES + 1), 414),
            (GET + b"X:".ljust(MAX_HEAD_BYTES + 1 - len(GET.rstrip()), b"x"), 431),
        ):
            self.assertEqual(results_of(data[:-1]), [], data[:40])
            if status:
                self.assertEqual(status_of(data), status, data[:40])


class Heads(SynchronousTestCase):
    def test_a_head(self) -> None:
        """Names are in lower case, values without blanks around them, lists joined, and folded lines are one value."""
        data = b"GET /a?b HTTP/1.1\r\nHOST:\t a \r\nx: 1\r\nX:2 ,\r\n \t 3 \r\nEmpty:\r\n\r\n"
        headers = {b"host": b"a", b"x": b"1, 2 , 3", b"empty": b""}
        self.assertEqual(results_of(data), [(b"GET", b"/a?b", False, True, headers)])

    def test_one_at_a_time(self) -> None:
        """A call returns one head; the bytes behind it wait."""
        parser = HeadParser()
        parser.receive(WHOLE * 2 + b"GET /")
        for left_bytes in (len(WHOLE) + 5, 5):
            self.assertIsInstance(parser.next(), Head)
            self.assertEqual(parser.waiting_bytes, left_bytes)
        self.assertIsNone(parser.next())

    def test_states(self) -> None:
        """The states follow the table in the module; a head begins with its first byte, not with an empty line."""
        parser = HeadParser()
        for data, state, is_in_head, method in (
            (b"", State.BETWEEN, False, b""),
            (b"\r\n", State.SKIPPED, False, b""),
            (b"HE", State.SKIPPED, True, b""),
            (b"AD / HTTP/1.1\r\n", State.HEADERS, True, b"HEAD"),
            (b"Host: a\r\n", State.HEADERS, True, b"HEAD"),
            (b"\r\n", State.BETWEEN, False, b""),
            (b"HEAD / HTTP/1.1\r\n\r\n", State.REFUSED, False, b"HEAD"),
            (WHOLE, State.REFUSED, False, b"HEAD"),
        ):
            parser.receive(data)
            parser.next()
            self.assertEqual((parser.state, parser.is_in_head, parser.method), (state, is_in_head, method), data)
        self.assertEqual(parser.waiting_bytes, 0)

    def test_closed(self) -> None:
        """A closed parser keeps no bytes and returns nothing."""
        parser = HeadParser()
        parser.receive(WHOLE)
        parser.close()
        parser.receive(WHOLE)
        self.assertIsNone(parser.next())
        self.assertEqual((parser.waiting_bytes, parser.is_in_head), (0, False))

    def test_persistence(self) -> None:
        """RFC 9112, 9.3: HTTP/1.1 persists unless it asks for the end; HTTP/1.0 and an announced body end it."""
        for head, persistent in (
            (WHOLE, True),
            (GET + b"Host: a\r\nConnection: keep-alive\r\n\r\n", True),
            (GET + b"Host: a\r\nConnection: x, Close \r\n\r\n", False),
            (GET + b"Host: a\r\nConnection: x\r\nConnection: close\r\n\r\n", False),
            (GET + b"Host: a\r\nContent-Length: 00\r\n\r\n", True),
            (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", False),
            (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n", False),
            (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n", False),
        ):
            (result,) = results_of(head)
            self.assertFalse(isinstance(result, Refusal), head)
            self.assertEqual(result[3], persistent, head)


class Refusals(SynchronousTestCase):
    def test_the_most_headers(self) -> None:
        """A head may have 100 headers, and no more, even of the same name."""
        host = GET + b"Host: a\r\n"
        (result,) = results_of(host + b"X: x\r\n" * (MAX_HEADERS - 1) + b"\r\n")
        self.assertFalse(isinstance(result, Refusal))
        self.assertEqual(status_of(host + b"X: x\r\n" * MAX_HEADERS), 431)

    def test_the_longest_head(self) -> None:
        """A request line that is too long is 414, a head that is 431; a head of the greatest length is parsed."""
        start = GET + b"Host: a\r\n"
        longest = MAX_HEAD_BYTES - len(start.replace(b"\r\n", b""))
        (result,) = results_of(start + b"X:".ljust(longest, b"x") + b"\r\n\r\n")
        self.assertFalse(isinstance(result, Refusal))
        self.assertEqual(status_of(start + b"X:".ljust(longest + 1, b"x") + b"\r\n\r\n"), 431)
        self.assertEqual(status_of(b"GET /".ljust(MAX_HEAD_BYTES, b"x") + b" HTTP/1.1\r\n"), 414)

    def test_the_end_of_lines(self) -> None:
        """LF alone, and TLS, are refused with a reason that helps; an announced body may contain anything."""
        for data in (b"GET / HTTP/1.1\nHost: a\n\n", GET + b"X: a\nY: b\r\n\r\n", b"\r\n\n"):
            (refusal,) = results_of(data)
            assert isinstance(refusal, Refusal)
            self.assertIn("LF alone", refusal.detail)
        (refusal,) = results_of(b"\x16\x03\x01\x00\xc8\r\n\n")
        assert isinstance(refusal, Refusal)
        self.assertIn("without TLS", refusal.detail)
        parser = HeadParser()
        parser.receive(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n\na\nb")
        self.assertIsInstance(parser.next(), Head)

    def test_invalid_heads(self) -> None:
        """Each is refused with the status that RFC 9112 names."""
        host = GET + b"Host: a\r\n"
        for data, status in (
            (GET + b"\r\n", 400),
            (GET + b"Host: a b\r\n\r\n", 400),
            (GET + b"Host: a/b\r\n\r\n", 400),
            (GET + b"Host: u@a\r\n\r\n", 400),
            (GET + b"Host : a\r\n\r\n", 400),
            (GET + b" Host: a\r\n\r\n", 400),
            (host + b"X\r\n\r\n", 400),
            (host + b": x\r\n\r\n", 400),
            (host + b"X: a\r\n \x7f\r\n\r\n", 400),
            (host + b"X: a\rY: b\r\n\r\n", 400),
            (host + b"Authorization: a\r\nauthorization: b\r\n\r\n", 400),
            (host + b"Content-Length: x\r\n\r\n", 400),
            (host + b"Content-Length: +0\r\n\r\n", 400),
            (host + b"Content-Length:\r\n\r\n", 400),
            (host + b"Content-Length: 1\r\n 2\r\n\r\n", 400),
            (host + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (host + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
            (host + b"Content-Length: 5\r\n\r\n", 413),
            (host + b"Transfer-Encoding: chunked\r\n\r\n", 413),
            (host + b"Expect: the unexpected\r\n\r\n", 417),
            (b"GET /livez\r\n\r\n", 400),
            (b"GET /livez HTTP/2.0\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez http/1.1\r\nHost: a\r\n\r\n", 400),
            (b"G@T /livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"GET /li\tvez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"\r\n\r\n" + WHOLE, 400),
        ):
            self.assertEqual(status_of(data + WHOLE), status, data)
