"""Laws of how much of a dataset an attempt reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cache.snapshot import Snapshot
from cacheservice.sources.base import ReadPlan
from cacheservice.sources.full_or_delta import (
    AskChanges,
    AskNotified,
    AskProbe,
    Changes,
    Known,
    NotifiedRows,
    ReadAll,
    ReadKeys,
    ReadNothing,
    ReadNotified,
    Step,
    next_step,
    plan,
)
from tests.kit.datasets import MOMENT, declared, rows_of

WATCH = [{"table": "products", "key": "id"}]
PROBE = "SELECT max(n) FROM products"
SAME, OTHER = "=1", "=2"
SINCE = Snapshot(1, rows_of({b"1": b"{}"}), MOMENT, 0.0, "1:1:", probe=SAME)
NOTHING_ALTERED = Known(None, can_capture=True)


async def _no_keys() -> frozenset[str] | None:
    return frozenset()


def read(
    *, notified: bool = False, since: Snapshot | None = SINCE, keys: dict[str, Any] | None = None, **more: Any
) -> ReadPlan:
    """A plan for a delta of at most ten keys."""
    settings = declared("products", **(keys or {}))
    wait = _no_keys if notified else None
    return ReadPlan(settings, lambda: None, since=since, most_keys=10, notified=wait, **more)  # type: ignore[arg-type]


def changes(*keys: str, problem: str | None = None) -> Changes:
    return Changes("{}", problem, tuple((key,) for key in keys))


class WithinATransaction(SynchronousTestCase):
    def steps(self, plan_: ReadPlan, known: Known, **facts: Any) -> list[Step]:
        """The steps until the end; each fact is known once it was asked for."""
        asks = {AskProbe: "probe", AskChanges: "changes", AskNotified: "notified"}
        steps = [next_step(plan_, known)]
        while type(steps[-1]) in asks:
            name = asks[type(steps[-1])]
            known = replace(known, **{name: facts[name]})
            steps.append(next_step(plan_, known))
        return steps

    def last(self, plan_: ReadPlan, known: Known = NOTHING_ALTERED, **facts: Any) -> Step:
        return self.steps(plan_, known, **facts)[-1]

    def test_without_anything_to_follow(self) -> None:
        """A dataset without watch, probe and notify is read in full, without a question."""
        self.assertEqual(self.steps(read(), NOTHING_ALTERED), [ReadAll(None)])

    def test_a_probe(self) -> None:
        """The same value means that nothing has changed; another value, a doubt or an alteration means a full read."""
        keys = {"probe": PROBE}
        self.assertEqual(self.last(read(keys=keys), probe=SAME), ReadNothing())
        self.assertEqual(self.last(read(keys=keys), probe=OTHER), ReadAll(None))
        self.assertEqual(self.last(read(keys=keys, trust_probe=False), probe=SAME), ReadAll(None))
        altered = Known("view v was replaced", can_capture=False)
        self.assertEqual(self.last(read(keys=keys), altered, probe=SAME), ReadAll("view v was replaced"))
        self.assertEqual(self.last(read(keys=keys, since=None), probe=SAME), ReadAll(None))

    def test_a_check_of_the_probe(self) -> None:
        """It reads everything; with the same value no row may differ."""
        check = read(keys={"probe": PROBE}, check=True)
        self.assertEqual(self.last(check, probe=SAME), ReadAll("it is a check of the probe", may_differ=()))
        self.assertEqual(self.last(check, probe=OTHER), ReadAll("it is a check of the probe"))

    def test_recorded_changes(self) -> None:
        """The recorded keys are read, or nothing if there are none."""
        watching = read(keys={"watch": WATCH})
        self.assertEqual(self.last(watching, changes=changes("7", "8")), ReadKeys((("7",), ("8",))))
        self.assertEqual(self.last(watching, changes=changes()), ReadNothing())

    def test_when_a_delta_becomes_a_full_read(self) -> None:
        """Too many keys, a problem, an alteration, an earlier reason, and a check each make a full read."""
        watching = read(keys={"watch": WATCH})
        many = changes(*map(str, range(11)))
        reason = "more than 10 keys changed, see max_delta"
        self.assertEqual(self.last(watching, changes=many), ReadAll(reason, no_delta=reason))
        self.assertEqual(self.last(watching, changes=changes(problem="off")), ReadAll("off", no_delta="off"))
        altered = Known("view v was replaced", can_capture=True)
        self.assertEqual(self.last(watching, altered, changes=changes("7")), ReadAll("view v was replaced"))
        again = read(keys={"watch": WATCH}, since=None, because="keys do not fit")
        self.assertEqual(self.last(again, changes=changes("7")), ReadAll("keys do not fit"))
        check = read(keys={"watch": WATCH}, check=True)
        self.assertEqual(
            self.last(check, changes=changes("7")), ReadAll("it is a check of the deltas", may_differ=(("7",),))
        )

    def test_a_probe_does_not_hide_recorded_changes(self) -> None:
        """With both, recorded changes are asked for although the probe is the same, unless they cannot be."""
        both = read(keys={"watch": WATCH, "probe": PROBE})
        self.assertEqual(self.last(both, probe=SAME, changes=changes("7")), ReadKeys((("7",),)))
        self.assertEqual(self.last(both, Known(None, can_capture=False), probe=SAME), ReadNothing())

    def test_notified_rows(self) -> None:
        """Only named rows are read, if they are few and the snapshot can be followed."""
        notified = read(notified=True, keys={"notify": "things"})
        few, many = frozenset({"1"}), frozenset(map(str, range(11)))
        self.assertEqual(self.last(notified, notified=NotifiedRows(few)), ReadNotified(few))
        self.assertEqual(self.last(notified, notified=NotifiedRows(many)), ReadAll(None))
        self.assertEqual(self.last(notified, notified=NotifiedRows(None)), ReadAll(None))
        self.assertEqual(self.last(notified, Known("altered", can_capture=False)), ReadAll("altered"))

    @given(
        st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
        st.none() | st.just("altered"), st.sampled_from([SAME, OTHER]), st.integers(0, 20), st.booleans(),
    )  # fmt: skip
    def test_always(  # one for each fact
        self,
        watch: bool,
        probe: bool,
        notify: bool,
        has_base: bool,
        check: bool,
        trust_probe: bool,
        altered: str | None,
        value: str,
        key_count: int,
        can_capture: bool,
    ) -> None:
        """It ends after three questions at most, and reads less than everything only from a snapshot it can follow."""
        keys: dict[str, Any] = {"watch": WATCH} if watch else {}
        keys |= {"probe": PROBE} if probe else {}
        keys |= {"notify": "things"} if notify else {}
        plan_ = read(
            notified=notify, since=SINCE if has_base else None, keys=keys, check=check, trust_probe=trust_probe
        )
        named = [str(number) for number in range(key_count)]
        *asked, last = self.steps(
            plan_,
            Known(altered, can_capture),
            probe=value,
            changes=changes(*named),
            notified=NotifiedRows(frozenset(named)),
        )
        self.assertLessEqual(len(asked), 3)
        self.assertEqual(len(asked), len(set(map(type, asked))))
        if not isinstance(last, ReadAll):
            self.assertTrue(has_base)
            self.assertIsNone(altered)
        if check and (watch or probe) and not notify:
            self.assertIsInstance(last, ReadAll)


class BeforeTheTransaction(SynchronousTestCase):
    def test_what_can_be_followed(self) -> None:
        """Without watch, probe or notify there is nothing to start from."""
        base = SINCE
        for keys, since in (({}, None), ({"probe": PROBE}, base), ({"watch": WATCH}, base), ({"notify": "a"}, base)):
            planned = plan(declared("products", **keys), base, frozenset(), "interval", whole=False, check_is_due=False)
            self.assertEqual(planned.since, since, keys)

    def test_an_operator(self) -> None:
        """A full read that an operator asks for is a check with watch, and starts from nothing otherwise."""
        watching, probing = declared("products", watch=WATCH), declared("products", probe=PROBE)
        self.assertTrue(plan(watching, SINCE, frozenset(), "manual", whole=True, check_is_due=False).check)
        self.assertIsNone(plan(probing, SINCE, frozenset(), "manual", whole=True, check_is_due=False).since)

    def test_no_check_while_somebody_waits(self) -> None:
        """A check that is due waits for an interval or a retry."""
        for trigger, check in (("interval", True), ("retry", True), ("notify", False), ("manual", False)):
            planned = plan(
                declared("products", probe=PROBE), SINCE, frozenset(), trigger, whole=False, check_is_due=True
            )
            self.assertEqual(planned.check, check, trigger)

    def test_notifications(self) -> None:
        """An application's notification beats triggers and probes, which may not have seen that change."""
        watching = declared("products", watch=WATCH, notify="things")
        self.assertIsNone(plan(watching, SINCE, None, "notify", whole=False, check_is_due=False).since)
        probing = declared("products", probe=PROBE, notify="things")
        planned = plan(probing, SINCE, frozenset({"1"}), "notify", whole=False, check_is_due=False)
        self.assertEqual((planned.use_keys, planned.trust_probe), (True, False))
