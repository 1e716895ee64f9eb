"""Options that several commands share, and their shell completions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from cacheservice import config

P = ParamSpec("P")
R = TypeVar("R")

QUESTIONS = ("ruok", "ready", "status", "json", "mntr", "show", "why", "version", "help")
_ABOUT_A_DATASET = ("show", "why")


def dataset_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of datasets from the configuration file."""
    return [name for name in config.glance(os.environ).datasets if name.startswith(incomplete)]


def questions_or_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the arguments of `cacheservice status`."""
    before = context.params.get("question") or ()
    names = dataset_names(context, parameter, incomplete)
    if before:
        return names if before[0] in _ABOUT_A_DATASET or before[0] not in QUESTIONS else []
    if any(context.params.get(each) for each in ("check", "watch", "as_json")):
        return names
    return [question for question in QUESTIONS if question.startswith(incomplete)]


def timeout(default_s: float) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Add --timeout to a command."""
    return click.option(
        "--timeout",
        "-t",
        "timeout_s",
        type=click.FloatRange(0, min_open=True),
        default=default_s,
        show_default=True,
        metavar="SECONDS",
        help="The longest time to wait for a reply.",
    )


def where(command: Callable[P, R]) -> Callable[P, R]:
    """Add --host, --port and --timeout of a status port to a command."""
    host = click.option(
        "--host", "-H", metavar="HOST", help="The host of the status port.  [default: as configured, or 127.0.0.1]"
    )
    port = click.option(
        "--port",
        "-p",
        type=click.IntRange(1, 65535),
        metavar="PORT",
        help="The status port.  [default: as configured, or 8000]",
    )
    return host(port(timeout(10.0)(command)))
