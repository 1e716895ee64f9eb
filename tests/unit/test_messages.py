"""Laws of the messages of a link as bytes."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheservice.replication.messages import (
    MAX_PAYLOAD_BYTES,
    BadMessage,
    Call,
    Event,
    Frames,
    Message,
    MessageTooLarge,
    Reader,
    Reply,
    encode,
)

INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
TEXT = st.text(st.characters(exclude_categories=()))
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)
FIELDS = st.dictionaries(TEXT, PLAIN, max_size=4)
MESSAGES = st.one_of(
    st.builds(Frames, st.binary()),
    st.builds(Event, TEXT, FIELDS),
    st.builds(Call, st.integers(0, 1 << 40), TEXT, FIELDS),
    st.builds(Reply, st.integers(0, 1 << 40), st.just(True), PLAIN),
    st.builds(Reply, st.integers(0, 1 << 40), st.just(False), TEXT),
)


@given(st.lists(MESSAGES, max_size=6), st.lists(st.integers(0, 400), max_size=8))
def test_any_cut(messages: list[Message], cuts: list[int]) -> None:
    """However a stream is cut into pieces, the messages that were encoded are found in it."""
    stream = b"".join(map(encode, messages))
    places = [0, *sorted(cuts), len(stream)]
    reader = Reader()
    found: list[Message] = []
    for start, end in pairwise(places):
        found += reader.feed(stream[start:end])
    assert found == messages
    assert [type(each) for each in found] == [type(each) for each in messages]


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Bytes of another protocol are refused, or are the beginning of a message."""
    with suppress(BadMessage):
        Reader().feed(data)


def head(kind: bytes, length: int) -> bytes:
    return kind + length.to_bytes(4, "big")


def of(kind: bytes, content: object) -> bytes:
    payload = msgpack.packb(content)
    return head(kind, len(payload)) + payload


@pytest.mark.parametrize(
    "data",
    [
        head(b"X", 0),
        head(b"F", MAX_PAYLOAD_BYTES + 1),
        head(b"E", 1) + b"\xc1",
        of(b"E", ["name"]),
        of(b"E", {"name": {}}),
        of(b"E", [1, {}]),
        of(b"E", ["name", []]),
        of(b"E", ["name", {b"field": 1}]),
        of(b"C", ["1", "name", {}]),
        of(b"C", [True, "name", {}]),
        of(b"R", [1, 1, "value"]),
        of(b"R", [1, False, None]),
    ],
)
def test_bad_messages(data: bytes) -> None:
    """A message that breaks a rule is refused, and a length that is too long before its payload has come."""
    with pytest.raises(BadMessage):
        Reader().feed(data)


def test_the_longest_message() -> None:
    """16 MiB are carried; one byte more is refused before it is sent."""
    longest = Frames(bytes(MAX_PAYLOAD_BYTES))
    assert Reader().feed(encode(longest)) == [longest]
    with pytest.raises(MessageTooLarge, match="16777217 bytes"):
        encode(Frames(bytes(MAX_PAYLOAD_BYTES + 1)))


def test_what_is_not_plain() -> None:
    """Objects are not sent: there is no pickling."""
    with pytest.raises(TypeError):
        encode(Event("name", {"field": object()}))  # type: ignore[dict-item]
    with pytest.raises(OverflowError):
        encode(Event("name", {"field": 1 << 64}))
