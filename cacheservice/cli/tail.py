"""`cacheservice tail`: prints the publishes, failures and changes of state.

It uses two sources, because neither is complete. The RESP port notifies its subscribers of each publish, so that none
is missed while the connection lasts. The status port is always available. Polled twice a second, it shows failed and
held refreshes, expired datasets, and the generations, whose numbers reveal publishes without a notification.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import click
import hiredis
from rich.console import Console
from rich.text import Text

from cacheservice import config
from cacheservice.base.errors import CacheServiceError, NoAnswer, Refused
from cacheservice.cache.describe import iso
from cacheservice.cli.asking import (
    Address,
    Answer,
    Connection,
    ask_for_all,
    comma_hint,
    no_answer_from,
    reachable,
    status_address,
)
from cacheservice.cli.options import dataset_names, where
from cacheservice.cli.program import tell
from cacheservice.ports.report import duration

_POLL_INTERVAL_S = 0.5
_RETRY_INTERVAL_S = 1.0
_SUBSCRIBE_INTERVAL_S = 5.0
_PUBLISH_TIMEOUT_S = 5.0
_DEFAULT_RESP_PORT = 6380


class Event(NamedTuple):
    """An event of the service.

    :param at: its time, in UTC; by the service's clock for failed and held refreshes, else by this machine's clock.
    :param name: as in the service's log, which users know: refresh_published, refresh_failed …
    :param fields: its details; JSON values.
    """

    at: datetime
    name: str
    dataset: str | None
    fields: Mapping[str, Any]


class Follower:
    """Derives events from the two ports, each only once.

    :param names: the datasets to follow; empty for all, including those that are added later.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self._pid: int | None = None
        self._told: dict[str, int] = {}
        """The latest generation of each dataset for which an event was created."""
        self._due: dict[str, int] = {}
        """The generation that the last poll found without a message, which may still be on its way."""
        self._attempts: dict[str, str] = {}
        self._states: dict[str, str] = {}

    def follows(self, name: str) -> bool:
        return not self._names or name in self._names

    def message(self, text: bytes) -> Iterator[Event]:
        """Yield the event of a publish from a message of ``cache:NAME``."""
        fields = json.loads(text)
        name, generation = fields.pop("dataset"), fields["generation"]
        told = self._told.get(name, _before(generation))
        if generation > told:
            self._told[name] = generation
            yield Event(datetime.now(UTC), "refresh_published", name, fields | _untold(told, generation))

    def restart(self, answer: Answer) -> Iterator[Event]:
        """Yield an event if another process answers than before.

        Call it before processing messages of a new connection.
        """
        pid = answer.facts["service"]["pid"]
        if self._pid is not None and self._pid != pid:
            # Generations restart, or continue after a warm start; the generations served now are reported.
            self._told = {name: _before(dataset["generation"]) for name, dataset in answer.datasets.items()}
            self._due.clear()
            self._pid = pid
            yield Event(datetime.now(UTC), "service_restarted", None, {"pid": pid})

    def knows(self, name: str) -> bool:
        """Return True if the last answer had a dataset with this name."""
        return name in self._told

    def poll(self, answer: Answer, *, subscribed: bool) -> Iterator[Event]:
        """Yield the events in a status of the service.

        :param subscribed: whether messages report publishes; otherwise they are derived from the answer.
        """
        first = self._pid is None
        self._pid = answer.facts["service"]["pid"]
        for name, dataset in answer.datasets.items():
            if not self.follows(name):
                continue
            if name not in self._told:
                generation = dataset["generation"]
                self._told[name] = generation if first else _before(generation)
            yield from self._publishes(name, dataset, subscribed=subscribed)
            yield from self._attempt(name, dataset, quiet=first)
            yield from self._state(name, dataset, quiet=first)

    def _publishes(self, name: str, dataset: Mapping[str, Any], *, subscribed: bool) -> Iterator[Event]:
        generation, told = dataset["generation"], self._told[name]
        if generation <= told:
            self._due.pop(name, None)
            return
        if subscribed and name not in self._due:
            # Its message was sent before this answer, over another connection, and will have arrived at the next poll.
            self._due[name] = generation
            return
        if subscribed:
            # Messages of publishes after the last poll may still be on their way.
            generation = self._due.pop(name)
            if generation <= told:
                return
        self._told[name] = generation
        fields: dict[str, Any] = {"generation": generation}
        if generation == dataset["generation"]:
            fields |= {"as_of": dataset["as_of"], **(dataset["last_change"] or {})}
        yield Event(datetime.now(UTC), "refresh_published", name, fields | _untold(told, generation))

    def _attempt(self, name: str, dataset: Mapping[str, Any], *, quiet: bool) -> Iterator[Event]:
        last = dataset["last_attempt"]
        if last is None or self._attempts.get(name) == last["started_at"]:
            return
        self._attempts[name] = last["started_at"]
        if quiet or last["outcome"] not in ("failed", "held"):
            return
        ended_at = datetime.fromisoformat(last["started_at"]) + timedelta(seconds=last["took_s"])
        fields = {
            "error": last["error"],
            "trigger": last["trigger"],
            "took_s": last["took_s"],
            "consecutive_failures": dataset["consecutive_failures"],
            "retry_in_s": dataset["next_refresh_in_s"],
        }
        yield Event(ended_at, f"refresh_{last['outcome']}", name, fields)

    def _state(self, name: str, dataset: Mapping[str, Any], *, quiet: bool) -> Iterator[Event]:
        before, self._states[name] = self._states.get(name), dataset["state"]
        if quiet or before == dataset["state"]:
            return
        if dataset["state"] == "expired":
            fields = {"age_s": dataset["age_s"], "max_age_s": dataset["max_age_s"]}
            yield Event(datetime.now(UTC), "dataset_expired", name, fields)
        elif before == "expired":
            yield Event(datetime.now(UTC), "dataset_recovered", name, {"age_s": dataset["age_s"]})


def _before(generation: int) -> int:
    """Return the previous generation; 0 before the first publish."""
    return max(0, generation - 1)


def _untold(told: int, generation: int) -> dict[str, int]:
    """Return the number of unreported generations before this one, as a field."""
    return {"generations_before_it": generation - told - 1} if generation - told > 1 else {}


class Subscription:
    """A connection to the RESP port that subscribes to publishes."""

    def __init__(self, address: Address, password: str) -> None:
        """Connect to the port.

        :raises NoAnswer: if the port is closed.
        """
        self.address = address
        self._names: set[str] = set()
        self._reader = hiredis.Reader()
        self._messages: list[bytes] = []
        with no_answer_from(address):
            self.socket = socket.create_connection(address[:2], timeout=_PUBLISH_TIMEOUT_S)
        try:
            if password:
                self._command("AUTH", password)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.socket.close()

    def pid(self) -> int | None:
        """Return the process ID of the service behind the port."""
        found = re.search(rb"process_id:(\d+)", self._command("INFO", "server"))
        return int(found[1]) if found else None

    def subscribe(self, names: Collection[str]) -> bool:
        """Subscribe to further datasets; return True if any of them is new.

        :raises CacheServiceError: if the port refuses, or the connection is closed.
        """
        new = [name for name in names if name not in self._names]
        if new:
            self._send("SUBSCRIBE", *(f"cache:{name}" for name in new))
            for _ in new:
                self._reply()
            self._names.update(new)
        return bool(new)

    def messages(self) -> list[bytes]:
        """Return the messages that have arrived, without waiting.

        :raises NoAnswer: if the connection has ended.
        """
        with no_answer_from(self.address):
            while select.select([self.socket], [], [], 0)[0]:
                self._receive()
        while (reply := self._next()) is not False:
            self._take(reply)
        messages, self._messages = self._messages, []
        return messages

    def _command(self, *words: str) -> Any:
        self._send(*words)
        return self._reply()

    def _send(self, *words: str) -> None:
        with no_answer_from(self.address):
            self.socket.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # declared for one word

    def _reply(self) -> Any:
        """Return the next reply that is not a message."""
        while True:
            while (reply := self._next()) is False:
                with no_answer_from(self.address):
                    self._receive()
            if isinstance(reply, hiredis.ReplyError):
                raise Refused(str(reply))
            if not self._take(reply):
                return reply

    def _next(self) -> Any:
        """Return the next complete reply; False if there is none."""
        try:
            return self._reader.gets()
        except hiredis.ProtocolError as error:
            raise Refused("what listens there does not speak the Redis protocol") from error

    def _receive(self) -> None:
        received = self.socket.recv(65536)
        if not received:
            raise ConnectionResetError("the connection was closed")
        self._reader.feed(received)

    def _take(self, reply: object) -> bool:
        """Keep a reply if it is a message; return whether it is."""
        if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message":
            self._messages.append(reply[2])
            return True
        return False


class _Ports:
    """The connections to one service, opened again after it was down."""

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
            answer = ask_for_all(self._status)
            events += follower.restart(answer)
            if self._subscribe(answer, [name for name in answer.datasets if follower.follows(name)]):
                # The status is read again after the subscription: every later publish arrives as a message.
                answer = ask_for_all(self._status)
            events += self._published(follower)
            events += follower.poll(answer, subscribed=self._subscription is not None)
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
            if select.select([self._subscription.socket], [], [], left_s)[0]:
                yield from self._published(follower)

    def _published(self, follower: Follower) -> list[Event]:
        if self._subscription is None:
            return []
        try:
            return [event for message in self._subscription.messages() for event in follower.message(message)]
        except CacheServiceError:
            # The next poll shows whether the service has stopped, and any publishes meanwhile.
            self._unsubscribe()
            return []

    def _subscribe(self, answer: Answer, names: Sequence[str]) -> bool:
        """Subscribe to datasets; return True if any of them is new.

        It needs a RESP port of the same service.
        """
        if self._resp_address is None or time.monotonic() < self._subscribe_at:
            return False
        try:
            if self._subscription is None:
                self._subscription = Subscription(self._resp_address, _resp_password())
                if self._subscription.pid() != answer.facts["service"]["pid"]:
                    raise Refused("it is the port of another service")
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

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _complain(self, complaint: str) -> None:
        """Report a problem once, however often it occurs."""
        if complaint != self._complaint:
            self._complaint = complaint
            _report_unseen(complaint)


def _report_unseen(why: str) -> None:
    tell(f"cacheservice: publishes are seen by their numbers, twice a second: {why}; see --resp-port")


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=dataset_names)
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each event.")
@click.option(
    "--resp-port", type=click.IntRange(0, 65535), help="The RESP port; else as configured, else 6380. 0 = do without."
)
@where
def tail(
    names: tuple[str, ...], as_json: bool, resp_port: int | None, host: str | None, port: int | None, timeout_s: float
) -> None:
    """Follow a running service: a line for each publish, failure and change of state, until Ctrl-C.

    It continues when the service restarts. The RESP port reports each publish. Without it (off, another password), the
    numbers of the generations show how many publishes there were.

    \b
    Examples:
      cacheservice tail
      cacheservice tail products prices
      cacheservice tail --json | jq -r 'select(.event == "refresh_failed") | .error'
    """
    address = status_address(host, port)
    resp, problem = _resp_address(host, resp_port)
    ports, follower = _Ports(address, resp, timeout_s), Follower(names)
    if problem:
        _report_unseen(problem)
    out = _Out(as_json)
    try:
        out.say(_first_events(ports, follower, names))
        while True:
            out.say(ports.wait(_POLL_INTERVAL_S, follower))
            try:
                events = ports.poll(follower)
            except NoAnswer as error:
                out.say([Event(datetime.now(UTC), "service_lost", None, {"error": str(error)})])
                events = _wait_for_return(ports, follower)
                out.say([Event(datetime.now(UTC), "service_found", None, {})])
            out.say(events)
    finally:
        ports.close()


def _first_events(ports: _Ports, follower: Follower, names: Sequence[str]) -> list[Event]:
    """Return the first events.

    :raises CacheServiceError: if the service does not answer, or if a named dataset is unknown, which is probably a
        typing error.
    """
    events = ports.poll(follower)
    for name in names:
        if not follower.knows(name):
            raise Refused(f"unknown dataset {name!r}; 'cacheservice status' shows them all{comma_hint(name)}")
    return events


def _wait_for_return(ports: _Ports, follower: Follower) -> list[Event]:
    while True:
        time.sleep(_RETRY_INTERVAL_S)
        try:
            return ports.poll(follower)
        except NoAnswer:
            continue


def _resp_address(host: str | None, port: int | None) -> tuple[Address | None, str]:
    """Return the address of the RESP port, or why it is not known.

    Both are empty if the port is off.
    """
    seen = config.glance(os.environ)
    if port == 0:
        return None, ""
    if port is None:
        for key in ("enabled", "port", "password"):
            if (problem := seen.problem("resp", key)) is not None:
                return None, problem
        if not seen.resp.enabled:
            return None, ""
    return Address(host or reachable(seen.resp.host), port or seen.resp.port or _DEFAULT_RESP_PORT, hint=""), ""


def _resp_password() -> str:
    """Return the current password: its file may be rotated while this command runs."""
    return config.glance(os.environ).resp.password.get_secret_value()


class _Out:
    """Prints events as they arrive."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(highlight=False, soft_wrap=True)

    def say(self, events: Iterator[Event] | Sequence[Event]) -> None:
        for event in events:
            if self._as_json:
                told = {"at": iso(event.at), "event": event.name, "dataset": event.dataset, **event.fields}
                click.echo(json.dumps(told, ensure_ascii=False))
            else:
                self._console.print(in_words(event))
            sys.stdout.flush()


_STYLES = {
    "refresh_published": "green",
    "refresh_failed": "red",
    "refresh_held": "yellow",
    "dataset_expired": "bold red",
    "dataset_recovered": "green",
    "service_lost": "bold red",
    "service_found": "green",
    "service_restarted": "yellow",
}


def in_words(event: Event) -> Text:
    """Return one line: the time, the dataset, the event and its figures."""
    what = event.name.removeprefix("refresh_").removeprefix("dataset_").replace("_", " ")
    text = Text()
    text.append(f"{event.at.astimezone(UTC):%H:%M:%S.%f}"[:-3] + "Z  ", "dim")
    if event.dataset is not None:
        text.append(f"{event.dataset}  ", "bold")
    text.append(what, _STYLES.get(event.name, ""))
    details = _details(event)
    text.append(f"  {details}" if details else "")
    return text


def _details(event: Event) -> str:
    fields = event.fields
    if event.name == "refresh_published":
        before = fields.get("generations_before_it")
        words = [f"generation {fields['generation']}", f"{before} more before it" if before else ""]
        if fields.get("added") is not None:
            counts = [f"{fields[what]:,} {what}" for what in ("added", "changed", "removed") if fields[what]]
            # The first publish replaces nothing, so it is empty if it adds nothing.
            words += counts or ["no rows" if fields["generation"] == 1 else "no row differs"]
        return ", ".join(filter(None, words))
    if event.name in ("refresh_failed", "refresh_held"):
        count = fields["consecutive_failures"]
        words = [f"after {duration(fields['took_s'])}", f"{count} in a row" if count > 1 else ""]
        if fields["retry_in_s"] is not None:
            words.append(f"next try in {duration(fields['retry_in_s'])}")
        return f"{fields['error']} ({', '.join(filter(None, words))})"
    if event.name == "dataset_expired":
        return f"{duration(fields['age_s'])} old, limit {duration(fields['max_age_s'])}"
    return ", ".join(str(value) for value in fields.values() if isinstance(value, str))
