"""Laws of what an operator sees of the listening session."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache, DatabaseStatus
from cacheservice.config import DatasetSettings
from cacheservice.views import collect
from cacheservice.views.why import listening
from tests.kit.views import database_object, status_table, why


class ToldTests(SynchronousTestCase):
    """What an operator sees of it."""

    def setUp(self) -> None:
        self.cache = Cache([DatasetSettings(name="things", query="SELECT 1 AS id", key="id")], lambda: 1000.0)

    def told(self, wanted: bool = True, problem: str | None = None, proven_at: float | None = None) -> DatabaseStatus:
        status = self.cache.database
        status.listening_wanted, status.listening_problem = wanted, problem
        status.listening, status.listening_proven_at = proven_at is not None, proven_at
        return status

    def sentence(self) -> str | None:
        return listening(collect.database(self.cache))

    def head(self) -> str:
        return status_table(self.cache).splitlines()[0]

    def test_not_wanted(self) -> None:
        """If no dataset waits for notifications, nothing is reported about them."""
        self.assertIsNone(self.sentence())
        self.assertNotIn("listening", self.head().lower())
        self.assertIs(database_object(self.cache)["listening"], False)

    def test_listening(self) -> None:
        """It shows since when it is proven."""
        self.told(proven_at=988.0)
        self.assertEqual(
            self.sentence(),
            "Changes arrive as notifications: the service is listening, tested 12 s ago.",
        )
        self.assertTrue(self.head().endswith(", listening"), self.head())
        self.assertIs(database_object(self.cache)["listening"], True)

    def test_broken(self) -> None:
        """It shows why, and what happens meanwhile."""
        self.told(problem="the connection was lost")
        self.assertEqual(
            self.sentence(),
            "Notifications do not arrive: the connection was lost. "
            "Until they do, the dataset is refreshed at its interval.",
        )
        self.assertTrue(self.head().endswith(", NOT listening: the connection was lost"), self.head())

    def test_not_begun(self) -> None:
        """Before the first proof there is no problem to report."""
        self.told()
        self.assertIn("is not listening yet", self.sentence() or "")
        self.assertTrue(self.head().endswith(", NOT listening yet"), self.head())

    def test_only_datasets_that_wait_for_notifications_tell_of_them(self) -> None:
        """`why` of another dataset does not mention it."""
        self.told(proven_at=988.0)
        self.assertNotIn("listening", why(self.cache.dataset("things"), self.cache))
