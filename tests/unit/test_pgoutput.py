"""Laws of the decoder of pgoutput, on the messages that each supported version sends for the same changes.

`tests.record_pgoutput` has recorded them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheservice.sources.postgres.logical.pgoutput import (
    BadChanges,
    Begin,
    Changed,
    Commit,
    Decoded,
    Decoder,
    Message,
    Relation,
    Truncated,
)
from tests.record_pgoutput import CHANGES, FOLDER

KEYS = {
    "products": ("id",),
    "prices": ("product", "currency"),
    "codes": ("code",),
    "loose": ("id",),
    "far": ("id",),
    "parts": ("id",),
}
VERSIONS = sorted(path.stem for path in FOLDER.glob("*.json"))
FAR = "k" * 2100

# By transaction: the table and the keys of each change. Transactions without any are not listed; version 14 sends more.
EXPECTED = [
    [("products", ("1",)), ("products", ("2",)), ("products", ("3",))],
    [("products", ("2",))],
    [("products", ("3",), ("4",))],
    [("products", ("1",))],
    [("prices", ("1", "small")), ("prices", ("1", "large"))],
    [("prices", ("1", "small"), ("2", "large"))],
    [("codes", ("one",)), ("codes", ("one",)), ("codes", ("one",), ("two",)), ("codes", ("two",))],
    [("loose", ("7",)), ("loose", (None,))],
    [("loose", ("7",)), ("loose", (None,)), ("loose", ("7",), ("8",)), ("loose", (None,))],
    [("far", (FAR,)), ("far", (FAR,)), ("far", (FAR,))],
    [
        ("parts", ("1",)),
        ("parts", ("101",)),
        ("parts", ("1",)),
        ("parts", ("102",)),
        ("parts", ("101",)),
        ("parts", ("102",)),
    ],
    [("products", ("2",))],
    [("products", ("99",))],
    [("products", ("5",))],
    [("truncated", "other", "prices", "products")],
]


def recorded(version: str) -> list[bytes]:
    return [bytes.fromhex(message) for message in json.loads((FOLDER / f"{version}.json").read_text())]


def places(relation: Relation) -> Sequence[int] | None:
    names = [column.name for column in relation.columns]
    key = KEYS.get(relation.name)
    return None if key is None else [names.index(column) for column in key]


def decoded(version: str) -> list[Decoded]:
    decoder = Decoder(places)
    return [found for message in recorded(version) if (found := decoder.decode(message)) is not None]


def changes(messages: Sequence[Decoded]) -> list[list[tuple[object, ...]]]:
    """By transaction, what `EXPECTED` lists."""
    names: dict[int, str] = {}
    transactions: list[list[tuple[object, ...]]] = []
    for message in messages:
        match message:
            case Begin():
                transactions.append([])
            case Relation():
                names[message.oid] = message.name
            case Changed(oid, keys):
                assert (keys is None) == (names[oid] not in KEYS)
                if keys is not None:
                    transactions[-1].append((names[oid], *keys))
            case Truncated():
                transactions[-1].append(("truncated", *sorted(names[oid] for oid in message.oids)))
    return [transaction for transaction in transactions if transaction]


@pytest.mark.parametrize("version", VERSIONS)
def test_keys(version: str) -> None:
    """The keys before and after each change, of watched tables only, in transactions that were committed."""
    assert changes(decoded(version)) == EXPECTED


@pytest.mark.parametrize("version", VERSIONS)
def test_transactions(version: str) -> None:
    """Each transaction that is sent has a number, and a position behind its commit, and both grow here."""
    messages = decoded(version)
    begun = [message.xid for message in messages if isinstance(message, Begin)]
    ended = [message.end_lsn for message in messages if isinstance(message, Commit)]
    assert len(begun) == len(ended) > len(CHANGES) - 2
    assert (begun, ended) == (sorted(set(begun)), sorted(set(ended)))


@pytest.mark.parametrize("version", VERSIONS)
def test_messages(version: str) -> None:
    """Messages of pg_logical_emit_message arrive, within a transaction and outside."""
    found = [message for message in decoded(version) if isinstance(message, Message)]
    assert sorted(message.content for message in found) == [b"outside", b"within"]
    assert {message.prefix for message in found} == {"canary"}


@pytest.mark.parametrize("version", VERSIONS)
def test_definitions(version: str) -> None:
    """A table is described again after its definition has changed; which columns are its identity is known."""
    found = [message for message in decoded(version) if isinstance(message, Relation)]
    products = [[column.name for column in relation.columns] for relation in found if relation.name == "products"]
    assert products[0] == ["id", "name", "note"]
    assert products[-1] == ["id", "name", "more"]
    identities = {each.name: [column.name for column in each.columns if column.in_identity] for each in found}
    assert identities["prices"] == ["product", "currency"]
    assert identities["codes"] == ["code"]
    assert identities["loose"] == ["id", "note", "n"]
    assert {relation.schema for relation in found} == {"public"}


@pytest.mark.parametrize("version", VERSIONS)
def test_cut_messages(version: str) -> None:
    """A message that ends too early is refused, or its keys were complete."""
    decoder = Decoder(places)
    for message in recorded(version):
        whole = decoder.decode(message)
        for length in range(min(len(message), 64)):
            try:
                part = decoder.decode(message[:length])
            except BadChanges:
                continue
            assert isinstance(whole, Changed | None), message
            assert part == whole


def test_a_key_that_was_not_sent() -> None:
    """A key that is stored outside of its row, and has not changed, is only known if the old row was sent."""
    decoder = Decoder(places)
    relation = next(message for message in recorded(VERSIONS[-1]) if b"\0far\0" in message)
    decoder.decode(relation)
    row = b"\0\2" + b"u" + b"t\0\0\0\0011"
    old = b"\0\2" + b"t\0\0\0\4long" + b"n"
    for update, keys in ((b"N" + row, None), (b"K" + old + b"N" + row, (("long",),))):
        found = decoder.decode(b"U" + relation[1:5] + update)
        assert isinstance(found, Changed)
        assert found.keys == keys


def test_tables_that_are_watched_later() -> None:
    """Until a table is watched its keys are not known."""
    watched: set[str] = set()
    decoder = Decoder(lambda relation: places(relation) if relation.name in watched else None)
    insert = next(message for message in recorded(VERSIONS[-1]) if message[:1] == b"I")
    relation = next(message for message in recorded(VERSIONS[-1]) if message[:5] == b"R" + insert[1:5])
    found = decoder.decode(relation)
    assert isinstance(found, Relation)
    assert decoder.decode(insert) == Changed(found.oid, None)
    watched.add(found.name)
    assert decoder.decode(insert) == Changed(found.oid, None)
    decoder.renew()
    assert decoder.decode(insert) == Changed(found.oid, (("1",),))


@given(st.binary(max_size=80), st.sampled_from([b"", b"B", b"C", b"R", b"I", b"U", b"D", b"T", b"M", b"O", b"Y"]))
def test_any_bytes(rest: bytes, kind: bytes) -> None:
    """Whatever arrives is decoded, or refused as BadChanges."""
    decoder = Decoder(places)
    for message in recorded(VERSIONS[-1]):
        if message[:1] == b"R":
            decoder.decode(message)
    for payload in (kind + rest, *(kind + message[1:5] + rest for message in recorded(VERSIONS[-1])[:3])):
        with suppress(BadChanges):
            decoder.decode(payload)
