"""`cacheservice tail`: prints the publishes, failures and changes of state, across restarts of the service."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

import click
from rich.console import Console

from cacheservice.base.errors import AddressUnknown, CacheServiceError, NoAnswer, Refused
from cacheservice.base.text import iso
from cacheservice.cli.addresses import resp_address, resp_password, status_address
from cacheservice.cli.client import Address, Answer, Connection, comma_hint, read_status
from cacheservice.cli.follow import Event, Follower
from cacheservice.cli.options import dataset_names, where
from cacheservice.cli.subscription import Subscription
from cacheservice.cli.tail_words import in_words
from cacheservice.cli.terminal import print_error

_POLL_INTERVAL_S = 0.5
_RETRY_INTERVAL_S = 1.0
_SUBSCRIBE_INTERVAL_S = 5.0


class Ports:
    """The connections to one service, opened again after it was down.

    The status port is required. The RESP port is optional: without it, publishes are derived from the status.
    """

    def __init__(self, status: Address, resp: Address | None, timeout_s: float) -> None:
        self._status_address = status
        self._resp_address = resp
        self._timeout_s = timeout_s
        self._status: Connection | None = None
        self._subscription: Subscription | None = None
        self._complaint = ""
        self._subscribe_at = 0.0
        """When to try the RESP port again, on the monotonic clock."""

    def close(self) -> None:
        for connection in (self._status, self._subscription):
            if connection is not None:
                connection.close()
        self._status = self._subscription = None
        self._subscribe_at = 0.0

    def poll(self, follower: Follower) -> list[Event]:
        """Return all new events.

        :raises NoAnswer: if the service is down; the connections are then closed.
        """
        events: list[Event] = []
        try:
            if self._status is None:
                self._status = Connection(self._status_address, self._timeout_s)
            answer = read_status(self._status)
            events += follower.restart(answer.facts)
            if self.subscribe(answer, [name for name in answer.facts.datasets if follower.follows(name)]):
                # The status is read again after the subscription: every later publish arrives as a message.
                answer = read_status(self._status)
            events += self._published(follower)
            events += follower.poll(answer.facts, subscribed=self._subscription is not None)
        except (NoAnswer, Refused) as error:
            self.close()
            raise NoAnswer(str(error)) from error
        return events

    def wait(self, seconds: float, follower: Follower) -> Iterator[Event]:
        """Yield publishes as they arrive, for `seconds`."""
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            if self._subscription is None:
                time.sleep(left_s)
                return
            if self._subscription.wait(left_s):
                yield from self._published(follower)

    def subscribe(self, answer: Answer, names: Sequence[str]) -> bool:
        """Subscribe to datasets; return True if any of them is new.

        It needs a RESP port of the same service.
        """
        if self._resp_address is None or time.monotonic() < self._subscribe_at:
            return False
        try:
            if self._subscription is None:
                self._subscription = Subscription(self._resp_address, resp_password())
                if self._subscription.pid() != answer.facts.service.pid:
                    raise Refused("it belongs to another service")
            new = self._subscription.subscribe(names)
        except CacheServiceError as error:
            self._unsubscribe()
            # A port that refuses will continue to refuse, and delays its answer to each wrong password.
            refused = isinstance(error, Refused)
            self._subscribe_at = math.inf if refused else time.monotonic() + _SUBSCRIBE_INTERVAL_S
            self._complain(f"{self._resp_address}: {error}" if refused else str(error))
            return False
        self._complaint = ""
        return new

    def _published(self, follower: Follower) -> list[Event]:
        if self._subscription is None:
            return []
        try:
            return [event for message in self._subscription.messages() for event in follower.message(message)]
        except CacheServiceError:
            # The next poll shows whether the service has stopped, and any publishes meanwhile.
            self._unsubscribe()
            return []

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _complain(self, complaint: str) -> None:
        """Report a problem once, however often it occurs."""
        if complaint != self._complaint:
            self._complaint = complaint
            _report_polling(complaint)


def _report_polling(why: str) -> None:
    print_error(f"cacheservice: publishes are detected by polling, twice a second: {why}; see --resp-port")


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=dataset_names)
@click.option("--json", "as_json", is_flag=True, help="Print each event as a line of JSON.")
@click.option(
    "--resp-port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="The RESP port; 0 to do without.  [default: as configured, or 6380]",
)
@where
def tail(
    names: tuple[str, ...], as_json: bool, resp_port: int | None, host: str | None, port: int | None, timeout_s: float
) -> None:
    """Follow a running service until Ctrl-C: a line for each publish, failure and change of state.

    The command continues when the service restarts. The RESP port reports each publish. If that port is off, or its
    password is another one, the numbers of the generations show how many publishes there were.

    \b
    Examples:
      cacheservice tail
      cacheservice tail products prices
      cacheservice tail --json | jq -r 'select(.event == "refresh_failed") | .error'
    """
    status = status_address(host, port)
    try:
        resp = resp_address(host, resp_port)
    except AddressUnknown as error:
        resp = None
        _report_polling(str(error))
    ports, follower, printer = Ports(status, resp, timeout_s), Follower(names), _Printer(as_json)
    try:
        printer.print(_first_events(ports, follower, names))
        while True:
            printer.print(ports.wait(_POLL_INTERVAL_S, follower))
            try:
                events = ports.poll(follower)
            except NoAnswer as error:
                printer.print([Event(datetime.now(UTC), "service_lost", None, {"error": str(error)})])
                events = _wait_for_return(ports, follower)
                printer.print([Event(datetime.now(UTC), "service_found", None, {})])
            printer.print(events)
    finally:
        ports.close()


def _first_events(ports: Ports, follower: Follower, names: Sequence[str]) -> list[Event]:
    """Return the first events.

    :raises CacheServiceError: if the service does not answer, or if a named dataset is unknown, which is probably a
        typing error.
    """
    events = ports.poll(follower)
    for name in names:
        if not follower.knows(name):
            raise Refused(f"unknown dataset {name!r}; 'cacheservice status' lists them{comma_hint(name)}")
    return events


def _wait_for_return(ports: Ports, follower: Follower) -> list[Event]:
    while True:
        time.sleep(_RETRY_INTERVAL_S)
        try:
            return ports.poll(follower)
        except NoAnswer:
            continue


class _Printer:
    """Prints events as they arrive."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(highlight=False, soft_wrap=True)

    def print(self, events: Iterable[Event]) -> None:
        for event in events:
            if self._as_json:
                line = {"at": iso(event.at), "event": event.name, "dataset": event.dataset, **event.fields}
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                self._console.print(in_words(event))
            sys.stdout.flush()
