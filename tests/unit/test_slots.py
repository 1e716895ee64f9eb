"""Laws of slots: which refreshes may run now, and which wait."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, fail, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.errors import Stopped
from cacheservice.refresh.budget import Budget
from cacheservice.refresh.slots import MOST_PASSED_OVER, Slots
from tests.kit.slots import Job


class SlotsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.healthy = True

    def slots(self, limit: int) -> Slots:
        return Slots(limit, lambda: self.healthy, Budget(0.0, Clock()))

    def failed_with(self, job: Job, kind: type[Exception]) -> None:
        assert job.result is not None
        self.failureResultOf(job.result, kind)

    def done(self, job: Job) -> None:
        assert job.result is not None
        self.assertEqual(self.successResultOf(job.result), f"{job.name} done")


class Limit(SlotsTestCase):
    def test_at_most_limit_at_once(self) -> None:
        """No more than `limit` run; each that ends lets one more run, and gets its own result."""
        slots = self.slots(2)
        jobs = [Job(str(number)).ask(slots) for number in range(5)]
        seen = []
        while running := [job for job in jobs if job.running]:
            seen.append(len(running))
            self.assertEqual(slots.queue_depth, sum(job.work is None for job in jobs))
            running[0].end()
        self.assertEqual(seen, [2, 2, 2, 2, 1])
        for job in jobs:
            self.done(job)

    def test_a_failure_gives_the_slot_back(self) -> None:
        """A use that fails, or raises at once, ends with its own error and frees its slot."""
        slots = self.slots(1)
        for use in (lambda: fail(ZeroDivisionError()), lambda: 1 // 0):
            self.failureResultOf(slots.run(lambda: 1.0, lambda: False, use), ZeroDivisionError)  # type: ignore[arg-type]
        self.assertTrue(Job("next").ask(slots).running)

    def test_a_thousand_that_end_at_once(self) -> None:
        """A long queue whose every use ends as soon as it begins is worked off, however deep it is."""
        slots = self.slots(1)
        first = Job("first").ask(slots)
        queue = [slots.run(lambda: 1.0, lambda: False, lambda: succeed("done")) for _ in range(1000)]
        first.end()
        self.assertEqual([self.successResultOf(d) for d in queue], ["done"] * 1000)
        self.assertTrue(Job("next").ask(slots).running)

    @settings(deadline=None)
    @given(st.integers(1, 4), st.booleans(), st.lists(st.integers(0, 7), max_size=80), st.data())
    def test_whatever_the_order(self, limit: int, healthy: bool, steps: list[int], data: st.DataObject) -> None:
        """In whatever order uses start, end, fail or give up: never over the limit, and none is forgotten."""
        self.healthy = healthy
        slots = self.slots(limit)
        jobs: list[Job] = []
        for number, step in enumerate(steps):
            running = [job for job in jobs if job.running]
            waiting = [job for job in jobs if job.work is None and job.result is not None and not job.result.called]
            if step <= 3:
                job = Job(str(number), step, failing=data.draw(st.booleans())).ask(slots)
                assert job.result is not None
                job.result.addErrback(Failure.trap, ValueError, CancelledError)
                jobs.append(job)
            elif step == 4 and running:
                running[0].end()
            elif step == 5 and running:
                assert running[0].work is not None
                running[0].work.errback(ValueError())
            elif running + waiting:
                job = data.draw(st.sampled_from(running + waiting))
                assert job.result is not None
                job.result.cancel()
            self.assertLessEqual(sum(job.running for job in jobs), limit)
        while running := [job for job in jobs if job.running]:
            self.assertLessEqual(len(running), limit)
            running[0].end()
        self.assertEqual(slots.queue_depth, 0)
        for job in jobs:
            assert job.result is not None
            self.assertTrue(job.result.called)


class Order(SlotsTestCase):
    def test_the_greatest_need_first(self) -> None:
        """A slot goes to the greatest need, not to the first to come."""
        slots = self.slots(1)
        first = Job("first").ask(slots)
        low, high, never_loaded = (Job(str(need), need).ask(slots) for need in (0.1, 0.9, float("inf")))
        order = []
        for job in (first, never_loaded, high, low):
            self.assertTrue(job.running)
            order.append(job)
            job.end()

    def test_need_is_asked_at_the_grant(self) -> None:
        """What counts is the need when a slot is free, not when it was asked for."""
        slots = self.slots(1)
        first = Job("first").ask(slots)
        one, other = Job("one", 0.9).ask(slots), Job("other", 0.1).ask(slots)
        one.need, other.need = 0.1, 0.9
        first.end()
        self.assertEqual((one.running, other.running), (False, True))
        other.end()
        one.end()

    def test_equal_needs_in_order(self) -> None:
        """Where needs are equal, as at the start, the first that asked is the first."""
        slots = self.slots(1)
        first = Job("first").ask(slots)
        jobs = [Job(str(number), float("inf")).ask(slots) for number in range(3)]
        first.end()
        for job in jobs:
            self.assertTrue(job.running)
            job.end()


class Failing(SlotsTestCase):
    def test_after_the_healthy(self) -> None:
        """A failing use goes after the others, however great its need; with one slot it still gets its turn."""
        slots = self.slots(1)
        first = Job("first").ask(slots)
        failing = Job("failing", float("inf"), failing=True).ask(slots)
        healthy = Job("healthy", 0.1).ask(slots)
        first.end()
        self.assertEqual((failing.running, healthy.running), (False, True))
        healthy.end()
        self.assertTrue(failing.running)
        failing.end()

    def test_never_the_last_slot(self) -> None:
        """As long as something is healthy, the last free slot waits for it: a failing use does not get it."""
        slots = self.slots(3)
        failing = [Job(f"failing {number}", failing=True).ask(slots) for number in range(4)]
        self.assertEqual([job.running for job in failing], [True, True, False, False])
        healthy = Job("healthy").ask(slots)
        self.assertTrue(healthy.running)
        healthy.end()
        self.assertEqual([job.running for job in failing], [True, True, False, False])
        failing[0].end()
        self.assertEqual([job.running for job in failing[1:]], [True, True, False])
        for job in failing[1:]:
            job.end()

    def test_not_for_ever(self) -> None:
        """Where healthy ones always wait, a failing use has its turn after a number of them, one at a time."""
        for limit in (1, 2):
            slots = self.slots(limit)
            running = [Job("busy").ask(slots) for _ in range(limit)]
            failing = [Job(f"failing {number}", float("inf"), failing=True).ask(slots) for number in range(2)]
            for number in range(MOST_PASSED_OVER):
                running.append(Job(str(number), 0.5).ask(slots))
                running.pop(0).end()
                self.assertEqual([job.running for job in failing], [False, False])
            running += [Job(f"more {number}", 0.5).ask(slots) for number in range(2)]
            running.pop(0).end()
            self.assertEqual([job.running for job in failing], [True, False])
            if limit > 1:  # the other slot is not for failing uses as long as one of them runs
                running.pop(0).end()
                self.assertEqual([job.running for job in failing], [True, False])
            failing[0].end()
            self.assertEqual(failing[1].running, True)
            for job in [*failing[1:], *running]:
                job.end()

    def test_all_slots_where_nothing_is_healthy(self) -> None:
        """Where everything fails, all slots are used."""
        self.healthy = False
        slots = self.slots(2)
        failing = [Job(str(number), failing=True).ask(slots) for number in range(3)]
        self.assertEqual([job.running for job in failing], [True, True, False])
        for job in failing:
            job.end()

    def test_health_is_asked_at_the_grant(self) -> None:
        """A use that has recovered while it waited is healthy when a slot is free."""
        slots = self.slots(2)
        busy = Job("busy").ask(slots)
        waiting = Job("waiting", failing=True).ask(slots)
        self.assertFalse(waiting.running)
        waiting.failing = False
        other = Job("other").ask(slots)
        self.assertEqual((waiting.running, other.running), (True, False))
        busy.end()
        waiting.end()
        other.end()


class Cancel(SlotsTestCase):
    def test_in_the_queue(self) -> None:
        """A use that gives up while waiting leaves the queue, is never run, and takes no slot with it."""
        slots = self.slots(1)
        first = Job("first").ask(slots)
        quitter, next_one = Job("quitter", 9).ask(slots), Job("next").ask(slots)
        assert quitter.result is not None
        quitter.result.cancel()
        self.failed_with(quitter, CancelledError)
        self.assertEqual(slots.queue_depth, 1)
        first.end()
        self.assertEqual((quitter.work, next_one.running), (None, True))
        next_one.end()

    def test_in_use(self) -> None:
        """A use that is cancelled while running has its work cancelled, and its slot goes on."""
        slots = self.slots(1)
        running, next_one = Job("running").ask(slots), Job("next").ask(slots)
        assert running.result is not None
        running.result.cancel()
        self.assertTrue(running.cancelled)
        self.failed_with(running, CancelledError)
        self.assertTrue(next_one.running)
        next_one.end()


class Stop(SlotsTestCase):
    def test_stop(self) -> None:
        """Stop sends the queue and all later comers away with Stopped, and leaves alone what runs."""
        slots = self.slots(1)
        running, waiting = Job("running").ask(slots), Job("waiting").ask(slots)
        slots.stop()
        self.failed_with(waiting, Stopped)
        self.failed_with(Job("later").ask(slots), Stopped)
        self.assertEqual((running.running, slots.queue_depth), (True, 0))
        running.end()
        self.done(running)
        self.assertIsNone(waiting.work)
