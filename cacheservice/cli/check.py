"""`cacheservice check`: checks the configuration, and with --db the database."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Iterator, Sequence

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cacheservice import config
from cacheservice.base.errors import ConfigError
from cacheservice.cli import exit
from cacheservice.cli.terminal import console_of_output, show
from cacheservice.sources.postgres import target
from cacheservice.sources.postgres.inspect import Finding, Inspection, Server, inspect_text, inspecting
from cacheservice.views.units import plural, size


@click.command()
@click.option("--db", "with_database", is_flag=True, help="Also check each dataset against the database (read-only).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(with_database: bool, as_json: bool) -> None:
    """Validate the configuration, and report each problem on its own line.

    With --db, also check each dataset against the database, as the service's role and in the transaction of a refresh,
    but without reading all rows: columns and types, whether the key is unique, estimated rows, bytes and cost, the
    costliest node of the plan, missing privileges with the GRANT to run, and the objects that `watch`, `notify` and
    `probe` need. Rows and bytes are the planner's estimates; run ANALYZE if they are far off.

    Exit code 0 if all is well, 1 if there is a problem. Hints do not count.

    \b
    Examples:
      cacheservice check
      cacheservice check --db
      cacheservice check --db --json | jq '.datasets[] | select(.ok | not) | .findings'
    """
    if as_json:
        _print_json(with_database)
        return
    settings = config.load(os.environ, target.problem)
    datasets = list(settings.datasets.values())
    count = plural(len(datasets), "dataset")
    # While libpq runs, Python's handlers do not, so Ctrl-C would wait for a server that does not answer.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    valid = f"the configuration is valid: {count}"
    console = console_of_output()
    if not with_database:
        click.echo(valid)
        for dataset in datasets:
            if (found := inspect_text(dataset)).findings:
                show(console, _dataset(found))
        return
    problems = 0
    with inspecting(settings.postgres, datasets) as inspector:
        click.echo(valid)
        show(console, _server(inspector.server))
        problems += _problem_count(inspector.server.findings)
        for dataset in datasets:
            found = inspector.inspect(dataset)
            problems += _problem_count(found.findings)
            click.echo()
            show(console, _dataset(found))
    click.echo()
    if problems:
        click.echo(plural(problems, "problem"))
        raise click.exceptions.Exit(exit.FAILURE)
    click.echo(f"no problem: {count} can be read")


def _print_json(with_database: bool) -> None:
    """Print one object: the problems of the configuration and the database's findings."""
    try:
        settings = config.load(os.environ, target.problem)
    except ConfigError as error:
        _print_object(error.problems, None, [])
        raise click.exceptions.Exit(exit.FAILURE) from None
    datasets = list(settings.datasets.values())
    server = None
    if with_database:
        with inspecting(settings.postgres, datasets) as inspector:
            server, found = inspector.server, [inspector.inspect(dataset) for dataset in datasets]
    else:
        found = [inspect_text(dataset) for dataset in datasets]
    _print_object((), server, found)
    if (server is not None and _problem_count(server.findings)) or not all(each.ok for each in found):
        raise click.exceptions.Exit(exit.FAILURE)


def _print_object(problems: Sequence[str], server: Server | None, found: Sequence[Inspection]) -> None:
    datasets = {each.name: _fields(each) | {"ok": each.ok} for each in found}
    everything = {
        "problems": list(problems),
        "server": None if server is None else _fields(server),
        "datasets": datasets,
    }
    click.echo(json.dumps(everything, ensure_ascii=False, indent=2))


def _fields(found: Server | Inspection) -> dict[str, object]:
    """Return the fields by their names, as JSON values."""
    fields = {name: _plain(getattr(found, name)) for name in found.__slots__}
    if isinstance(found, Inspection) and found.size is not None:
        fields["size"] = {**found.size._asdict(), "bytes": found.size.bytes}
    return fields


def _plain(value: object) -> object:
    """Return a JSON value; a named tuple becomes an object."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _problem_count(findings: Iterable[Finding]) -> int:
    return sum(finding.level == "problem" for finding in findings)


def _server(server: Server) -> RenderableType:
    text = Text(f"PostgreSQL {server.version}, database {server.database} as {server.role}")
    text.append(", a standby" if server.standby else "")
    text.append(", through a pooler" if server.pooled else "")
    text.append("" if server.migrated else ", without the schema `cacheservice` or the right to use it")
    return Group(text, *_findings(server.findings))


def _dataset(found: Inspection) -> RenderableType:
    head = Text("ok       ", "bold green") if found.ok else Text("PROBLEM  ", "bold red")
    head.append(found.name, "bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, words in _facts(found):
        grid.add_row(label, Text(words))
    return Group(head, *([Padding(grid, (0, 0, 0, 2))] if grid.row_count else []), *_findings(found.findings))


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    if found.columns:
        yield "columns", ", ".join(f"{column.name} {column.type}" for column in found.columns)
    if found.key is not None:
        words = {True: "unique", False: "NOT unique", None: "not known to be unique"}[found.key.unique]
        columns = ", ".join(f"{column.name} {column.type}" for column in found.key.columns)
        yield "key", f"{columns}: {words} ({found.key.how})"
    if found.size is not None:
        of = f"{found.size.row_bytes:,} bytes a row"
        if found.size.document_bytes:
            of = f"{found.size.document_bytes:,} bytes a document"
        yield (
            "size",
            f"about {plural(found.size.rows, 'row')}, {size(found.size.bytes)} ({of}), cost {found.size.cost:,.0f}",
        )
    if found.worst is not None:
        yield "plan", f"{found.worst.name}, {100 * found.worst.share:.0f} % of the cost"
    if found.deltas:
        yield "deltas", found.deltas


def _findings(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    for finding in findings:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=7, no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text(finding.level, "bold red" if finding.level == "problem" else "yellow"), Text(finding.text))
        if finding.todo:
            grid.add_row(Text("do", "dim"), Text(finding.todo))
        yield Padding(grid, (0, 0, 0, 2))
