"""Laws of `cacheservice status`: the judgement, the table, and the line of the monitoring plugin, on values."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli import picture
from cacheservice.cli.client import Address
from cacheservice.cli.picture import Picture
from cacheservice.views import plugin
from cacheservice.views.facts import (
    Attempt,
    Change,
    ConnectionCap,
    Database,
    Dataset,
    Facts,
    Held,
    Lag,
    Rejection,
    Service,
)
from cacheservice.views.problems import problems

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PUBLISHED = Attempt("published", "interval", MOMENT, 0.1)
FRESH = Dataset(
    name="a",
    state="fresh",
    interval_s=60.0,
    timeout_s=30.0,
    max_age_s=1800.0,
    as_of=MOMENT,
    age_s=1.0,
    last_attempt=PUBLISHED,
)
NEVER_LOADED = Dataset(name="a", state="never_loaded", interval_s=60.0, timeout_s=30.0, max_age_s=1800.0)


def facts(*datasets: Dataset, database: Database | None = None, **service: Any) -> Facts:
    """Return the facts about a service with these datasets."""
    return Facts(
        MOMENT + timedelta(seconds=1),
        Service("1.0", ready=True, **service),
        database or Database(state="up"),
        {dataset.name: dataset for dataset in datasets},
    )


def drawn(seen: Facts, width: int = 200, height: int | None = None, *, bars: bool = False) -> str:
    """Return the picture as text."""
    console = Console(width=width)
    with console.capture() as capture:
        console.print(picture.render(Picture(Address("h", 1), seen), width, bars=bars, height=height))
    return capture.get()


class Judgement(SynchronousTestCase):
    """What is wrong, by the facts about a service."""

    def assert_warns(self, dataset: Dataset, *words: str) -> None:
        """Assert that a dataset is a WARNING with these words, and without the fault none."""
        level, line = plugin.verdict(facts(dataset))
        self.assertEqual(level, 1)
        for each in words:
            self.assertIn(each, line)
        self.assertEqual(plugin.verdict(facts(FRESH))[0], 0)

    def test_a_dataset_that_cannot_be_saved(self) -> None:
        """It is a WARNING with the reason, although the data are fresh."""
        problem = "/saved: No space left on device"
        self.assert_warns(replace(FRESH, save_problem=problem), "a not saved, 1.00 s old", f"saving fails: {problem}")

    def test_a_dataset_of_uncertain_age(self) -> None:
        """It is a WARNING with the reason, although it seems fresh."""
        uncertain = "it was saved on another machine"
        reason = f"the age is uncertain until the next refresh: {uncertain}"
        self.assert_warns(replace(FRESH, age_uncertain=uncertain), "a of uncertain age, 1.00 s old", reason)

    def test_a_failing_dataset(self) -> None:
        """The problem has the error, the blocking session, the next step and the next attempt, each by itself."""
        lock = Attempt(
            "failed",
            "retry",
            MOMENT,
            0.5,
            error="waited, for a lock",
            advice="end the session, or wait",
            blocked_by=("session 7",),
        )
        failing = replace(FRESH, last_attempt=lock, consecutive_failures=2, next_refresh_in_s=3.0)
        (found,) = problems(facts(failing))
        self.assertEqual((found.what, found.figures), ("failing", "1.00 s old, limit 30 min"))
        self.assertEqual(found.reasons[0], "failed twice, 0.50 s ago: waited, for a lock")
        self.assertEqual((found.blocked_by, found.todo), (("session 7",), "end the session, or wait"))
        self.assertEqual(found.next, "in 3.00 s")
        said = drawn(facts(failing))
        for label, words in (("why", lock.error), ("", "session 7"), ("do", lock.advice), ("next", "in 3.00 s")):
            self.assertRegex(said, rf"(?m)^  {label} +.*{words} *$")

    def test_the_step_for_a_held_result(self) -> None:
        """It is shown while the result is held, and not of a pinned dataset, whose candidate just waits."""
        attempt = Attempt("held", "interval", MOMENT, 0.5, error="would drop rows", advice="accept a")
        held = replace(FRESH, last_attempt=attempt, held=Held("would drop rows", MOMENT, 1))
        (found,) = problems(facts(held))
        self.assertEqual((found.what, found.todo), ("held", "accept a"))
        pinned = replace(FRESH, last_attempt=attempt, pinned=True, save_problem="x")
        self.assertEqual(problems(facts(pinned))[0].todo, "")

    def test_listening_and_a_refused_configuration(self) -> None:
        """Both are warnings, with the reason."""
        listening = Database(state="up", listening_wanted=True, listening=True)
        self.assertEqual(problems(facts(FRESH, database=listening)), [])
        reason = "refused, configuration of pg_hba"
        deaf = replace(listening, listening=False, listening_problem=reason)
        rejection = Rejection("x.toml: a, NOT listening: b", 2.0)
        found = problems(facts(FRESH, database=deaf, rejection=rejection))
        self.assertEqual(
            [(each.severity, each.what) for each in found],
            [
                (1, f"notifications do not arrive, NOT listening: {reason}"),
                (1, "the newest configuration was rejected 2.00 s ago: x.toml: a, NOT listening: b"),
            ],
        )
        self.assertEqual(problems(facts(FRESH, database=deaf), ("a",)), [])

    def test_a_standby(self) -> None:
        """It cannot listen or prune, which is not a warning; how far it is behind, and why, is shown everywhere."""
        deaf = Database(
            state="up",
            listening_wanted=True,
            listening_problem="a standby",
            prune_problem="a standby",
            standby=Lag(0.0, True, ""),
        )
        level, line = plugin.verdict(facts(FRESH, database=deaf))
        fine = "CACHESERVICE OK - 1 dataset fresh, PostgreSQL up, a standby"
        self.assertEqual((level, line.partition(" | ")[0]), (0, fine))
        late = facts(FRESH, database=replace(deaf, standby=Lag(15.0, True, "replay is paused | on the standby")))
        level, line = plugin.verdict(late)
        self.assertEqual(
            (level, line.partition(" | ")[0]),
            (0, f"{fine} up to 15 s behind: replay is paused / on the standby"),
        )
        self.assertIn("PostgreSQL up, up 0.00 s, a standby up to 15 s behind: replay is paused", drawn(late))
        expired = replace(FRESH, state="expired", age_s=1900.0, standby=Lag(15.0, False, "replay is paused"))
        level, line = plugin.verdict(facts(expired, database=deaf))
        self.assertEqual(level, 2)
        words = "read from a standby perhaps up to 15 s behind: replay is paused"
        self.assertIn(f"a expired, 31 min 40 s old, limit 30 min, {words}", line)
        self.assertRegex(drawn(facts(expired, database=deaf)), f"why +{words}")

    def test_problems_of_the_service(self) -> None:
        """Clients that are capped, and recorded changes that pile up, are warnings."""
        database = Database(state="up", prune_problem="permission denied for function prune")
        seen = facts(FRESH, database=database, connection_cap=ConnectionCap(5, 10_000, 45))
        level, line = plugin.verdict(seen)
        self.assertEqual(level, 1)
        capped = "clients capped at 5 of 10,000 by the limit of 45 open files: raise the limit of open files, or lower"
        pruned = "old recorded changes are not deleted: permission denied for function prune"
        for text in (capped, pruned):
            self.assertIn(text, line)
            self.assertIn(text, drawn(seen))

    def test_a_required_dataset(self) -> None:
        """One that was never loaded is critical, another one a warning."""
        for not_ready, severity in (({"a": "never_loaded"}, 2), ({}, 1)):
            (found,) = problems(facts(NEVER_LOADED, not_ready=not_ready))
            self.assertEqual((found.severity, str(found)), (severity, "never loaded, readers get nothing"))


class PluginLine(SynchronousTestCase):
    def test_levels(self) -> None:
        """The line begins with the worst problem's level, and the exit code is that level."""
        stale = replace(FRESH, name="b", state="stale", age_s=100.0)
        expired = replace(FRESH, name="c", state="expired", age_s=1900.0)
        for datasets, level, word, begins in (
            ((FRESH,), 0, "OK", "1 dataset fresh, PostgreSQL up"),
            ((FRESH, stale), 1, "WARNING", "b stale, 100 s old, limit 30 min"),
            ((FRESH, stale, expired), 2, "CRITICAL", "c expired, 31 min 40 s old, limit 30 min; b stale"),
        ):
            found, line = plugin.verdict(facts(*datasets))
            self.assertEqual(found, level)
            self.assertTrue(line.startswith(f"CACHESERVICE {word} - {begins}"), line)

    def test_a_service_that_does_not_answer(self) -> None:
        """It is critical; wrong usage is unknown. Each is one line without a bar."""
        level, line = plugin.no_answer("refused |\nthe connection")
        self.assertEqual((level, line), (2, "CACHESERVICE CRITICAL - refused / the connection"))
        self.assertEqual(plugin.unknown("a |\nb"), "CACHESERVICE UNKNOWN - a / b")

    def test_some_datasets_only(self) -> None:
        """With names, neither other datasets nor the service count, and the figures are without the service."""
        expired = replace(FRESH, name="b", state="expired", age_s=1900.0)
        seen = facts(FRESH, expired, database=Database(state="down", error="refused"))
        level, line = plugin.verdict(seen, ("a",))
        self.assertEqual(level, 0)
        self.assertIn(" | fresh=1;;;0;1 stale=0;;;0;1 ", line)
        self.assertNotIn("ready=", line)
        self.assertEqual(plugin.verdict(seen, ("b",))[0], 2)

    def test_figures_by_detail(self) -> None:
        """The summary has the service and the counts, all has four figures of each dataset, none has no bar."""
        datasets = (replace(FRESH, rows=2, bytes=5), replace(NEVER_LOADED, name="b", consecutive_failures=3))
        seen = facts(*datasets)
        self.assertNotIn("|", plugin.verdict(seen, (), "none")[1])
        self.assertEqual(
            plugin.verdict(seen)[1].partition(" | ")[2],
            "ready=1;;;0;1 fresh=1;;;0;2 stale=0;;;0;2 expired=0;;;0;2 never_loaded=1;;;0;2 held=0;0;;0;2 "
            "failing=1;0;;0;2 age_of_limit=0.056%;;100;0",
        )
        self.assertEqual(
            plugin.verdict(seen, (), "all")[1].partition(" | ")[2],
            "ready=1;;;0;1 a_age=1s;90;1800;0 a_rows=2;;;0 a_bytes=5B;;;0 a_failures=0;0;;0 "
            "b_age=U;90;1800;0 b_rows=0;;;0 b_bytes=0B;;;0 b_failures=3;0;;0",
        )
        self.assertIn("age_of_limit=U;;100;0", plugin.verdict(facts(NEVER_LOADED))[1])

    def test_a_line_for_agents(self) -> None:
        """With a hundred datasets that all fail the plugin's line stays below 1,024 bytes."""
        attempt = Attempt("failed", "retry", MOMENT, 3.0, error="a reason that goes on " * 20)
        one = replace(FRESH, state="expired", age_s=86400.0 * 365, consecutive_failures=3, last_attempt=attempt)
        names = [f"dataset_with_a_rather_long_name_{number}" for number in range(100)]
        level, line = plugin.verdict(facts(*(replace(one, name=name) for name in names)))
        self.assertEqual(level, 2)
        self.assertLess(len(line.encode()), 1024)
        self.assertIn("and 95 more", line)

    def test_figures_have_no_exponent(self) -> None:
        """The guidelines allow digits and a point."""
        seen = facts(replace(FRESH, age_s=12345678.5, max_age_s=1e7, interval_s=1e6, timeout_s=0.25))
        _, line = plugin.verdict(seen, ("a",), "all")
        self.assertIn("a_age=12345678.5s;1000000.25;10000000;0", line)
        self.assertIn("age_of_limit=123.457%", plugin.verdict(seen)[1])

    def test_it_has_one_bar(self) -> None:
        """Whatever an error contains, the output stays one line with one bar before the performance data."""
        _, line = plugin.verdict(facts(FRESH, database=Database(state="down", error="refused | so\nit says")))
        self.assertEqual(line.count("|"), 1)
        self.assertNotIn("\n", line)
        self.assertIn("refused / so it says", line)


class Drawing(SynchronousTestCase):
    def test_a_publish_without_a_row(self) -> None:
        """The first load of an empty table is "no rows"; if only the columns differ, no row differs."""
        for rows, expected in ((0, "published in 0.10 s (no rows)"), (3, "published in 0.10 s (no row differs)")):
            self.assertIn(expected, drawn(facts(replace(FRESH, rows=rows, last_change=Change(0, 0, 0)))))

    def test_a_screen_gets_no_more_than_it_shows(self) -> None:
        """Of many datasets, a screen that is redrawn gets its height of lines in the table, and problems in full on
        half of it; the others are counted."""
        said = drawn(facts(*(replace(NEVER_LOADED, name=f"d{n}") for n in range(500))), 80, 24, bars=True)
        self.assertEqual(len(re.findall(r"(?m)^d\d+ never loaded,", said)), 2)
        self.assertIn("and 498 more datasets have problems", said)
        self.assertEqual(len(re.findall(r"(?m)^d\d+ +never loaded +–", said)), 24)
