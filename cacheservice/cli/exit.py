"""The exit codes of all commands, and the line with which each kind of error ends one."""

from __future__ import annotations

import signal
from typing import NamedTuple

import click

from cacheservice.base.errors import AddressUnknown, CacheServiceError, ConfigError

OK = 0
FAILURE = 1
"""A failure, or a problem that the command has found."""
USAGE = 2
"""Wrong usage, or a configuration that does not lead to the service."""
UNKNOWN = 3
"""`status --check` could not judge (Monitoring Plugins guidelines, 2.4)."""


def by_signal(number: int) -> int:
    """Return the code of a command that a signal ended: 130 for Ctrl-C, 141 for a closed pipe."""
    return 128 + number


class Ending(NamedTuple):
    """The exit code, and the text for standard error; empty for none."""

    code: int
    text: str


def ending(error: Exception) -> Ending | None:
    """Return how an error ends a command; None for a bug, which needs its traceback.

    Some errors name their place themselves. The others get the name of the program.
    """
    match error:
        case click.UsageError():
            return Ending(USAGE, usage_line(error))
        case click.ClickException():
            return Ending(error.exit_code, f"cacheservice: {error.format_message()}")
        case click.Abort():
            return Ending(by_signal(signal.SIGINT), "")
        case ConfigError():
            return Ending(FAILURE, str(error))
        case AddressUnknown():
            return Ending(USAGE, str(error))
        case CacheServiceError():
            return Ending(FAILURE, f"cacheservice: {error}")
        case OSError():
            place = f"{error.filename}: " if error.filename else ""
            return Ending(FAILURE, f"cacheservice: {place}{(error.strerror or str(error)).lower()}")
    return None


def usage_line(error: click.UsageError) -> str:
    """Return the command, the error and a pointer to the help, in one line."""
    command = error.ctx.command_path if error.ctx else "cacheservice"
    message = error.format_message()
    if isinstance(error, click.NoSuchOption):
        near = f" Did you mean {' or '.join(sorted(error.possibilities))}?" if error.possibilities else ""
        message = f"no such option {error.option_name}.{near}"
    ending = "" if message.endswith((".", "?")) else "."
    if not message[1:2].isupper():  # such as the name of a variable
        message = f"{message[:1].lower()}{message[1:]}"
    return f"{command}: {message}{ending} See: {command} --help"
