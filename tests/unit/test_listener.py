"""Laws of what an operator sees of the listening session."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache, DatabaseStatus
from cacheservice.cache.describe import describe
from cacheservice.config import DatasetSettings
from cacheservice.ports.report import listening_sentence, status_table, why


class ToldTests(SynchronousTestCase):
    """What an operator is told of it."""

    def setUp(self) -> None:
        self.cache = Cache([DatasetSettings(name="things", query="SELECT 1 AS id", key="id")], lambda: 1000.0)

    def told(self, wanted: bool = True, problem: str | None = None, proven_at: float | None = None) -> DatabaseStatus:
        status = self.cache.database
        status.listening_wanted, status.listening_problem = wanted, problem
        status.listening, status.listening_proven_at = proven_at is not None, proven_at
        return status

    def head(self) -> str:
        return status_table(self.cache).splitlines()[0]

    def test_not_wanted(self) -> None:
        """Where nobody waits for notifications nothing is said of them."""
        self.assertIsNone(listening_sentence(self.cache, 1000.0))
        self.assertNotIn("listening", self.head().lower())
        self.assertIs(describe(self.cache)["postgres"]["listening"], False)

    def test_listening(self) -> None:
        """It says since when it is proven."""
        self.told(proven_at=988.0)
        self.assertEqual(
            listening_sentence(self.cache, 1000.0),
            "PostgreSQL tells of changes at once: listening, proven 12 s ago.",
        )
        self.assertTrue(self.head().endswith(", listening"), self.head())
        self.assertIs(describe(self.cache)["postgres"]["listening"], True)

    def test_broken(self) -> None:
        """It says why, and what happens meanwhile."""
        self.told(problem="the connection was lost")
        self.assertEqual(
            listening_sentence(self.cache, 1000.0),
            "Listening is broken: the connection was lost; it is refreshed on its interval meanwhile.",
        )
        self.assertTrue(self.head().endswith(", NOT listening: the connection was lost"), self.head())

    def test_not_begun(self) -> None:
        """Before the first proof there is no problem to tell."""
        self.told()
        self.assertIn("has not begun yet", listening_sentence(self.cache, 1000.0))
        self.assertTrue(self.head().endswith(", NOT listening yet"), self.head())

    def test_only_datasets_that_wait_for_notifications_tell_of_them(self) -> None:
        """`why` of another dataset says nothing of it."""
        self.told(proven_at=988.0)
        self.assertNotIn("listening", why(self.cache.dataset("things"), self.cache))
