"""Laws of admission, and of how descriptors are shared out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.app.workers.connections import SharedConnections, SharedMemory, SharedTally
from cacheservice.ports.admission import Door, Plan, Room, plan
from tests.kit.logs import Log


class Guest:
    def __init__(self) -> None:
        self.turned_away = False

    def turn_away(self) -> None:
        self.turned_away = True


class Plans(SynchronousTestCase):
    @given(st.integers(40, 1 << 20), st.integers(1, 100), st.integers(1, 5))
    def test_it_adds_up(self, descriptors: int, sessions: int, ports: int) -> None:
        """There is always a place for a client and a probe; with descriptors for all of it, no more is granted."""
        made = plan(descriptors, sessions, ports)
        self.assertGreaterEqual(min(made.clients, made.reserve, made.accepted), 1)
        if descriptors >= 40 + sessions + 2 * ports:
            self.assertLessEqual(made.clients + made.reserve * ports + made.accepted + 28 + sessions, descriptors)

    def test_usual_limits(self) -> None:
        """Of 1,024 some 850 are for clients; of 40,000 nearly all."""
        self.assertEqual(plan(1024, 2, 3), Plan(1024, 843, 16, 100))
        self.assertEqual(plan(40_000, 2, 3).clients, 39_819)


class Doors(SynchronousTestCase):
    def door(self, clients: int, reserve: int, clock: Clock | None = None, log: Log | None = None) -> Door:
        room = Room(Plan(100, clients, reserve, 10))
        return Door("http", room, reserve, log, (clock or Clock()).seconds)

    def test_two_limits(self) -> None:
        """That of the port and that of the files of all ports; a client that leaves makes room."""
        room = Room(Plan(100, 3, 0, 10))
        first, second = (Door(name, room, 0, None, Clock().seconds) for name in ("resp", "http"))
        guests = [Guest() for _ in range(4)]
        self.assertTrue(first.admit(guests[0], 2) and first.admit(guests[1], 2))
        self.assertFalse(first.admit(guests[2], 2))
        self.assertTrue(second.admit(guests[2], 2))
        self.assertFalse(second.admit(guests[3], 2))
        first.left(guests[3], was_admitted=False)
        self.assertFalse(second.admit(guests[3], 2))
        first.left(guests[0], was_admitted=True)
        self.assertTrue(second.admit(guests[3], 2))

    def test_the_oldest_in_reserve_goes(self) -> None:
        """The newest has a place in reserve, whichever clients wait there."""
        door = self.door(1, 2)
        self.assertTrue(door.admit(Guest(), 1))
        guests = [Guest() for _ in range(4)]
        self.assertFalse(any(door.admit(guest, 1) for guest in guests))
        self.assertEqual([guest.turned_away for guest in guests], [True, True, False, False])
        door.left(guests[2], was_admitted=False)
        self.assertFalse(door.admit(Guest(), 1))
        self.assertFalse(guests[3].turned_away)

    def test_refusals_are_logged_once_a_minute(self) -> None:
        """With how many there were since the last line."""
        clock, log = Clock(), Log()
        door = self.door(1, 2, clock, log)
        for _ in range(5):
            door.note_refusal(1)
        clock.advance(61)
        door.note_refusal(1)
        self.assertEqual([line["count"] for _, line in log.events], [1, 5])


class SeveralProcesses(SynchronousTestCase):
    def setUp(self) -> None:
        self.memory = SharedMemory()
        # Each process has its own mapping of the same memory.
        self.maps = [SharedConnections(self.memory.descriptor) for _ in range(3)]
        self.log = Log()
        self.rooms = [Room(Plan(100, 50, 2, 10), processes=3) for _ in self.maps]
        self.doors = [
            Door("http", room, 2, self.log, Clock().seconds, each.tally(number, "http"))
            for number, (room, each) in enumerate(zip(self.rooms, self.maps, strict=True), 1)
        ]

    def test_one_limit(self) -> None:
        """The limit is of all processes together, whichever of them the clients reach."""
        guests = [Guest() for _ in range(5)]
        first, second, third = self.doors
        self.assertTrue(first.admit(guests[0], 3) and first.admit(guests[1], 3) and second.admit(guests[2], 3))
        self.assertFalse(any(door.admit(guests[3], 3) for door in self.doors))
        first.left(guests[0], was_admitted=True)
        self.assertTrue(third.admit(guests[4], 3))
        self.assertEqual([each.total("http") for each in self.maps], [3, 3, 3])
        self.assertEqual(self.maps[0].total("resp"), 0)

    def test_the_refused_leave_nothing(self) -> None:
        """A refused client takes no place, neither of the service nor of the process."""
        first, second, _ = self.doors
        self.assertTrue(first.admit(Guest(), 1))
        for _ in range(200):
            guest = Guest()
            self.assertFalse(second.admit(guest, 1))
            second.left(guest, was_admitted=False)
        self.assertEqual(self.maps[0].total("http"), 1)
        self.assertTrue(second.admit(Guest(), 2))

    def test_at_the_same_moment(self) -> None:
        """A client that another process admits between the look and the entry is counted."""
        second = self.doors[1]
        tally = self.maps[0].tally(1, "http")
        looked: list[int] = []

        def others() -> int:
            if not looked:
                looked.append(0)
                assert second.admit(Guest(), 1)
                return 0
            return SharedTally.others(tally)

        tally.others = others  # type: ignore[method-assign]
        door = Door("http", self.rooms[0], 2, None, Clock().seconds, tally)
        self.assertFalse(door.admit(Guest(), 1))
        self.assertEqual(self.maps[2].total("http"), 1)

    def test_a_worker_that_has_ended(self) -> None:
        """Its places are free."""
        first, second, _ = self.doors
        self.assertTrue(first.admit(Guest(), 1))
        self.assertFalse(second.admit(Guest(), 1))
        self.maps[2].clear(1)
        self.assertTrue(second.admit(Guest(), 1))

    def test_the_log(self) -> None:
        """A refusal is logged with the clients of all processes; open files are named only if they are the reason."""
        first, second, _ = self.doors
        for _ in range(2):
            self.assertTrue(first.admit(Guest(), 2))
        second.note_refusal(2)
        ((event, fields),) = self.log.events
        self.assertEqual((event, fields["clients"], fields["open_files"]), ("clients_turned_away", 2, None))
        self.assertEqual(self.rooms[0].limit(1000), 150)
