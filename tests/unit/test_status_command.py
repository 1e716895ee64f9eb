"""Laws of the judgement of cacheservice check."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Console
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.cache import Cache, Rejection
from cacheservice.cache.identity import ServerIdentity
from cacheservice.cache.lag import Lag
from cacheservice.cli import picture, plugin
from cacheservice.cli.asking import Address, Answer
from cacheservice.cli.problems import problems
from cacheservice.config import DatasetSettings
from cacheservice.ports.report import json_line


class Judgement(SynchronousTestCase):
    """What is wrong, by answers that a service would give."""

    def answer(self, **changes: Any) -> Answer:
        clock = Clock()
        cache = Cache([DatasetSettings(name=name, query="SELECT 1", key=("id",)) for name in ("a", "b")], clock.seconds)
        for name, value in changes.items():
            setattr(cache.database, name, value) if name != "rejection" else setattr(cache, name, value)
        return Answer(0.0, "", json.loads(json_line(cache)))

    def fresh(self, answer: Answer, **more: Any) -> Answer:
        """The answer with one dataset, which is fresh."""
        one = answer.facts["datasets"]["a"] | {"state": "fresh", "age_s": 1.0, "as_of": "2026-01-01T00:00:00+00:00"}
        one["last_attempt"] = {"outcome": "published", "error": None, "started_at": one["as_of"], "took_s": 0.1}
        return answer._replace(facts={**answer.facts, "datasets": {"a": one | more}})

    def test_a_line_for_agents(self) -> None:
        """With a hundred datasets that all fail the plugin's line stays below 1,024 bytes."""
        facts = self.answer().facts
        one = facts["datasets"]["a"] | {"state": "expired", "age_s": 86400.0 * 365, "consecutive_failures": 3}
        one["as_of"] = "2026-01-01T00:00:00+00:00"
        one["last_attempt"] = {"error": "a reason that goes on " * 20, "started_at": one["as_of"], "took_s": 3.0}
        datasets = {f"dataset_with_a_rather_long_name_{number}": one for number in range(100)}
        level, line = plugin.verdict(Answer(0.0, "", {**facts, "datasets": datasets}))
        self.assertEqual(level, 2)
        self.assertLess(len(line.encode()), 1024)
        self.assertIn("and 95 more", line)

    def test_a_dataset_that_cannot_be_saved(self) -> None:
        """It is a WARNING with the reason, although the data are fresh. Older services do not report it."""
        facts = self.answer().facts
        fresh = facts["datasets"]["a"] | {"state": "fresh", "age_s": 1.0, "as_of": "2026-01-01T00:00:00+00:00"}
        fresh["last_attempt"] = {"outcome": "published", "error": None, "started_at": fresh["as_of"], "took_s": 0.1}
        for problem, expected in (("/saved: No space left on device", 1), (None, 0)):
            datasets = {"a": fresh | {"save_problem": problem}}
            level, line = plugin.verdict(Answer(0.0, "", {**facts, "datasets": datasets}))
            self.assertEqual(level, expected)
            self.assertEqual(
                "a not saved, 1.00 s old" in line and "saving fails: /saved: No space left on device" in line,
                bool(problem),
            )
            self.assertEqual(line.count("not saved"), int(bool(problem)))
        del datasets["a"]["save_problem"]
        self.assertEqual(plugin.verdict(Answer(0.0, "", {**facts, "datasets": datasets}))[0], 0)

    def test_a_dataset_of_uncertain_age(self) -> None:
        """It is a WARNING with the reason, although it seems fresh. Older services do not report it."""
        facts = self.answer().facts
        fresh = facts["datasets"]["a"] | {"state": "fresh", "age_s": 1.0, "as_of": "2026-01-01T00:00:00+00:00"}
        for uncertain, expected in (("it was saved on another machine", 1), (None, 0)):
            datasets = {"a": fresh | {"age_uncertain": uncertain}}
            level, line = plugin.verdict(Answer(0.0, "", {**facts, "datasets": datasets}))
            self.assertEqual(level, expected)
            reason = f"the age is uncertain until the next refresh: {uncertain}"
            self.assertEqual("a of uncertain age, 1.00 s old" in line and reason in line, bool(uncertain))
        del datasets["a"]["age_uncertain"]
        self.assertEqual(plugin.verdict(Answer(0.0, "", {**facts, "datasets": datasets}))[0], 0)

    def test_a_publish_without_a_row(self) -> None:
        """The first load of an empty table is "no rows"; with other columns alone, no row differs."""
        facts = self.answer().facts
        one = facts["datasets"]["a"] | {"state": "fresh", "age_s": 1.0, "as_of": "2026-01-01T00:00:00+00:00"}
        one["last_attempt"] = {"outcome": "published", "error": None, "started_at": one["as_of"], "took_s": 0.1}
        one["last_change"] = {"added": 0, "changed": 0, "removed": 0}
        for rows, expected in ((0, "published in 0.10 s (no rows)"), (3, "published in 0.10 s (no row differs)")):
            answer = Answer(0.0, "", {**facts, "datasets": {"a": one | {"rows": rows}}})
            console = Console(width=200)
            with console.capture() as capture:
                console.print(picture.render(picture.Picture(Address("h", 1), answer, {}), 200, bars=False))
            self.assertIn(expected, capture.get())

    def test_figures_have_no_exponent(self) -> None:
        """The guidelines allow digits and a point."""
        facts = self.answer().facts
        one = facts["datasets"]["a"] | {"age_s": 12345678.5, "max_age_s": 1e7, "interval_s": 1e6, "timeout_s": 0.25}
        answer = Answer(0.0, "", {**facts, "datasets": {"a": one}})
        _, line = plugin.verdict(answer, ("a",), "all")
        self.assertIn("a_age=12345678.5s;1000000.25;10000000;0", line)
        self.assertIn("age_of_limit=123.457%", plugin.verdict(answer)[1])

    def test_listening_and_a_refused_configuration(self) -> None:
        """Both are warnings, with the reason; a service of an older version reports neither."""
        self.assertEqual(problems(self.fresh(self.answer(listening_wanted=True, listening=True))), [])
        broken = {"listening_wanted": True, "listening_problem": "refused, configuration of pg_hba"}
        deaf = "notifications do not arrive, NOT listening: refused, configuration of pg_hba"
        rejection = Rejection(("x.toml: a, NOT listening: b",), 0.0)
        rejected = "the newest configuration rejected 0.00 s ago: x.toml: a, NOT listening: b"
        answer = self.answer(**broken, rejection=rejection)
        self.assertEqual(
            [(each.severity, each.what) for each in problems(self.fresh(answer))], [(1, deaf), (1, rejected)]
        )
        older = self.fresh(answer)
        del older.facts["postgres"]["listening_problem"], older.facts["service"]["configuration_rejected"]
        self.assertEqual(problems(older), [])

    def test_a_standby(self) -> None:
        """It cannot listen or prune, which is no warning; how far it is behind, and why, is shown everywhere."""
        server = ServerIdentity("shop", 5, "reader", in_recovery=True, started_us=1)
        deaf = {"listening_wanted": True, "listening_problem": "a standby", "prune_problem": "a standby"}
        answer = self.fresh(self.answer(state="up", server=server, **deaf))
        level, line = plugin.verdict(answer)
        fine = "CACHESERVICE OK - 1 dataset fresh, PostgreSQL up, a standby"
        self.assertEqual((level, line.partition(" | ")[0]), (0, fine))
        lag = Lag(15.0, True, "replay is paused | on the standby")
        answer = self.fresh(self.answer(state="up", server=server, lag=lag, **deaf))
        level, line = plugin.verdict(answer)
        self.assertEqual(
            (level, line.partition(" | ")[0]),
            (0, f"{fine} up to 15 s behind: replay is paused / on the standby"),
        )
        self.assertIn("PostgreSQL up, up 0.00 s, a standby up to 15 s behind: replay is paused", self.drawn(answer))
        behind = {"lag_s": 15.0, "known": False, "problem": "replay is paused"}
        answer = self.fresh(answer, state="expired", age_s=1900.0, standby=behind)
        level, line = plugin.verdict(answer)
        self.assertEqual(level, 2)
        words = "read from a standby perhaps up to 15 s behind: replay is paused"
        self.assertIn(f"a expired, 31 min 40 s old, limit 30 min, {words}", line)
        self.assertRegex(self.drawn(answer), f"why +{words}")

    def test_problems_of_the_service(self) -> None:
        """Clients that are capped, and recorded changes that pile up, are warnings."""
        answer = self.fresh(self.answer(state="up", prune_problem="permission denied for function prune"))
        answer.facts["service"]["connection_cap"] = {"limit": 5, "configured": 10_000, "open_files": 45}
        level, line = plugin.verdict(answer)
        self.assertEqual(level, 1)
        capped = "clients capped at 5 of 10,000 by the limit of 45 open files: raise the limit of open files, or lower"
        pruned = "old recorded changes are not deleted: permission denied for function prune"
        for text in (capped, pruned):
            self.assertIn(text, line)
            self.assertIn(text, self.drawn(answer))

    def drawn(self, answer: Answer) -> str:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(picture.render(picture.Picture(Address("h", 1), answer, {}), 200, bars=False))
        return capture.get()

    def test_a_screen_gets_no_more_than_it_shows(self) -> None:
        """Of many datasets, a screen that is drawn again and again gets its height of lines in the table, and problems
        written out on half of it; the number of the others is told."""
        clock = Clock()
        cache = Cache([DatasetSettings(name=f"d{n}", query="SELECT 1", key=("id",)) for n in range(500)], clock.seconds)
        answer = Answer(0.0, "", json.loads(json_line(cache)))
        drawn = picture.render(picture.Picture(Address("h", 1), answer, {}), 80, bars=True, height=24)
        console = Console(width=80)
        with console.capture() as capture:
            console.print(drawn)
        said = capture.get()
        self.assertEqual(len(re.findall(r"(?m)^d\d+ never loaded,", said)), 2)
        self.assertIn("and 498 more datasets have problems", said)
        self.assertEqual(len(re.findall(r"(?m)^d\d+ +never loaded +–", said)), 24)

    def test_the_line_of_a_plugin_has_one_bar(self) -> None:
        """Whatever an error says, the plugin's output stays one line with one bar before the performance data."""
        answer = self.answer(state="down", error="refused | so\nit says")
        _, line = plugin.verdict(answer)
        self.assertEqual(line.count("|"), 1)
        self.assertNotIn("\n", line)
        self.assertIn("refused / so it says", line)
