"""Laws of the metrics in each form, and of the stalls that are counted."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.capture import CaptureStatus
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.cache.snapshot import Snapshot
from cacheservice.ops.stall import TICK_S, StallWatch
from tests.kit.capture_states import BY_TRIGGERS, FROM_LOG, STREAMING
from tests.kit.clocks import started_clock
from tests.kit.datasets import MOMENT_WITH_MS, declared, numbered_rows
from tests.kit.metrics import Series, World, of_monitor_lines, of_openmetrics, of_text, place
from tests.kit.paths import ROOT

EVENTS = [
    "publish",
    "published",
    "unchanged",
    "held",
    "failed",
    "hold",
    "renew",
    "pin",
    "age",
    "count",
    "read",
    "declare",
    "fleet",
]


class Forms(SynchronousTestCase):
    def assert_same(self, ours: Series, theirs: Series) -> None:
        """Shows what differs alone: a diff of all of them takes seconds."""
        places = ours.keys() | theirs.keys()
        differing = {at: (ours.get(at), theirs.get(at)) for at in places if ours.get(at) != theirs.get(at)}
        self.assertEqual(differing, {})

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["products", "prices"]), st.sampled_from(EVENTS), st.integers(0, 50))))
    def test_all_forms_tell_the_same(self, events: list[tuple[str, str, int]]) -> None:
        """Whatever happens, and after each of it: the text, OpenMetrics, the lines of mntr, and what prometheus-client
        makes of `collect`, hold the same series with the same values; both formats' own parsers take them.
        """
        world = World()
        for name, what, number in events:
            world.do(world.cache.dataset(name), what, number)
            self.assert_same(of_text(world.text()), of_text(generate_latest(world.metrics)))
        expected = of_text(generate_latest(world.metrics))
        self.assert_same(of_text(world.text()), expected)
        self.assert_same(of_monitor_lines(world.monitor_lines()), expected)
        openmetrics = of_openmetrics(generate_openmetrics(world.metrics))
        self.assert_same(of_openmetrics(world.text(openmetrics=True)), openmetrics)
        self.assert_same(openmetrics, expected)
        pushed = {place(sample.name, **sample.labels): sample.value for _, sample in world.metrics.samples()}
        self.assert_same({at: value for at, value in pushed.items() if not at[0].startswith("process_")}, expected)

    def test_help_and_type(self) -> None:
        """Both formats describe each family once, with a sentence of help and its kind, as the library does."""
        world = World()
        world.publish(world.cache.dataset("products"))
        for ours, theirs in (
            (world.text(), generate_latest(world.metrics)),
            (world.text(openmetrics=True), generate_openmetrics(world.metrics)),
        ):
            told, expected = ([line for line in text.splitlines() if line[:1] == b"#"] for text in (ours, theirs))
            self.assertEqual(told, expected)
            self.assertEqual(len(set(told)), len(told))

    def test_before_the_first_load(self) -> None:
        """What is not known yet is not there, rather than 0; what was counted is there from the start, as 0."""
        world = World()
        now = of_text(world.text())
        self.assertNotIn(place("cacheservice_dataset_age_seconds", dataset="products"), now)
        self.assertNotIn(place("cacheservice_dataset_last_success_timestamp_seconds", dataset="products"), now)
        self.assertEqual(now[place("cacheservice_dataset_state", dataset="products", state="never_loaded")], 1)
        self.assertEqual(now[place("cacheservice_refresh_total", dataset="products", outcome="failed")], 0)
        self.assertEqual(now[place("cacheservice_reads_total", dataset="prices", port="http", result="hit")], 0)
        self.assertEqual(now[place("cacheservice_rejected_total", port="resp", reason="auth_failed")], 0)
        self.assertEqual(now[place("cacheservice_ready")], 0)

    def test_a_fleet(self) -> None:
        """A process of a fleet has a role for each dataset; the page describes each metric. Others have none of it."""
        world = World()
        self.assertNotIn(b"cacheservice_cluster", world.text())
        products, prices = (world.cache.dataset(name) for name in ("products", "prices"))
        products.note_fleet(FleetStatus("replica", "cache-2", 17, "cache-1", 3, world.clock.seconds() - 2, "refused"))
        prices.note_fleet(FleetStatus("leader", "cache-2", 18, "cache-2", publish_problem="full", lead_changes=1))
        text = world.text()
        now = of_text(text)

        def of(metric: str, dataset: str, **labels: str) -> float:
            return now[place(f"cacheservice_cluster_{metric}", dataset=dataset, **labels)]

        roles = ("leader", "replica", "alone")
        self.assertEqual([of("role", "products", role=role) for role in roles], [0, 1, 0])
        self.assertEqual([of("role", "prices", role=role) for role in roles], [1, 0, 0])
        for metric, of_products, of_prices in (
            ("epoch", 17, 18),
            ("lag_generations", 3, 0),
            ("leader_silent_seconds", 2, 0),
            ("valkey_up", 0, 1),
            ("publish_failing", 0, 1),
            ("can_lead", 1, 1),
            ("lead_changes_total", 0, 1),
        ):
            self.assertEqual((of(metric, "products"), of(metric, "prices")), (of_products, of_prices), metric)
        page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
        kinds = dict(re.findall(rb"^# TYPE (cacheservice_cluster_\w+) (\w+)", text, re.M))
        self.assertEqual(len(kinds), 8)
        for name, kind in kinds.items():
            labels = {label for (each, places) in now if each == name.decode() for label, _ in places}
            row = re.search(rf"^\| `{name.decode()}` \| (\w+) \|([^|]*)\|", page, re.M)
            assert row is not None, f"{name.decode()} is not in docs/metrics.md"
            self.assertEqual((row[1], set(re.findall(r"\w+", row[2]))), (kind.decode(), labels), name)

    def test_capture(self) -> None:
        """They are there while capture is not off, each as the page describes it; unknown figures are missing."""
        world = World()
        self.assertNotIn(b"cacheservice_capture", world.text())
        watch = [{"table": "public.products", "key": "id"}]
        world.cache.declare([*(declared(name, watch=watch) for name in ("products", "prices", "flags")), declared("x")])
        for name, state in (("products", FROM_LOG), ("prices", BY_TRIGGERS), ("x", FROM_LOG)):
            snapshot = Snapshot(1, numbered_rows(1), MOMENT_WITH_MS, world.clock.seconds(), "1:1:", watch_state=state)
            world.cache.dataset(name).publish(snapshot)
        world.cache.database.see_capture_by(lambda: STREAMING)
        text = world.text()
        now = of_text(text)
        self.assert_same(now, of_text(generate_latest(world.metrics)))
        found = {at: value for at, value in now.items() if at[0].startswith("cacheservice_capture_")}
        expected = {
            place("cacheservice_capture_up"): 1,
            place("cacheservice_capture_lag_bytes"): 100,
            place("cacheservice_capture_lag_seconds"): 0.25,
            place("cacheservice_capture_retained_bytes"): 5000,
            place("cacheservice_capture_retained_limit_bytes"): 1 << 30,
            place("cacheservice_capture_kept_keys"): 7,
            place("cacheservice_capture_kept_bytes"): 400,
            place("cacheservice_capture_transactions_total"): 20,
            place("cacheservice_capture_keys_total"): 30,
            place("cacheservice_capture_restarts_total", reason="lost"): 2,
            place("cacheservice_capture_logical", dataset="products"): 1,
            place("cacheservice_capture_logical", dataset="prices"): 0,
        }
        self.assertEqual(found, expected)
        page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
        kinds = dict(re.findall(rb"^# TYPE (cacheservice_capture_\w+) (\w+)", text, re.M))
        self.assertEqual(len(kinds), 11)
        for name, kind in kinds.items():
            labels = {label for (each, places) in now if each == name.decode() for label, _ in places}
            row = re.search(rf"^\| `{name.decode()}` \| (\w+) \|([^|]*)\|", page, re.M)
            assert row is not None, f"{name.decode()} is not in docs/metrics.md"
            self.assertEqual((row[1], set(re.findall(r"\w+", row[2]))), (kind.decode(), labels), name)
        world.cache.database.see_capture_by(lambda: CaptureStatus("impossible", "wal_level is replica"))
        now = of_text(world.text())
        self.assertEqual(now[place("cacheservice_capture_up")], 0)
        self.assertEqual(now[place("cacheservice_capture_restarts_total", reason="lost")], 0)
        for missing in ("lag_bytes", "lag_seconds", "retained_bytes", "retained_limit_bytes"):
            self.assertNotIn(place(f"cacheservice_capture_{missing}"), now)

    def test_the_histogram_of_refreshes(self) -> None:
        """A bucket counts what took no longer than its bound, the bound itself included."""
        world = World()
        dataset = world.cache.dataset("products")
        for took_s in (0.01, 0.02, 0.5, 1000.0):
            world.attempt(dataset, "published", took_s)
        now = of_text(world.text())
        for bound, count in (("0.01", 1), ("0.025", 2), ("0.25", 2), ("0.5", 3), ("300.0", 3), ("+Inf", 4)):
            at = place("cacheservice_refresh_duration_seconds_bucket", dataset="products", le=bound)
            self.assertEqual(now[at], count, bound)
        self.assertEqual(now[place("cacheservice_refresh_duration_seconds_count", dataset="products")], 4)
        self.assertEqual(now[place("cacheservice_refresh_duration_seconds_sum", dataset="products")], 1000.53)

    def test_a_reload(self) -> None:
        """The series of a dataset that is removed go away; those of one that comes again count on; none goes down."""
        world = World()
        products = world.cache.dataset("products")
        world.publish(products, 5)
        world.attempt(products, "published")
        products.counts.resp.hits += 7
        before = of_text(world.text())
        world.cache.declare([declared("prices"), declared("flags")])
        without = of_text(world.text())
        named = {dict(labels).get("dataset") for _, labels in without}
        self.assertEqual(named, {None, "prices", "flags"})
        self.assertNotIn('dataset="products"', world.monitor_lines())
        world.attempt(products, "failed")  # which was under way when it was removed
        self.assertEqual(set(world.metrics._lines), {"prices", "flags"})
        world.cache.declare([declared("prices"), declared("products", max_age_s=7.0)])
        again = of_text(world.text())
        counters = [at for at in before if at[0].endswith(("_total", "_bucket", "_count", "_sum"))]
        self.assertEqual([(at, again[at]) for at in counters if again[at] < before[at]], [])
        self.assertEqual(again[place("cacheservice_reads_total", dataset="products", port="resp", result="hit")], 7)
        self.assertEqual(again[place("cacheservice_dataset_generation", dataset="products")], 0)
        self.assertEqual(again[place("cacheservice_dataset_max_age_seconds", dataset="products")], 7)

    def test_ready_before_they_are_asked_for(self) -> None:
        """What an attempt changes is rendered when it ends: a scrape after it needs no more turns."""
        world = World(*(f"d{number}" for number in range(350)))
        world.text()
        before = world.clock.turns
        for dataset in world.cache.datasets.values():
            world.publish(dataset)
            world.attempt(dataset, "published")
        world.text()
        self.assertEqual(world.clock.turns, before + 1)

    def test_no_turn_is_long(self) -> None:
        """When all of many datasets have changed, the reactor has its turn after each hundred, and before them all;
        what is removed and added meanwhile does no harm.
        """
        world = World(*(f"d{number}" for number in range(350)))
        world.text()
        self.assertEqual(world.clock.turns, 4)
        world.text()
        self.assertEqual(world.clock.turns, 5)
        for dataset in world.cache.datasets.values():
            world.publish(dataset)
        coming = Deferred.fromCoroutine(world.metrics.exposition(openmetrics=False))
        self.assertFalse(coming.called)
        world.cache.declare([declared("d300"), declared("new")])
        world.clock.advance(0)
        self.assertEqual({dict(labels).get("dataset") for _, labels in of_text(coming.result)}, {None, "d300", "new"})


class Stalls(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = started_clock()
        self.watch = StallWatch(self.clock)
        self.watch.startService()
        self.addCleanup(lambda: self.assertEqual(self.clock.getDelayedCalls(), []))
        self.addCleanup(self.watch.stopService)

    def test_ticks_in_time(self) -> None:
        """A reactor that is there all the time is never late."""
        for _ in range(2000):
            self.clock.advance(TICK_S / 4)
        self.assertEqual(sum(self.watch.lateness.counts), 500)
        self.assertEqual(self.watch.lateness.total, 0)

    @given(st.floats(0.001, 100))
    def test_a_long_turn(self, stall_s: float) -> None:
        """It is one late tick, later by what the turn took less at most a tick; and those that follow are in time."""
        clock = Clock()
        watch = StallWatch(clock)
        watch.startService()
        clock.advance(TICK_S)
        before_s = watch.lateness.total
        clock.advance(stall_s)
        late_s = watch.lateness.total - before_s
        self.assertTrue(stall_s - TICK_S - 1e-9 <= late_s <= stall_s + 1e-9, late_s)
        self.assertLessEqual(sum(watch.lateness.counts), 2)
        watch.stopService()
        self.assertEqual(clock.getDelayedCalls(), [])
