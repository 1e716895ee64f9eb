"""Ends every command with a one-line error and the right exit code.

The error names the next step.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import click

from cacheservice.base.errors import AddressUnknown, CacheServiceError, ConfigError

_USAGE = 2


class Listed(NamedTuple):
    """An entry in the list of commands.

    It has the command's place, as MODULE:NAME in this package, and a short description.
    """

    where: str
    what: str


class Program(click.Group):
    """The group of all commands.

    Its help has sections, and each error is one line without a traceback.

    :param sections: the commands by name, by the title of their section in the help.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Mapping[str, Listed]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sections = sections
        self._listed = {name: listed for section in sections.values() for name, listed in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._listed)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        listed = self._listed.get(cmd_name)
        if listed is None:
            return None
        module, _, name = listed.where.partition(":")
        command: click.Command = getattr(import_module(f"{__package__}.{module}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command by name.

        click suggests similar names only among imported commands; this method knows all.
        """
        name = args[0]
        if name not in self._listed and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self._listed, 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(self._listed)}."
            raise click.UsageError(f"no such command '{name}'. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run a command, and exit with the code that a shell expects.

        The codes are 0, the command's own code, 1 for a failure, 2 for wrong usage, 130 for Ctrl-C, and 141 for a
        closed pipe.
        """
        for stream in (sys.stdout, sys.stderr):
            # Characters that the terminal cannot show become question marks instead of an error.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        settings |= {"standalone_mode": False, "prog_name": settings.get("prog_name") or "cacheservice"}
        try:
            code = super().main(*args, **settings)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(_USAGE)
        except click.UsageError as error:
            tell(in_one_line(error))
            sys.exit(_USAGE)
        except click.ClickException as error:
            tell(f"cacheservice: {error.format_message()}")
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(128 + signal.SIGINT)
        except ConfigError as error:
            tell(str(error))  # each problem names its place itself
            sys.exit(1)
        except AddressUnknown as error:
            tell(str(error))  # as for ConfigError
            sys.exit(_USAGE)
        except CacheServiceError as error:
            tell(f"cacheservice: {error}")
            sys.exit(1)
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            tell(f"cacheservice: {what}{(error.strerror or str(error)).lower()}")
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **settings: Any) -> click.Context:
        with _while_somebody_reads():
            return super().make_context(*args, **settings)  # it prints --help and --version

    def invoke(self, ctx: click.Context) -> Any:
        with _while_somebody_reads():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands in sections."""
        for title, section in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, listed.what) for name, listed in section.items()])


@contextmanager
def _while_somebody_reads() -> Iterator[None]:
    """End the command silently if its reader has gone, such as `head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush the rest at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None


def tell(line: str) -> None:
    """Print a line to standard error."""
    click.echo(line, err=True)


def in_one_line(error: click.UsageError) -> str:
    """Return the command, the error and a pointer to the help, in one line."""
    command = error.ctx.command_path if error.ctx else "cacheservice"
    message = error.format_message()
    ending = "" if message.endswith((".", "?")) else "."
    if not message[1:2].isupper():  # such as the name of a variable
        message = f"{message[:1].lower()}{message[1:]}"
    return f"{command}: {message}{ending} See: {command} --help"
