"""Laws of groups as they are declared."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.config import groups
from tests.kit.service import declare


class Declared(SynchronousTestCase):
    def test_groups(self) -> None:
        """A group's members are together wherever they are declared; a dataset without one is alone."""
        declared = [declare("a", group="g"), declare("b"), declare("c", group="g"), declare("d", group="b")]
        self.assertEqual([[each.name for each in group] for group in groups(declared)], [["a", "c"], ["b"], ["d"]])
