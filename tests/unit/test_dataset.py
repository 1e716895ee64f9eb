"""Laws of a dataset: its states at their boundaries, its age, its generations, and what makes the service ready."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import UnknownDataset
from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.history import KEPT_ATTEMPTS, Attempt, Outcome
from cacheservice.cache.snapshot import Snapshot
from tests.kit.clocks import START_S, started_clock
from tests.kit.datasets import MOMENT, declared, planned, rows_of, snapshot_of


def snapshot(generation: int, read_at: float) -> Snapshot:
    return snapshot_of(rows_of({}), generation, read_at)


def attempt(outcome: Outcome) -> Attempt:
    return Attempt(outcome, "interval", MOMENT, 0.1)


class AtTime(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))

    def loaded(self, **keys: Any) -> Dataset:
        """A dataset whose snapshot was read just now."""
        dataset = Dataset(declared(**keys), self.clock.seconds)
        dataset.publish(snapshot(1, self.clock.seconds()))
        return dataset


class States(AtTime):
    def test_never_loaded(self) -> None:
        """Before the first snapshot there is a state and no age, however long it lasts."""
        dataset = Dataset(declared(), self.clock.seconds)
        for _ in range(2):
            self.assertEqual((dataset.state(), dataset.age_s()), (State.NEVER_LOADED, None))
            self.clock.advance(10_000)

    def test_boundaries(self) -> None:
        """Fresh up to interval_s + timeout_s, stale up to max_age_s, each limit included, and expired past it."""
        dataset = self.loaded()
        for age_s, state in (
            (0.0, State.FRESH),
            (90.0, State.FRESH),
            (90.0625, State.STALE),
            (180.0, State.STALE),
            (180.0625, State.EXPIRED),
            (1e9, State.EXPIRED),
        ):
            self.clock.advance(START_S + age_s - self.clock.seconds())
            self.assertEqual((dataset.age_s(), dataset.state()), (age_s, state))

    def test_the_worse_state_where_limits_cross(self) -> None:
        """A max_age_s below interval_s + timeout_s makes it expired, though it would be fresh by the other limit."""
        dataset = self.loaded(max_age_s=10.0)
        self.clock.advance(10)
        self.assertEqual(dataset.state(), State.FRESH)
        self.clock.advance(1)
        self.assertEqual(dataset.state(), State.EXPIRED)

    def test_a_new_snapshot_makes_it_fresh(self) -> None:
        """An expired dataset is as fresh as the next snapshot is."""
        dataset = self.loaded()
        self.clock.advance(1000)
        self.assertEqual(dataset.state(), State.EXPIRED)
        dataset.publish(snapshot(2, self.clock.seconds() - 100))
        self.assertEqual((dataset.state(), dataset.age_s()), (State.STALE, 100.0))

    def test_states_are_the_contracts_words(self) -> None:
        """The states read as the contract names them."""
        self.assertEqual(list(map(str, State)), ["never_loaded", "fresh", "stale", "expired"])


class Ages(AtTime):
    @settings(deadline=None)
    @given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
    def test_never_negative(self, read_at: float, next_at: float) -> None:
        """Whatever the clock reads, no age and no time to the next attempt is negative."""
        dataset = Dataset(declared(), self.clock.seconds)
        dataset.publish(snapshot(1, read_at))
        planned(dataset, next_at)
        age_s, next_in_s = dataset.age_s(), dataset.next_refresh_in_s()
        assert age_s is not None
        assert next_in_s is not None
        self.assertEqual(age_s, max(0.0, START_S - read_at))
        self.assertEqual(next_in_s, max(0.0, next_at - START_S))
        self.assertGreaterEqual(dataset.need(), 0)

    def test_no_plan_has_no_time(self) -> None:
        """While nothing is planned there is no time to the next attempt."""
        self.assertIsNone(Dataset(declared(), self.clock.seconds).next_refresh_in_s())


class Generations(AtTime):
    def test_never_down(self) -> None:
        """A snapshot of the same or an older generation is never served."""
        dataset = self.loaded()
        dataset.publish(snapshot(7, START_S))
        for generation in (7, 6, 1, 0):
            self.assertRaises(AssertionError, dataset.publish, snapshot(generation, START_S))
            assert dataset.snapshot is not None
            self.assertEqual(dataset.snapshot.generation, 7)

    def test_the_first_is_at_least_1(self) -> None:
        """Generations count from 1; 0 is not a generation."""
        self.assertRaises(AssertionError, Dataset(declared(), self.clock.seconds).publish, snapshot(0, START_S))


class Attempts(AtTime):
    @settings(deadline=None)
    @given(st.lists(st.sampled_from(["published", "unchanged", "held", "failed"]), max_size=30))
    def test_what_is_remembered(self, outcomes: list[Outcome]) -> None:
        """The last 10 attempts are kept, all are counted, and the failures in a row are those since the last other."""
        dataset = Dataset(declared(), self.clock.seconds)
        for outcome in outcomes:
            dataset.attempted(attempt(outcome))
        self.assertEqual([kept.outcome for kept in dataset.attempts], outcomes[-KEPT_ATTEMPTS:])
        self.assertEqual(KEPT_ATTEMPTS, 10)
        self.assertEqual(dict(dataset.counts.outcomes), {outcome: outcomes.count(outcome) for outcome in set(outcomes)})
        in_a_row = 0
        for outcome in outcomes:
            in_a_row = in_a_row + 1 if outcome == "failed" else 0
        self.assertEqual(dataset.consecutive_failures, in_a_row)
        self.assertEqual(dataset.last_ended_at, START_S if outcomes else None)


class Saves(AtTime):
    def test_problems(self) -> None:
        """A failed save is counted each time; a problem found before a save is not; the next save clears either."""
        dataset = self.loaded()
        for tried, failures in ((True, 1), (True, 2), (False, 2)):
            dataset.note_save("no space left", tried=tried)
            self.assertEqual((dataset.save_problem, dataset.counts.save_failures), ("no space left", failures))
        dataset.note_save(None)
        self.assertEqual((dataset.save_problem, dataset.counts.save_failures), (None, 2))


class Needs(AtTime):
    def test_the_order(self) -> None:
        """Never loaded needs it most, then the dataset that has used up the larger share of its max_age_s."""
        never = Dataset(declared(), self.clock.seconds)
        patient = self.loaded(max_age_s=1000.0)
        hasty = self.loaded(max_age_s=100.0)
        self.clock.advance(50)
        newer = self.loaded(max_age_s=100.0)
        order = sorted([newer, patient, never, hasty], key=Dataset.need, reverse=True)
        self.assertEqual(order, [never, hasty, patient, newer])
        self.assertEqual([dataset.need() for dataset in order], [float("inf"), 0.5, 0.05, 0.0])


class Readiness(AtTime):
    def test_boundaries(self) -> None:
        """The service is ready when every required dataset can be read, be it stale or expired."""
        cache = Cache(
            [
                declared("products"),
                declared("prices", on_expired="refuse"),
                declared("extra", required=False, on_expired="refuse"),
            ],
            self.clock.seconds,
        )
        self.assertEqual(cache.not_ready(), {"products": State.NEVER_LOADED, "prices": State.NEVER_LOADED})
        cache.dataset("products").publish(snapshot(1, self.clock.seconds()))
        self.assertEqual(cache.not_ready(), {"prices": State.NEVER_LOADED})
        cache.dataset("prices").publish(snapshot(1, self.clock.seconds()))
        self.assertEqual(cache.not_ready(), {})
        self.clock.advance(180)
        self.assertEqual((cache.dataset("products").state(), cache.not_ready()), (State.STALE, {}))
        self.clock.advance(0.0625)
        self.assertEqual(cache.dataset("products").state(), State.EXPIRED)
        self.assertEqual(cache.not_ready(), {"prices": State.EXPIRED})
        cache.dataset("prices").publish(snapshot(2, self.clock.seconds()))
        self.clock.advance(170)
        self.assertEqual((cache.dataset("products").state(), cache.is_ready), (State.EXPIRED, True))

    def test_a_database_that_is_down_does_not_matter(self) -> None:
        """Loaded is ready, whatever is known of the database."""
        cache = Cache([declared()], self.clock.seconds)
        cache.dataset("products").publish(snapshot(1, self.clock.seconds()))
        cache.database.failed("connection refused")
        self.assertEqual((cache.database.state, cache.database.error), ("down", "connection refused"))
        self.assertEqual(cache.not_ready(), {})
        cache.database.answered()
        self.assertEqual((cache.database.state, cache.database.error), ("up", None))

    def test_datasets_by_name(self) -> None:
        """Datasets are in the order of the configuration, cannot be replaced, and an unknown name is an error."""
        cache = Cache([declared("b"), declared("a")], self.clock.seconds)
        self.assertEqual(list(cache.datasets), ["b", "a"])
        with self.assertRaisesRegex(UnknownDataset, "^unknown dataset 'c'$"):
            cache.dataset("c")
        with self.assertRaises(TypeError):
            cache.datasets["c"] = cache.dataset("a")  # type: ignore[index]
