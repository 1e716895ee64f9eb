"""Laws of the facts that operators see, and of their JSON; on values and on a cache without a service."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from datetime import UTC, datetime

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import Blocker
from cacheservice.cache.cache import ConnectionCap
from cacheservice.cache.capture import CaptureStatus
from cacheservice.cache.changes import Change
from cacheservice.cache.counts import Histogram
from cacheservice.cache.fleet_status import FleetStatus
from cacheservice.cache.history import Attempt
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.lag import Lag
from cacheservice.cache.snapshot import Snapshot
from cacheservice.cache.workers import WorkerStatus
from cacheservice.views import collect, facts, parse, plugin, table, units
from cacheservice.views import json as as_json
from cacheservice.views.problems import Severity, problems
from cacheservice.views.why import listening, sentences
from tests.kit.capture_states import BY_TRIGGERS, STREAMING
from tests.kit.datasets import MOMENT, declared, reading, rows_of
from tests.kit.status_port import BLOCKER, filled_cache

AT = datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)
NOT_IN_JSON = {
    facts.Service: {"stopping", "configured_at"},
    facts.Database: {"listening_proven_s"},
    facts.Attempt: {"id", "how"},
    facts.Dataset: {"behind_s"},
}
"""The fields that only a renderer of the same process gets."""


class Json(SynchronousTestCase):
    def setUp(self) -> None:
        self.cache = filled_cache()

    def through_json(self) -> tuple[facts.Facts, facts.Facts]:
        """Return the facts of the cache, and the same facts as another process reads them."""
        here = collect.everything(self.cache)
        return here, parse.facts(as_json.line(here), AT)

    def test_another_process_reads_the_same_facts(self) -> None:
        """All fields survive, to the millisecond, except those that are not in the JSON."""
        products = self.cache.dataset("products")
        change, lag = Change(1, 2, 3), Lag(15.0, False, "replay is paused")
        products.publish(Snapshot(4, rows_of({}), MOMENT, 1000.0, "", change=change, lag=lag, age_uncertain="x"))
        products.hold("would drop rows", 7, MOMENT)
        products.note_save("full")
        products.pin()
        products.note_fleet(
            FleetStatus("replica", "cache-2", 17, "cache-1", 3, self.cache.now() - 1.5, "refused", "full", "no session")
        )
        reading(products, None)
        self.cache.reject(("a", "b"))
        self.cache.connection_cap = ConnectionCap(1, 2, 3)
        self.cache.database.seen(ServerIdentity("shop", 5, "reader", in_recovery=True, started_us=1), lag)
        self.cache.database.pruned("denied", 5, 7.0)
        self.cache.database.see_capture_by(lambda: STREAMING)
        stalls = Histogram((1.0,))
        self.cache.see_workers_by(
            lambda: [
                WorkerStatus(1, 4711, "serving", {"resp": 30, "http": 2}, 0, 220_000_000, 1.5, (0, 0), stalls),
                WorkerStatus(2, None, "down", {"resp": 0, "http": 0}, 3, 0, 0.0, (0, 0), stalls),
            ]
        )
        here, there = self.through_json()
        self.assertEqual(self.plain(here.service), self.plain(there.service))
        self.assertEqual(self.plain(here.database), self.plain(there.database))
        self.assertEqual(list(here.datasets), list(there.datasets))
        for name, dataset in here.datasets.items():
            self.assertEqual(self.plain(dataset), self.plain(there.datasets[name]))
        self.assertEqual(there.datasets["prices"].blocked_by, (str(BLOCKER),))

    def plain(self, value: object) -> object:
        """Return the fields that are in the JSON, rounded as there."""
        if isinstance(value, float):
            return round(value, 3)
        if isinstance(value, tuple):
            return tuple(map(self.plain, value))
        if type(value).__module__ != facts.__name__:
            return value
        hidden = NOT_IN_JSON.get(type(value), set())  # type: ignore[call-overload]
        names = [field.name for field in fields(value) if field.name not in hidden]  # type: ignore[arg-type]
        return {name: self.plain(getattr(value, name)) for name in names}

    def test_an_older_service(self) -> None:
        """Members that it does not have yet count as null."""
        everything = json.loads(as_json.line(collect.everything(self.cache)))
        for name in ("connection_cap", "configuration_rejected", "not_ready"):
            del everything["service"][name]
        for name in ("listening_problem", "standby", "prune_problem", "capture"):
            del everything["postgres"][name]
        for dataset in everything["datasets"].values():
            for name in ("save_problem", "age_uncertain", "standby", "capture", "not_logical"):
                del dataset[name]
            for name in ("advice", "blocked_by"):
                del dataset["last_attempt"][name]
        there = parse.facts(json.dumps(everything), AT)
        self.assertIsNone(there.service.connection_cap)
        self.assertIsNone(there.datasets["products"].save_problem)
        self.assertIsNone(there.database.capture)
        self.assertIsNone(there.datasets["products"].capture)
        self.assertEqual((there.datasets["prices"].advice, there.datasets["prices"].blocked_by), (None, ()))

    def test_without_workers(self) -> None:
        """The member is not there, as in older services."""
        self.assertNotIn("workers", json.loads(as_json.line(collect.everything(self.cache)))["service"])
        self.assertEqual(self.through_json()[1].service.workers, ())

    def test_without_a_fleet(self) -> None:
        """The member is not there, as in older services."""
        self.assertNotIn("cluster", json.loads(as_json.line(collect.everything(self.cache)))["datasets"]["products"])
        self.assertIsNone(self.through_json()[1].datasets["products"].fleet)

    def test_another_server(self) -> None:
        """JSON that is not the status of a service, and text that is not JSON, are refused."""
        good = json.loads(as_json.line(collect.everything(self.cache)))
        for bad in ("imok", "", "[]", "{}", '{"service":1}', json.dumps(good | {"datasets": []}),
                    json.dumps(good | {"service": {"ready": True}}), json.dumps(good | {"postgres": None}),
                    json.dumps(good | {"datasets": {"a": {"age_s": "old"}}})):  # fmt: skip
            with self.assertRaises(ValueError, msg=bad):
                parse.facts(bad, AT)

    def test_some_datasets_only(self) -> None:
        """The line keeps all members of the chosen datasets, also unknown ones."""
        everything = json.loads(as_json.line(collect.everything(self.cache)))
        everything["datasets"]["prices"]["new"] = 1
        line = json.dumps(everything)
        self.assertIs(as_json.only_datasets(line, ()), line)
        self.assertEqual(
            json.loads(as_json.only_datasets(line, ("prices",))),
            everything | {"datasets": {"prices": everything["datasets"]["prices"]}},
        )


class Workers(SynchronousTestCase):
    """One line for people, and a problem for each worker that is down."""

    def test_line(self) -> None:
        """It describes each worker; a service without workers has no such line."""
        service = facts.Service(
            version="1",
            ready=True,
            workers=(
                facts.Worker(1, 4711, "serving", {"resp": 3000, "http": 2}, 0, 220_000_000),
                facts.Worker(2, None, "down", {"resp": 0, "http": 0}, 3, 0),
                facts.Worker(3, 4713, "starting", {}, 1, 0),
            ),
        )
        self.assertEqual(
            table.workers_lines(service),
            [
                "1 of 3 workers serving: 1 with 3,000 resp and 2 http clients, 209.8 MiB; "
                "2 is down, restarted 3 times; 3 is starting, restarted once"
            ],
        )
        self.assertEqual(table.workers_lines(replace(service, workers=())), [])
        shown = facts.Facts(AT, service, facts.Database(state="up"), {})
        (problem,) = problems(shown)
        self.assertIn("worker 2 is down", problem.what)


class Capture(SynchronousTestCase):
    """How changes are captured: in the head line, among the problems, and in the sentences of a dataset."""

    def setUp(self) -> None:
        self.dataset = replace(collect.dataset(filled_cache().dataset("products")), capture="logical")
        self.streaming = facts.Capture("streaming", slot="cacheservice_1", lag_s=0.012)
        self.impossible = facts.Capture("impossible", "wal_level is replica")

    def facts(self, capture: facts.Capture | None, *ways: str | None) -> facts.Facts:
        datasets = {f"d{number}": replace(self.dataset, capture=way) for number, way in enumerate(ways)}
        database = facts.Database(state="up", capture=capture)
        return facts.Facts(AT, facts.Service(version="1", ready=True), database, datasets)

    def head(self, shown: facts.Facts) -> str:
        return table.status_table(shown.service, shown.database, shown.datasets.values()).splitlines()[0]

    def why(self, capture: facts.Capture | None, /, *, because: str | None = None, **dataset: object) -> list[str]:
        settings = declared("products", watch=[{"table": "public.products", "key": "id"}])
        more = replace(self.dataset, **dataset)  # type: ignore[arg-type]
        details = facts.Details(dataset=more, settings=settings, without_deltas_because=because)
        return sentences(details, facts.Database(state="up", capture=capture, listening_wanted=True))

    def test_collected(self) -> None:
        """The way of a dataset is that of its newest snapshot; None without watch, and if it is read elsewhere."""
        watch = [{"table": "public.products", "key": "id"}]
        cache = filled_cache()
        products = cache.dataset("products")
        self.assertIsNone(collect.dataset(products).capture)
        for state, way, not_logical in (
            ("", "nothing", None),
            ('{"logical":{"slot":"s"},"tables":{"a":1}}', "logical", None),
            (BY_TRIGGERS, "triggers", "wal_level is replica"),
        ):
            cache.declare([declared("products", watch=watch)])
            products.publish(
                Snapshot(products.last_generation + 1, rows_of({}), MOMENT, 1000.0, "1:1:", watch_state=state)
            )
            found = collect.dataset(products)
            self.assertEqual((found.capture, found.not_logical), (way, not_logical))
        products.note_fleet(FleetStatus("replica", "cache-2"))
        self.assertIsNone(collect.dataset(products).capture)
        self.assertIsNone(collect.database(cache).capture)
        cache.database.see_capture_by(lambda: CaptureStatus("lost", "gone"))
        self.assertEqual(collect.database(cache).capture, facts.Capture("lost", "gone"))

    def test_streaming(self) -> None:
        """It is in the head line, and not a problem."""
        shown = self.facts(self.streaming, "logical", "nothing", None)
        self.assertIn(", capturing from the log", self.head(shown))
        self.assertEqual(problems(shown), [])
        self.assertNotIn("captur", self.head(self.facts(None, "triggers")))

    def test_a_service_with_triggers(self) -> None:
        """That nobody has set logical decoding up is neither in the head line nor a problem, if triggers do it all."""
        again = replace(self.impossible, state="starting")
        for capture in (self.impossible, again):
            for ways in (("triggers", "triggers", None), (None,), ()):
                shown = self.facts(capture, *ways)
                self.assertNotIn("captur", self.head(shown))
                self.assertEqual(problems(shown), [])

    def test_problems(self) -> None:
        """They are a warning with the reason: a lost or waiting stream always, an impossible one for other datasets."""
        for capture, ways in (
            (self.impossible, ("triggers", "nothing")),
            (self.impossible, ("logical",)),
            (facts.Capture("lost", "the server ended it"), ("triggers",)),
            (facts.Capture("waiting", "the slot waits for session 7"), ("triggers",)),
            (facts.Capture("starting", "the server ended it"), ("logical",)),
        ):
            shown = self.facts(capture, *ways)
            (found,) = problems(shown)
            self.assertEqual(str(found), f"changes are not captured from the log: {capture.problem}")
            self.assertEqual((found.severity, found.dataset), (Severity.WARNING, None))
            self.assertIn(f", NOT capturing from the log: {capture.problem}", self.head(shown))
        starting = self.facts(facts.Capture("starting"), "nothing")
        self.assertEqual(problems(starting), [])
        self.assertIn(", NOT capturing from the log yet", self.head(starting))

    def test_sentences(self) -> None:
        """They name the slot and its lag; or why the log is not read, once."""
        from_log = "Changes of its tables are read from the write-ahead log (slot cacheservice_1, 0.01 s behind)."
        self.assertIn(from_log, self.why(self.streaming))
        lost = facts.Capture("lost", "the server ended it")
        cannot = "The write-ahead log cannot be read now: the server ended it."
        until = "Changes of its tables were read from the write-ahead log until the last refresh."
        self.assertIn(f"{until} {cannot}", " ".join(self.why(lost)))
        self.assertIn(cannot, " ".join(self.why(lost, capture="nothing")))
        self.assertIn(cannot, " ".join(self.why(lost, capture=None)))
        because = " ".join(self.why(lost, because="the server ended it", capture="nothing"))
        self.assertEqual(because.count("the server ended it"), 1)
        self.assertIn("Deltas do not work: all rows have been read for", because)
        triggers = "Changes of its tables are recorded by triggers"
        self.assertIn(f"{triggers}.", self.why(None, capture="triggers"))
        self.assertIn(
            f"{triggers}, not read from the write-ahead log: wal_level is replica.",
            self.why(self.impossible, capture="triggers", not_logical="it has not begun yet"),
        )
        self.assertIn(
            f"{triggers}, not read from the write-ahead log: not in the publication.",
            self.why(self.streaming, capture="triggers", not_logical="not in the publication"),
        )

    def test_how_changes_arrive(self) -> None:
        """Only the datasets that need notifications have a sentence about them."""
        yet = "The service is not listening"
        self.assertNotIn(yet, " ".join(self.why(self.streaming)))
        self.assertIn(yet, " ".join(self.why(self.streaming, capture="triggers")))
        self.assertIn(yet, " ".join(self.why(self.impossible)))
        settings = declared("products", watch=[{"table": "public.products", "key": "id"}], notify="products")
        details = facts.Details(dataset=self.dataset, settings=settings)
        wanted = facts.Database(state="up", capture=self.streaming, listening_wanted=True)
        for database, begins in (
            (wanted, "The service is not listening to notifications of applications yet."),
            (replace(wanted, listening_problem="a pooler"), "Notifications of applications do not arrive: a pooler."),
            (
                replace(wanted, listening=True, listening_proven_s=3.0),
                "Notifications of applications arrive as well: the service is listening, tested 3.00 s ago.",
            ),
        ):
            self.assertIn(begins, sentences(details, database))
        lost = replace(wanted, listening=True, listening_proven_s=3.0, capture=facts.Capture("lost", "x"))
        self.assertIn("it may see some changes only at the next interval", " ".join(sentences(details, lost)))


class Fleet(SynchronousTestCase):
    """The part of a process in a fleet: a cell and a line for people, and each problem once."""

    def setUp(self) -> None:
        cache = filled_cache(2)
        self.dataset = collect.dataset(cache.dataset("products"))
        self.fleet = facts.Fleet("replica", "cache-2", 17, "cache-1", 0, 0.5)

    def facts(self, *fleets: facts.Fleet | None) -> facts.Facts:
        names = ("products", "prices", "flags")
        datasets = {
            name: replace(self.dataset, name=name, fleet=fleet) for name, fleet in zip(names, fleets, strict=False)
        }
        return facts.Facts(AT, facts.Service(version="1", ready=True), facts.Database(state="up"), datasets)

    def table(self, *fleets: facts.Fleet | None) -> list[str]:
        shown = self.facts(*fleets)
        return table.status_table(shown.service, shown.database, shown.datasets.values()).splitlines()

    def test_the_table(self) -> None:
        """It has the role of each dataset; without a fleet there is no such line, and no such cell."""
        leader = replace(self.fleet, role="leader", leader="cache-2", lag_generations=None)
        behind = replace(self.fleet, lag_generations=2)
        _, line, first, second, third = self.table(leader, behind, replace(self.fleet, leader=None))
        self.assertEqual(line, "fleet: cache-2 leads 1 and follows 2 of 3 datasets")
        self.assertRegex(first, r"generation 3  leader  +next in")
        self.assertIn("generation 3  follows cache-1, 2 generations behind  next in", second)
        self.assertRegex(third, r"generation 3  replica  +next in")
        head, only = self.table(None)
        self.assertNotIn("fleet", head)
        self.assertIn("generation 3  next in", only)

    def test_problems(self) -> None:
        """Each is there once, although all datasets have it; so is being alone."""
        broken = replace(
            self.fleet, role="alone", leader_silent_s=90.0, valkey_problem="v:1 is down", lead_problem="no"
        )
        shown = self.facts(broken, broken)
        self.assertEqual(
            [problem.what for problem in problems(shown) if problem.dataset is None],
            [
                "the Valkey cannot be used: v:1 is down",
                "this process cannot win a lead: no",
                "no leader's results of products and 1 more have come for 90 s; this process refreshes alone",
            ],
        )
        self.assertEqual(
            self.table(broken, replace(broken, valkey_problem="v:2 is down"))[1],
            "fleet: cache-2 leads 0 and follows 0 of 2 datasets, refreshes 2 alone; "
            "the Valkey cannot be used: v:1 is down (and 1 more); this process cannot win a lead: no",
        )
        level, line = plugin.verdict(shown)
        self.assertEqual(level, Severity.WARNING)
        self.assertIn(" leading=0;;;0;2 alone=2;0;;0;2 ", line)
        self.assertEqual([each for each in problems(self.facts(self.fleet)) if each.dataset is None], [])


class Why(SynchronousTestCase):
    """The sentences about a dataset, on values."""

    def setUp(self) -> None:
        self.dataset = facts.Dataset(
            name="products",
            state="fresh",
            interval_s=10.0,
            timeout_s=5.0,
            max_age_s=60.0,
            rows=1,
            generation=3,
            as_of=MOMENT,
            age_s=1.0,
        )
        self.details = facts.Details(dataset=self.dataset, settings=declared("products"))

    def why(self, details: facts.Details | None = None, **dataset: object) -> list[str]:
        details = details or self.details
        details = replace(details, dataset=replace(self.dataset, **dataset))  # type: ignore[arg-type]
        return sentences(details, facts.Database(state="up"))

    def test_fresh(self) -> None:
        """It is the age with its limit, and the generation."""
        self.assertEqual(
            self.why(),
            [
                "products is fresh: it is 1.00 s old, the limit is 60 s.",
                "Generation 3 with 1 row is served, as of 2026-01-02T03:04:05+00:00 by the database's clock.",
            ],
        )

    def test_stale_and_expired(self) -> None:
        """What readers get depends on on_expired, once the dataset is expired."""
        good = "Readers get the last good snapshot."
        self.assertIn(f"its interval is 10 s. {good}", self.why(state="stale", age_s=16.0)[0])
        self.assertIn(f"the limit is 60 s. {good}", self.why(state="expired", age_s=61.0)[0])
        settings = declared("products").model_copy(update={"on_expired": "refuse"})
        refusing = replace(self.details, settings=settings)
        self.assertIn("the limit is 60 s. Readers get an error.", self.why(refusing, state="expired", age_s=61.0)[0])

    def test_never_loaded(self) -> None:
        """Readers get nothing, and nothing is served."""
        sentences = self.why(state="never_loaded", age_s=None, as_of=None, next_refresh_in_s=3.0)
        self.assertEqual(
            sentences,
            [
                "products has never been loaded, so readers get nothing from it yet.",
                "The next attempt starts in 3.00 s.",
            ],
        )

    def test_commands_of_operators(self) -> None:
        """A pin with its candidate, a roll back and an accepted result each have a sentence."""
        details = replace(self.details, candidate_rows=2, rolled_back_to=7, accepts_next=True)
        pinned = "It is pinned by an operator: nothing newer is served"
        sentences = self.why(details, pinned=True)
        self.assertIn(f"{pinned}; a result with 2 rows waits for 'unpin products'.", sentences)
        self.assertIn("It was rolled back to the saved generation 7.", sentences)
        self.assertIn(
            "The next result is published even if a gate refuses it, because an operator accepted it.", sentences
        )
        self.assertIn(f"{pinned}.", self.why(pinned=True))

    def test_a_failure(self) -> None:
        """It has the error, how often, who blocks it, and the step, in that order."""
        reason = {"error": "waited for a lock", "advice": "end the session", "blocked_by": ("session 7",)}
        attempt = facts.Attempt("failed", "retry", MOMENT, 1.0, **reason)  # type: ignore[arg-type]
        details = replace(self.details, last_ended_s=2.0)
        failing: dict[str, object] = {"last_attempt": attempt, "consecutive_failures": 2}
        self.assertEqual(
            self.why(details, **failing)[2:],
            [
                "The last attempt failed 2.00 s ago, after 1.00 s: waited for a lock.",
                "It has failed twice in a row.",
                "It was blocked: session 7.",
                "What to do: end the session.",
            ],
        )

    def test_a_fleet(self) -> None:
        """It names the leader, why the process is alone, what is wrong, and the next step."""
        replica = facts.Fleet("replica", "cache-2", 17, "cache-1", 0, 0.5)
        for expected, fleet in (
            (
                "cache-1 leads it, epoch 17; this process, cache-2, serves the results, the last ones as of 0.50 s "
                "ago. Send commands such as pin to cache-1.",
                replica,
            ),
            (
                "This process, cache-2, leads it, epoch 17: it refreshes products, and publishes the results for the "
                "fleet.",
                replace(replica, role="leader", leader="cache-2"),
            ),
            (
                "This process, cache-2, refreshes it alone and for itself only, at three times its interval, because "
                "no new results of a leader have come for 90 s. The last known leader is cache-1, epoch 17. It follows "
                "a leader again as soon as its results come.",
                replace(replica, role="alone", leader_silent_s=90.0),
            ),
            (
                "No leader is known; this process, cache-2, has waited for results for 5.00 s.",
                replace(replica, leader=None, epoch=None, leader_silent_s=5.0),
            ),
            (
                "This process, cache-2, led it, epoch 17, and has lost the lead; the next leader is not known yet.",
                replace(replica, leader="cache-2"),
            ),
            (
                "The leader has published 2 generations that this process lacks.",
                replace(replica, lag_generations=2),
            ),
            ("The Valkey cannot be used: refused. Readers get", replace(replica, valkey_problem="refused")),
            ("Its results cannot be published: OOM. Other", replace(replica, publish_problem="OOM")),
            ("This process cannot win a lead: a standby.", replace(replica, lead_problem="a standby")),
        ):
            self.assertIn(expected, " ".join(self.why(fleet=fleet)))

    def test_the_next_attempt(self) -> None:
        """It is running, delayed, due, or planned."""
        for expected, more in (
            ("A refresh is running now and has read 5 of about 1,000 rows.", {"progress": facts.Progress(5, 1000)}),
            ("A refresh is running now and has read 5 rows.", {"progress": facts.Progress(5, None)}),
            ("A refresh has been due for 2.00 s and waits, because", {"behind_s": 2.0, "refreshing": True}),
            ("A refresh is due now and waits for one of the postgres.max_connections", {"refreshing": True}),
            ("The next attempt starts in 2.00 s.", {"next_refresh_in_s": 2.0}),
        ):
            self.assertIn(expected, self.why(**more)[-1])

    def test_listening(self) -> None:
        """With notify, it is whether notifications arrive, and the reason if not; nothing if none are wanted."""
        wanted = facts.Database(state="up", listening_wanted=True)
        proven = replace(wanted, listening=True, listening_proven_s=3.0)
        self.assertIsNone(listening(facts.Database(state="up")))
        for database, deltas_work, begins in (
            (proven, True, "Changes arrive as notifications: the service is listening, tested 3.00 s ago."),
            (proven, False, "The service is listening, tested 3.00 s ago, but it may see some changes only"),
            (wanted, True, "The service is not listening yet;"),
            (replace(wanted, listening_problem="a pooler"), True, "Notifications do not arrive: a pooler."),
        ):
            self.assertIn(begins, listening(database, deltas_work=deltas_work) or "")

    def test_skipped_starts(self) -> None:
        """They are counted."""
        for count, expected in ((1, "1 scheduled refresh was"), (2, "2 scheduled refreshes were")):
            details = replace(self.details, missed_ticks=count)
            self.assertIn(f"{expected} skipped, because the previous one was still running.", self.why(details))

    def test_the_advice_follows_its_problem(self) -> None:
        """That of a failure comes before a result held earlier, that of the held result after it."""
        held = facts.Held("would drop rows", MOMENT, 1)
        for outcome, before in (("failed", True), ("held", False)):
            attempt = facts.Attempt(outcome, "interval", MOMENT, 1.0, error="e", advice="look")
            sentences = self.why(held=held, last_attempt=attempt, consecutive_failures=int(before))
            todo = sentences.index("What to do: look.")
            found = next(number for number, text in enumerate(sentences) if "has been held for" in text)
            self.assertEqual(todo < found, before)
            self.assertEqual(sentences.count("What to do: look."), 1)


class Words(SynchronousTestCase):
    def test_durations(self) -> None:
        """Two units at most, the larger one first."""
        for value_s, expected in (
            (-1.0, "0.00 s"), (0.123, "0.12 s"), (9.99, "9.99 s"), (47.4, "47 s"), (119.4, "119 s"), (120.0, "2 min"),
            (200.0, "3 min 20 s"), (7200.0, "2 h"), (18120.0, "5 h 2 min"), (172800.0, "2 d"), (273600.0, "3 d 4 h"),
        ):  # fmt: skip
            self.assertEqual(units.duration(value_s), expected)

    def test_sizes(self) -> None:
        """Powers of 1024."""
        for count, expected in ((512, "512 B"), (2048, "2.0 KiB"), (1_992_294, "1.9 MiB"), (5 << 40, "5120.0 GiB")):
            self.assertEqual(units.size(count), expected)

    def test_a_blocker(self) -> None:
        """A description omits what the role may not see."""
        self.assertEqual(
            str(replace(BLOCKER, user=None, lock_mode=None, relation=None, transaction_since=None, state="active")),
            "session 42 (psql) holds the lock, active, running UPDATE",
        )
        prepared = Blocker(0, None, None, None, None, None, None, None)
        self.assertEqual(str(prepared), "a prepared transaction (pg_prepared_xacts) holds the lock")

    def test_the_last_attempt(self) -> None:
        """A failure has its error, any other outcome its duration."""
        dataset = filled_cache().dataset("prices")
        self.assertEqual(units.last_attempt(collect.dataset(dataset)), "failed twice: a lock was not granted")
        dataset.attempted(Attempt("unchanged", "retry", MOMENT, 0.25))
        self.assertEqual(units.last_attempt(collect.dataset(dataset)), "unchanged in 0.25 s")
