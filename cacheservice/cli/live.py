"""`cacheservice status --watch`: shows the status again and again, also while the service is away."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NamedTuple

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cacheservice.base.errors import NoAnswer, Refused, UnknownDataset
from cacheservice.cli import exit, picture
from cacheservice.cli.client import Answer, Connection, Endpoint, read_status
from cacheservice.cli.picture import Picture
from cacheservice.cli.terminal import console_of_output, print_error, show
from cacheservice.views.json import only_datasets
from cacheservice.views.units import duration

_POLL_INTERVAL_S = 1.0
_REDRAWS_PER_S = 4
_LONGEST_TIMEOUT_S = 5.0
"""A service that does not answer must not stop the redraw: users must see its age increase."""
_TRYING_AGAIN = "Trying again every second."


def watch(endpoint: Endpoint, names: Sequence[str], as_json: bool, timeout_s: float) -> None:
    """Show the status until Ctrl-C: redrawn on a terminal, one after the other in a pipe."""
    seen = _Watch(endpoint, names, min(timeout_s, _LONGEST_TIMEOUT_S))
    try:
        if as_json or not sys.stdout.isatty():
            _print_forever(seen, as_json)
        else:
            _draw_forever(seen)
    finally:
        seen.close()


class _Seen(NamedTuple):
    """The last answer, and why the service does not answer any more; empty if it does."""

    answer: Answer | None
    absence: str


class _Watch:
    """Asks a service that may stop and return. `seen` is replaced as a whole, because another thread renders it."""

    def __init__(self, endpoint: Endpoint, names: Sequence[str], timeout_s: float) -> None:
        self._endpoint = endpoint
        self._names = names
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self.seen = _Seen(None, "")

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def look(self) -> _Seen:
        """Ask again, and return what has been seen.

        :raises UnknownDataset: if the first answer lacks a requested dataset.
        """
        try:
            if self._connection is None:
                self._connection = Connection(self._endpoint, self._timeout_s)
            self.seen = _Seen(read_status(self._connection, self._names), "")
        except (NoAnswer, Refused, UnknownDataset) as error:
            self.close()
            if isinstance(error, UnknownDataset) and self.seen.answer is None:
                raise
            self.seen = _Seen(self.seen.answer, f"{error}{'' if str(error).endswith('?') else '.'}")
        return self.seen

    def render(self, console: Console) -> RenderableType:
        """Return the picture; without an answer, the old one with the reason and its age."""
        answer, absence = self.seen
        if answer is None:
            return Text(f"{absence}\n{_TRYING_AGAIN}" if absence else "Connecting …", "bold red")
        height = console.height if console.is_terminal else None
        shown = Picture(self._endpoint, answer.facts, self._names)
        drawn = picture.render(shown, console.width, bars=console.is_terminal, height=height)
        if not absence:
            return drawn
        age = duration(time.monotonic() - answer.taken_at)
        return Group(Text(f"{absence}\n{_TRYING_AGAIN} The last answer, {age} ago:", "bold red"), "", drawn)

    def line(self, answer: Answer) -> str:
        """Return the answer as a line of JSON."""
        return only_datasets(answer.line, self._names)


def _draw_forever(watch: _Watch) -> None:
    console = console_of_output()
    # The terminal is restored after every kind of end.
    signal.signal(signal.SIGTERM, _exit)
    try:
        with Live(
            # rich calls this in a thread; it only reads what was seen.
            get_renderable=lambda: watch.render(console),
            console=console,
            screen=True,
            refresh_per_second=_REDRAWS_PER_S,
        ):
            for _ in _each_interval():
                watch.look()
    except KeyboardInterrupt:
        # The alternate screen, and its content, have been left by now.
        console.print(watch.render(console))
        raise


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(exit.by_signal(number))


def _print_forever(watch: _Watch, as_json: bool) -> None:
    console = console_of_output()
    is_reported = False
    for _ in _each_interval():
        answer, absence = watch.look()
        if answer is not None and not as_json:
            show(console, watch.render(console))
            click.echo()
        elif answer is not None and not absence:
            click.echo(watch.line(answer))
        elif not is_reported:
            print_error(f"cacheservice: {absence} {_TRYING_AGAIN}")
        is_reported = bool(absence)
        sys.stdout.flush()


def _each_interval() -> Iterator[None]:
    while True:
        yield
        time.sleep(_POLL_INTERVAL_S)
