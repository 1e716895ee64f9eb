"""Options that several commands share, and their shell completions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from cacheservice import config

QUESTIONS = ("ruok", "ready", "status", "json", "mntr", "show", "why", "version", "help")


def dataset_names(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Complete the names of datasets from the configuration file."""
    return [name for name in config.glance(os.environ).datasets if name.startswith(incomplete)]


def questions_or_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete the arguments of `cacheservice status`."""
    said = context.params.get("question") or ()
    names = dataset_names(context, parameter, incomplete)
    if said or any(context.params.get(each) for each in ("check", "watch", "as_json")):
        return names if not said or said[0] in ("show", "why") or said[0] not in QUESTIONS else []
    return [question for question in QUESTIONS if question.startswith(incomplete)]


def where(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --host, --port and --timeout of a status port to a command."""
    for option in reversed(
        (
            click.option(
                "--host",
                "-H",
                metavar="HOST",
                help="Where the status port listens; else as configured, else 127.0.0.1.",
            ),
            click.option(
                "--port", "-p", type=click.IntRange(1, 65535), help="The status port; else as configured, else 8000."
            ),
            click.option(
                "--timeout",
                "-t",
                "timeout_s",
                type=click.FloatRange(0, min_open=True),
                default=10.0,
                show_default=True,
                metavar="SECONDS",
                help="How long to wait for an answer.",
            ),
        )
    ):
        command = option(command)
    return command
