"""`cacheservice status` and `cacheservice why`: show a service's status."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import click
from rich.console import Console

from cacheservice.base.errors import AddressUnknown, CacheServiceError, Refused, UnknownDataset
from cacheservice.cli import exit, live, picture
from cacheservice.cli.addresses import status_address
from cacheservice.cli.client import Address, Connection, ask_once, comma_hint, read_status
from cacheservice.cli.options import QUESTIONS, dataset_names, questions_or_names, where
from cacheservice.cli.picture import Picture
from cacheservice.cli.terminal import console_of_output, show
from cacheservice.views import plugin
from cacheservice.views.json import only_datasets
from cacheservice.views.problems import problems
from cacheservice.views.units import plural


class _StatusCommand(click.Command):
    """The command `status`.

    With --check, wrong usage is UNKNOWN (Monitoring Plugins guidelines, 2.4).
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        with _usage_is_unknown("--check" in args):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> object:
        with _usage_is_unknown(bool(ctx.params.get("check"))):
            return super().invoke(ctx)


@contextmanager
def _usage_is_unknown(is_plugin: bool) -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        if not is_plugin:
            raise
        click.echo(plugin.unknown(exit.usage_line(error)))
        raise click.exceptions.Exit(exit.UNKNOWN) from None


@click.command(cls=_StatusCommand)
@click.argument("question", metavar="[QUESTION | NAME]...", nargs=-1, shell_complete=questions_or_names)
@click.option("--watch", is_flag=True, help="Keep showing the status, each second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the port's JSON: indented on a terminal, else one line.")
@click.option("--check", is_flag=True, help="Act as a monitoring plugin: one line, exit code 0, 1, 2 or 3.")
@click.option(
    "--perfdata",
    type=click.Choice(get_args(plugin.Detail)),
    help="With --check, the figures: of the service (summary, the default without NAMEs), of each dataset (all), or "
    "none.",
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
    """Show a running service and its datasets: problems first, with their causes and the next attempt.

    NAMEs select datasets. Without --watch, --json and --check the arguments may also be a QUESTION for the status port,
    whose answer is printed unchanged; `help` lists the questions. For a dataset that has the name of a question, use
    `show NAME`.

    \b
    Examples:
      cacheservice status                     once
      cacheservice status --watch             live
      cacheservice status --json | jq .       for a program
      cacheservice status ready               ask a question
      cacheservice status --check products    for Nagios, one dataset

    Exit codes of --check: 0 if all is well. 1 (WARNING) if a dataset is stale, held or failing, PostgreSQL is down,
    notifications do not arrive, changes are not captured from the log, or a new configuration was refused. 2 (CRITICAL)
    if a dataset is expired, a required dataset was never loaded, or the service does not answer in time. 3 (UNKNOWN)
    for wrong usage, or if the configuration file cannot be read and --port is missing.
    """
    if check and (watch or as_json):
        raise click.UsageError("--check cannot be combined with --watch or --json")
    if perfdata and not check:
        raise click.UsageError("--perfdata requires --check")
    if check:
        _check(host, port, question, timeout_s, perfdata or ("all" if question else "summary"))
        return
    address = status_address(host, port)
    if watch:
        live.watch(address, question, as_json, timeout_s)
    elif as_json:
        _print_json(address, question, timeout_s)
    elif question and question[0].partition(";")[0] in QUESTIONS:
        reply = ask_once(address, " ".join(question), timeout_s)
        click.echo(reply)
        if reply.startswith("ERROR"):
            raise click.exceptions.Exit(exit.FAILURE)
    else:
        with Connection(address, timeout_s) as connection:
            answer = read_status(connection, question)
        console = console_of_output()
        drawn = picture.render(Picture(address, answer.facts, question), console.width, bars=console.is_terminal)
        show(console, drawn)


def _print_json(address: Address, names: Sequence[str], timeout_s: float) -> None:
    with Connection(address, timeout_s) as connection:
        line = only_datasets(read_status(connection, names).line, names)
    if sys.stdout.isatty():
        Console().print_json(line)
    else:
        click.echo(line)


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=dataset_names)
@where
def why(names: tuple[str, ...], host: str | None, port: int | None, timeout_s: float) -> None:
    """Explain the state of a dataset: what failed, which session blocks it, what to do, and the next attempt.

    Without a NAME, explain each dataset that has a problem.

    \b
    Examples:
      cacheservice why products
      cacheservice why
    """
    with Connection(status_address(host, port), timeout_s) as connection:
        if not names:
            facts = read_status(connection).facts
            found = problems(facts)
            names = tuple(problem.dataset for problem in found if problem.dataset)
            for problem in found:
                if problem.dataset is None:
                    click.echo(f"{problem.what[:1].upper()}{problem.what[1:]}.")
            if not found:
                are = "is" if len(facts.datasets) == 1 else "are"
                click.echo(f"Nothing is wrong: {plural(len(facts.datasets), 'dataset')} {are} fresh.")
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
        code, line = exit.UNKNOWN, plugin.unknown(error)
    except Exception as error:  # a traceback would exit with code 1, a WARNING
        code, line = exit.UNKNOWN, plugin.unknown(f"a bug: {type(error).__name__}: {error}")
    click.echo(line)
    raise click.exceptions.Exit(code)


def _judge(address: Address, names: Sequence[str], timeout_s: float, detail: plugin.Detail) -> tuple[int, str]:
    """Ask within `timeout_s` in total: schedulers of plugins limit the whole run."""
    try:
        with Connection(address, timeout_s, deadline_at=time.monotonic() + timeout_s) as connection:
            answer = read_status(connection, names)
    except UnknownDataset as error:
        return exit.UNKNOWN, plugin.unknown(error)
    except CacheServiceError as error:
        return plugin.no_answer(error)
    return plugin.verdict(answer.facts, names, detail)


def _one_word(name: str) -> str:
    """Return a name that is one word on the port's line.

    :raises Refused: for any other name.
    """
    if not re.fullmatch(r"[^\s;,]{1,200}", name):
        raise Refused(f"unknown dataset {name!r}; 'cacheservice status' lists them{comma_hint(name)}")
    return name
