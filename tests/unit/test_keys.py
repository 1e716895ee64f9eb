"""Laws of the forms of keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.sources.postgres.keys import KeyForm

PART = st.text(alphabet="ab:\\|", max_size=4)


class Forms(SynchronousTestCase):
    @given(st.lists(st.tuples(PART, PART), min_size=2, max_size=2, unique=True), st.sampled_from(":|"))
    def test_escaped_keys_are_different(self, keys: list[tuple[str, str]], separator: str) -> None:
        """With an escape, different values have different keys."""
        one, other = (KeyForm(separator, escaped=True).join(key) for key in keys)
        self.assertNotEqual(one, other)

    @given(st.lists(st.tuples(PART, PART), min_size=2, max_size=2, unique=True), st.sampled_from([":", "|", "::", "a"]))
    def test_what_is_ambiguous(self, keys: list[tuple[str, str]], separator: str) -> None:
        """Different values have the same key only where it is known to be ambiguous."""
        form = KeyForm(separator)
        if form.join(keys[0]) == form.join(keys[1]):
            self.assertTrue(form.is_ambiguous(keys[0]))
            self.assertTrue(form.is_ambiguous(keys[1]))
