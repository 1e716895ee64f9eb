"""The output: a terminal with a width, or a pipe, whose lines are for grep."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console, RenderableType

_PIPE_COLUMNS = 200


def console_of_output() -> Console:
    """Return a console with the terminal's width.

    Without a terminal the width is COLUMNS, or so large that no line is broken.
    """
    if sys.stdout.isatty():
        return Console(highlight=False)
    columns = os.environ.get("COLUMNS", "")
    return Console(highlight=False, width=int(columns) if columns.isdigit() and int(columns) > 0 else _PIPE_COLUMNS)


def show(console: Console, drawn: RenderableType) -> None:
    """Print to a terminal, or to a pipe without trailing blanks."""
    if console.is_terminal:
        console.print(drawn)
        return
    with console.capture() as capture:
        console.print(drawn)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_error(line: str) -> None:
    """Print a line to standard error."""
    click.echo(line, err=True)
