"""`cacheservice tail`: follows a service, a line for each publish, each failure and each change of state.

Two sources, because neither has all of it. The RESP port tells its subscribers of each publish, so none is missed
while the connection lasts. The status port is always there: asked twice a second, it tells what failed or was held,
which datasets are expired, and the generations, by whose numbers a publish shows that nobody was told of.
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
from cacheservice.errors import CacheServiceError, NoAnswer, Refused
from cacheservice.ports.report import duration

_POLL_INTERVAL_S = 0.5
_RETRY_INTERVAL_S = 1.0
_SUBSCRIBE_INTERVAL_S = 5.0
_PUBLISH_TIMEOUT_S = 5.0
_DEFAULT_RESP_PORT = 6380


class Event(NamedTuple):
    """Something that happened.

    :param at: when, in UTC; by the service's clock for a failure and what is held, else by that of this machine.
    :param name: as in the service's log, of which a user knows it: refresh_published, refresh_failed …
    :param fields: what there is to say of it; JSON values.
    """

    at: datetime
    name: str
    dataset: str | None
    fields: Mapping[str, Any]


class Follower:
    """Makes events of what the two ports say, each only once.

    :param names: the datasets to follow; empty for all there are, those that come later included.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self._pid: int | None = None
        self._told: dict[str, int] = {}
        """The greatest generation of each dataset that an event was made for."""
        self._due: dict[str, int] = {}
        """The generation that the last poll saw and no message has told of; it may be on its way."""
        self._attempts: dict[str, str] = {}
        self._states: dict[str, str] = {}

    def follows(self, name: str) -> bool:
        return not self._names or name in self._names

    def message(self, text: bytes) -> Iterator[Event]:
        """Of a publish, as a subscriber of ``cache:NAME`` gets it."""
        fields = json.loads(text)
        name, generation = fields.pop("dataset"), fields["generation"]
        told = self._told.get(name, _before(generation))
        if generation > told:
            self._told[name] = generation
            yield Event(datetime.now(UTC), "refresh_published", name, fields | _untold(told, generation))

    def restart(self, answer: Answer) -> Iterator[Event]:
        """To be asked before any message of a new connection: whether another process answers than before."""
        pid = answer.facts["service"]["pid"]
        if self._pid is not None and self._pid != pid:
            # Generations begin anew, or where a warm start left them; what is served now is told of.
            self._told = {name: _before(dataset["generation"]) for name, dataset in answer.datasets.items()}
            self._due.clear()
            self._pid = pid
            yield Event(datetime.now(UTC), "service_restarted", None, {"pid": pid})

    def knows(self, name: str) -> bool:
        """Whether there is a dataset of that name, by the last answer."""
        return name in self._told

    def poll(self, answer: Answer, *, subscribed: bool) -> Iterator[Event]:
        """Of what the status port says.

        :param subscribed: whether messages tell of publishes; else what they would tell is made of the answer.
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
            # Its message was sent before this answer, over another connection: by the next poll it is here.
            self._due[name] = generation
            return
        if subscribed:
            # What came after the last poll may still be on its way.
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
    """The one before; 0 if nothing has been published yet."""
    return max(0, generation - 1)


def _untold(told: int, generation: int) -> dict[str, int]:
    """How many generations there were between the one that was told of last and this one."""
    return {"generations_before_it": generation - told - 1} if generation - told > 1 else {}


class Subscription:
    """A connection to the RESP port that is told of publishes."""

    def __init__(self, address: Address, password: str) -> None:
        """:raises NoAnswer: if nobody listens."""
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
        """Of the service behind the port."""
        found = re.search(rb"process_id:(\d+)", self._command("INFO", "server"))
        return int(found[1]) if found else None

    def subscribe(self, names: Collection[str]) -> bool:
        """To the publishes of these datasets, beside those of before; whether there is one that is new.

        :raises CacheServiceError: if the port refuses, or has gone.
        """
        new = [name for name in names if name not in self._names]
        if new:
            self._send("SUBSCRIBE", *(f"cache:{name}" for name in new))
            for _ in new:
                self._reply()
            self._names.update(new)
        return bool(new)

    def messages(self) -> list[bytes]:
        """What has come, without waiting.

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
        """The next reply that is no message."""
        while True:
            while (reply := self._next()) is False:
                with no_answer_from(self.address):
                    self._receive()
            if isinstance(reply, hiredis.ReplyError):
                raise Refused(str(reply))
            if not self._take(reply):
                return reply

    def _next(self) -> Any:
        """What has come whole; False if nothing has."""
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
        """Whether it was a message, which is kept."""
        if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message":
            self._messages.append(reply[2])
            return True
        return False


class _Ports:
    """The connections to one service, opened anew when it has been away."""

    def __init__(self, status: Address, resp: Address | None, timeout_s: float) -> None:
        self._status_address = status
        self._resp_address = resp
        self._timeout_s = timeout_s
        self._status: Connection | None = None
        self._subscription: Subscription | None = None
        self._complaint = ""
        self._subscribe_at = 0.0
        """When to try the RESP port next, on the monotonic clock."""

    def close(self) -> None:
        for connection in (self._status, self._subscription):
            if connection is not None:
                connection.close()
        self._status = self._subscription = None
        self._subscribe_at = 0.0

    def poll(self, follower: Follower) -> list[Event]:
        """Everything that is new.

        :raises NoAnswer: if the service is away; the connections are closed then.
        """
        events: list[Event] = []
        try:
            if self._status is None:
                self._status = Connection(self._status_address, self._timeout_s)
            answer = ask_for_all(self._status)
            events += follower.restart(answer)
            if self._subscribe(answer, [name for name in answer.datasets if follower.follows(name)]):
                # The numbers are looked at again after it: what is published from here on comes as a message.
                answer = ask_for_all(self._status)
            events += self._published(follower)
            events += follower.poll(answer, subscribed=self._subscription is not None)
        except (NoAnswer, Refused) as error:
            self.close()
            raise NoAnswer(str(error)) from error
        return events

    def wait(self, seconds: float, follower: Follower) -> Iterator[Event]:
        """What is published meanwhile, as soon as it is."""
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
            # The next poll tells whether the service has gone, and what was published meanwhile.
            self._unsubscribe()
            return []

    def _subscribe(self, answer: Answer, names: Sequence[str]) -> bool:
        """To these datasets, if there is a RESP port of this very service; whether there is one that is new."""
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
            # A port that refuses will go on to, and takes its time for each wrong password.
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
        """Once, however often it happens."""
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

    It goes on when the service restarts. The RESP port tells of each publish; without it (off, another password), the
    numbers of generations tell how many there were.

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
    """:raises CacheServiceError: if nobody answers, or there is no such dataset: then it is most likely a slip."""
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
    """Return the address of the RESP port, if publishes are notified, and why it is not known, if so."""
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
    """Return the password as it is now: its file may have been rotated while this runs."""
    return config.glance(os.environ).resp.password.get_secret_value()


class _Out:
    """Prints events as they come."""

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
    """One line: when, of which dataset, what, and the figures."""
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
            # The first one replaces nothing, so that it is empty if it adds nothing.
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
