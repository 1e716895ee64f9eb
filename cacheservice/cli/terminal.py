"""Where output goes: a terminal of some width, or a pipe, whose lines are for grep."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console, RenderableType

_PIPE_COLUMNS = 200


def console_of_output() -> Console:
    """Of the terminal's width; where there is none, of COLUMNS or wide, so that no line is broken without need."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    columns = os.environ.get("COLUMNS", "")
    return Console(highlight=False, width=int(columns) if columns.isdigit() and int(columns) > 0 else _PIPE_COLUMNS)


def show(console: Console, drawn: RenderableType) -> None:
    """Print it; in a pipe without the blanks that fill up the lines of a table."""
    if console.is_terminal:
        console.print(drawn)
        return
    with console.capture() as capture:
        console.print(drawn)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
