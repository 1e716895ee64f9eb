"""Laws of the contents of HTTP requests and responses, without a connection."""

from __future__ import annotations

import contextlib
import json
import re

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.http.bodies import PIECE_BYTES, json_lines, json_object
from cacheservice.ports.http.conditions import NAMES, Validators, is_not_modified, matches
from cacheservice.ports.http.negotiation import codings, media_type
from cacheservice.ports.http.problem import Problem
from tests.kit.datasets import MOMENT_WITH_MS
from tests.kit.http_port import encoded


class NegotiationRules(SynchronousTestCase):
    def test_the_most_specific_range_decides(self) -> None:
        """RFC 9110, 12.5.1: whatever the order, the most specific range that fits sets the quality."""
        offered = (b"a/b", b"a/c")
        for accept, chosen in {
            b"a/*;q=0.1, a/c;q=0.2": b"a/c",
            b"a/c;q=0.2, a/*;q=0.1": b"a/c",
            b"*/*, a/b;q=0.9": b"a/c",
            b"A/B;Q=0.9": b"a/b",
            b'a/c;x="a/b, q=1;q=1";q=0.9, a/b;q=0.1': b"a/c",
            b"a/b;q=0, a/c;q=0": None,
            b"x/y": None,
            b"a/b;q=2": b"a/b",  # malformed, so that nothing is left: no header
            b", ,": b"a/b",
        }.items():
            self.assertEqual(media_type(accept, offered), chosen, accept)

    @given(st.binary(max_size=300) | st.text('a/b*;q=0.1,"\\ ', max_size=300).map(str.encode))
    def test_any_bytes_are_negotiated(self, value: bytes) -> None:
        """No header's value, however malformed, makes an error."""
        self.assertIn(media_type(value, (b"a/b", b"a/c")), (b"a/b", b"a/c", None))
        codings(value)
        matches(value, b'"x"')
        for name in NAMES:
            with contextlib.suppress(Problem):
                is_not_modified({name: value}, Validators(b'"x"', modified=MOMENT_WITH_MS))

    def test_a_hostile_header_takes_no_time(self) -> None:
        """The longest head there can be is taken apart in one pass: no pattern goes back over what it took."""
        for hostile in (b'"' * 16_000, b'"\\' * 8_000, b"," * 16_000, b"a;" * 8_000, b'a"' * 8_000, b'W/"' * 5_000):
            media_type(hostile, (b"a/b",))
            codings(hostile)
            matches(hostile, b'"x"')

    @given(
        st.lists(st.sampled_from(['"a"', 'W/"a"', '"b,c"', 'W/"d"', '""']), max_size=5), st.sampled_from([", ", ","])
    )
    def test_a_list_of_tags(self, tags: list[str], separator: str) -> None:
        """A tag is found if it is in the list, weak or not, and only then."""
        names = {tag.removeprefix("W/").encode() for tag in tags}
        for tag in (b'"a"', b'"b,c"', b'"d"', b'"e"', b'"c"', b'""'):
            self.assertEqual(matches(separator.join(tags).encode(), tag), tag in names)


class Bodies(SynchronousTestCase):
    @given(
        st.dictionaries(st.text(max_size=8), st.integers(0, 200) | st.sampled_from([70_000, 200_000]), max_size=40),
        st.booleans(),
    )
    def test_bodies_are_the_rows(self, sizes: dict[str, int], lines: bool) -> None:
        """Whatever the keys and the sizes, the pieces together are the rows, and none is large."""
        table = {key: "x" * size for key, size in sizes.items() if not re.search("[\ud800-\udfff]", key)}
        rows = encoded({key: json.dumps(text) for key, text in table.items()})
        pieces = list((json_lines if lines else json_object)(rows))
        self.assertLessEqual(max(map(len, pieces), default=0), 4 * PIECE_BYTES)
        text = b"".join(pieces)
        if lines:
            self.assertEqual({row["key"]: row["value"] for row in map(json.loads, text.splitlines())}, table)
        else:
            self.assertEqual(json.loads(text), table)
