"""Laws of the events: which observers are notified, in which order, and until when."""

from __future__ import annotations

from cacheservice.cache.events import Added, Changed, Event, Events, Published, Renewed
from tests.kit.datasets import numbered_rows, snapshot_of


def test_who_is_notified() -> None:
    """An observer gets events of its kinds, of its dataset, until its subscription ends."""
    events = Events()
    heard: list[tuple[str, Event]] = []
    ends = [
        events.subscribe(lambda event: heard.append(("prices", event)), Published, of="prices"),
        events.subscribe(lambda event: heard.append(("all", event)), Published, Renewed),
    ]
    happened = [
        Published("prices", snapshot_of(numbered_rows(1), 2), 1),
        Renewed("prices"),
        Published("products", snapshot_of(numbered_rows(1), 1), 0),
        Added("prices"),
        Changed("x"),
    ]
    for event in happened:
        events.notify(event)
    published, renewed, other, *_ = happened
    assert heard == [("all", published), ("prices", published), ("all", renewed), ("all", other)]
    assert events.subscription_count == 3
    for end in ends:
        end()
    events.notify(published)
    assert (len(heard), events.subscription_count) == (4, 0)


def test_ends_while_it_is_notified() -> None:
    """An observer may end its own subscription or another's; those of this event are called all the same."""
    events = Events()
    heard: list[str] = []

    def first(_: Event) -> None:
        heard.append("first")
        end_first()
        end_second()

    end_first = events.subscribe(first, Renewed, of="prices")
    end_second = events.subscribe(lambda _: heard.append("second"), Renewed, of="prices")
    events.notify(Renewed("prices"))
    events.notify(Renewed("prices"))
    assert heard == ["first", "second"]
