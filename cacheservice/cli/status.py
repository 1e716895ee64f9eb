"""`cacheservice status` and `cacheservice why`: show a service's status."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, get_args

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cacheservice.base.errors import AddressUnknown, CacheServiceError, NoAnswer, Refused, UnknownDataset
from cacheservice.cli import picture, plugin
from cacheservice.cli.asking import (
    Address,
    Answer,
    Connection,
    ask_for_all,
    ask_once,
    comma_hint,
    status_address,
)
from cacheservice.cli.options import QUESTIONS, dataset_names, questions_or_names, where
from cacheservice.cli.picture import Picture
from cacheservice.cli.problems import problems
from cacheservice.cli.program import in_one_line, tell
from cacheservice.cli.terminal import console_of_output, show
from cacheservice.ports.report import duration

_POLL_INTERVAL_S = 1.0
_REDRAWS_PER_S = 4


class _StatusCommand(click.Command):
    """The command `status`.

    With --check, wrong usage is UNKNOWN (Monitoring Plugins guidelines, 2.4).
    """

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        with _usage_is_unknown():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with _usage_is_unknown():
            return super().invoke(ctx)


@contextmanager
def _usage_is_unknown() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        if "--check" not in sys.argv:
            raise
        click.echo(plugin.unknown(in_one_line(error)))
        raise click.exceptions.Exit(plugin.UNKNOWN) from None


@click.command(cls=_StatusCommand)
@click.argument("question", metavar="[QUESTION | NAME]...", nargs=-1, shell_complete=questions_or_names)
@click.option("--watch", is_flag=True, help="Keep showing it, each second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="The port's JSON: indented on a terminal, else as one line.")
@click.option("--check", is_flag=True, help="A monitoring plugin: one line, exit code 0, 1, 2 or 3.")
@click.option(
    "--perfdata",
    type=click.Choice(get_args(plugin.Detail)),
    help="With --check: figures of the whole (summary, the default without NAMEs), of each dataset (all), or none.",
)
@where
def status(
    question: tuple[str, ...],
    watch: bool,
    as_json: bool,
    check: bool,
    perfdata: plugin.Detail | None,
    host: str | None,
    port: int | None,
    timeout_s: float,
) -> None:
    """Show how a running service and its datasets are: what is wrong first, why, and when it tries again.

    NAMEs choose datasets. Without --watch, --json or --check the arguments may also be a QUESTION to the status port,
    whose answer is printed as it comes; `help` lists the questions. A dataset that is called as one is `show NAME`.

    \b
    Examples:
      cacheservice status                     once
      cacheservice status --watch             live
      cacheservice status --json | jq .       for a program
      cacheservice status ready               ask a question
      cacheservice status --check products    for Nagios, of one dataset

    --check exits with 0 if all is well, 1 (WARNING) if a dataset is stale, held or failing, PostgreSQL is down,
    notifications do not arrive or a new configuration was refused, 2 (CRITICAL) if a dataset is expired, a required
    one was never loaded or the service does not answer in time, 3 (UNKNOWN) for wrong usage, or if the configuration
    file cannot be read and --port is missing.
    """
    if check and (watch or as_json):
        raise click.UsageError("--check goes with neither --watch nor --json")
    if perfdata and not check:
        raise click.UsageError("--perfdata goes with --check")
    if check:
        _check(host, port, question, timeout_s, perfdata or ("all" if question else "summary"))
        return
    address = status_address(host, port)
    if watch:
        _watch(address, question, as_json, timeout_s)
    elif as_json:
        with Connection(address, timeout_s) as connection:
            _print_json(_chosen(ask_for_all(connection), question))
    elif question and question[0].partition(";")[0] in QUESTIONS:
        answer = ask_once(address, " ".join(question), timeout_s)
        click.echo(answer)
        if answer.startswith("ERROR"):
            raise click.exceptions.Exit(1)
    else:
        with Connection(address, timeout_s) as connection:
            look = _look(connection, question)
        console = console_of_output()
        show(console, picture.render(look, console.width, bars=console.is_terminal))


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=dataset_names)
@where
def why(names: tuple[str, ...], host: str | None, port: int | None, timeout_s: float) -> None:
    """Explain the state of a dataset: what failed, which session blocks it, what to do, and when it is retried.

    Without a NAME, explain each dataset that has a problem.

    \b
    Examples:
      cacheservice why products
      cacheservice why
    """
    with Connection(status_address(host, port), timeout_s) as connection:
        if not names:
            answer = ask_for_all(connection)
            found = problems(answer)
            names = tuple(problem.dataset for problem in found if problem.dataset)
            for problem in found:
                if problem.dataset is None:
                    click.echo(f"{problem.what[:1].upper()}{problem.what[1:]}.")
            if not found:
                count = len(answer.datasets)
                click.echo(f"Nothing is wrong: {count} dataset{'s are' if count != 1 else ' is'} fresh.")
        for number, name in enumerate(names):
            if number:
                click.echo()
            click.echo(connection.ask(f"why {_one_word(name)}"))


def _check(host: str | None, port: int | None, names: Sequence[str], timeout_s: float, detail: plugin.Detail) -> None:
    """Print the plugin's line and exit with its code, whatever happens."""
    code: int
    try:
        code, line = _judge(status_address(host, port), names, timeout_s, detail)
    except AddressUnknown as error:
        code, line = plugin.UNKNOWN, plugin.unknown(error)
    except Exception as error:  # a traceback would exit with code 1, a WARNING
        code, line = plugin.UNKNOWN, plugin.unknown(f"a bug: {type(error).__name__}: {error}")
    click.echo(line)
    raise click.exceptions.Exit(code)


def _judge(address: Address, names: Sequence[str], timeout_s: float, detail: plugin.Detail) -> tuple[int, str]:
    """Ask within `timeout_s` in total: schedulers of plugins limit the whole run."""
    try:
        with Connection(address, timeout_s, deadline_at=time.monotonic() + timeout_s) as connection:
            answer = ask_for_all(connection)
    except CacheServiceError as error:
        return plugin.no_answer(error)
    try:
        return plugin.verdict(_chosen(answer, names), names, detail)
    except UnknownDataset as error:
        return plugin.UNKNOWN, plugin.unknown(error)


def _chosen(answer: Answer, names: Sequence[str]) -> Answer:
    """Return the answer, limited to the named datasets if any are named.

    :raises UnknownDataset: if a name is unknown.
    """
    for name in names:
        if name not in answer.datasets:
            raise UnknownDataset(f"unknown dataset {name!r}; there are {', '.join(answer.datasets)}{comma_hint(name)}")
    if not names:
        return answer
    facts = {**answer.facts, "datasets": {name: answer.datasets[name] for name in names}}
    line = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
    return answer._replace(facts=facts, line=line)


def _look(connection: Connection, names: Sequence[str]) -> Picture:
    """Ask for the status, and for advice about problems."""
    answer = _chosen(ask_for_all(connection), names)
    advice: dict[str, tuple[str, ...]] = {}
    for problem in problems(answer)[: picture.MOST_WRITTEN_OUT]:
        if problem.dataset is None:
            continue
        try:
            advice[problem.dataset] = tuple(connection.ask(f"why {problem.dataset}").splitlines())
        except Refused:  # a reload has removed it meanwhile
            continue
    return Picture(connection.address, answer, advice, names)


def _print_json(answer: Answer) -> None:
    if sys.stdout.isatty():
        Console().print_json(answer.line)
    else:
        click.echo(answer.line)


class _Watch:
    """The last status of a service that may stop and return.

    `absence` has the reason if it does not answer now.
    """

    def __init__(self, address: Address, names: Sequence[str], timeout_s: float) -> None:
        self._address = address
        self._names = names
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self.absence = ""
        self.seen: Picture | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def look(self) -> bool:
        """Ask again; return True if the service answered. If not, keep `seen`.

        :raises UnknownDataset: if the first answer lacks a requested dataset.
        """
        try:
            if self._connection is None:
                self._connection = Connection(self._address, self._timeout_s)
            self.seen = _look(self._connection, self._names)
        except (NoAnswer, Refused, UnknownDataset) as error:
            self.close()
            if isinstance(error, UnknownDataset) and self.seen is None:
                raise
            self.absence = f"{error}{'' if str(error).endswith('?') else '.'}"
            return False
        self.absence = ""
        return True

    def render(self, console: Console) -> RenderableType:
        """Return the picture; without an answer, the old one with the reason and its age."""
        if self.seen is None:
            return Text(f"{self.absence}\nIt is asked again each second." if self.absence else "Asking …", "bold red")
        height = console.height if console.is_terminal else None
        drawn = picture.render(self.seen, console.width, bars=console.is_terminal, height=height)
        if not self.absence:
            return drawn
        age = duration(time.monotonic() - self.seen.answer.taken_at)
        notice = Text(f"{self.absence}\nBelow is its answer of {age} ago. It is asked again each second.", "bold red")
        return Group(notice, "", drawn)


def _watch(address: Address, names: Sequence[str], as_json: bool, timeout_s: float) -> None:
    # A service that does not answer must not stop the redraw: users must see its age increase.
    watch = _Watch(address, names, min(timeout_s, 5.0))
    try:
        if as_json or not sys.stdout.isatty():
            _print_on_and_on(watch, as_json)
        else:
            _draw_on_and_on(watch)
    finally:
        watch.close()


def _draw_on_and_on(watch: _Watch) -> None:
    console = console_of_output()
    # The terminal is restored after every kind of end.
    signal.signal(signal.SIGTERM, _exit)
    try:
        with Live(
            # rich calls this in a thread; it only reads the last status.
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
    raise SystemExit(128 + number)


def _print_on_and_on(watch: _Watch, as_json: bool) -> None:
    console = console_of_output()
    is_reported = False
    for _ in _each_interval():
        answered = watch.look()
        if watch.seen is not None and not as_json:
            show(console, watch.render(console))
            click.echo()
        elif watch.seen is not None and answered:
            click.echo(watch.seen.answer.line)
        elif not is_reported:
            tell(f"cacheservice: {watch.absence} It is asked again each second.")
        is_reported = not answered
        sys.stdout.flush()


def _each_interval() -> Iterator[None]:
    while True:
        yield
        time.sleep(_POLL_INTERVAL_S)


def _one_word(name: str) -> str:
    """Return a name that is one word on the port's line.

    :raises Refused: for any other name.
    """
    if not re.fullmatch(r"[^\s;,]{1,200}", name):
        raise Refused(f"unknown dataset {name!r}; 'cacheservice status' shows them all{comma_hint(name)}")
    return name
