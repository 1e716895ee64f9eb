"""How every command ends: in one line that says what to do, with the exit code that belongs to it."""

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

from cacheservice.errors import AddressUnknown, CacheServiceError, ConfigError

_USAGE = 2


class Listed(NamedTuple):
    """A command in the list of all: where it is, as MODULE:NAME in this package, and what it is in short."""

    where: str
    what: str


class Program(click.Group):
    """The group of all commands: its help shows them in sections, its errors are one line each, never a traceback.

    :param sections: the commands by name, by the title that they stand under in the help.
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
        """As click's, which does not know the names of what has not been imported."""
        name = args[0]
        if name not in self._listed and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self._listed, 1)
            hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(self._listed)}."
            raise click.UsageError(f"no such command '{name}'. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run, and exit as a shell expects: 0, the command's own code, 1 for what failed, 2 for wrong usage, 130 for
        Ctrl-C, 141 for a reader that has gone."""
        for stream in (sys.stdout, sys.stderr):
            # What the terminal cannot show is a question mark, not the end of the program.
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
            tell(str(error))  # as that of ConfigError
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
        """Click's own list, in sections."""
        for title, section in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, listed.what) for name, listed in section.items()])


@contextmanager
def _while_somebody_reads() -> Iterator[None]:
    """A reader that has gone, such as `head`, ends the command without a word."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush what is left at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None


def tell(line: str) -> None:
    """On standard error."""
    click.echo(line, err=True)


def in_one_line(error: click.UsageError) -> str:
    """Which command it was, what is wrong, and where to read on."""
    command = error.ctx.command_path if error.ctx else "cacheservice"
    message = error.format_message()
    ending = "" if message.endswith((".", "?")) else "."
    if not message[1:2].isupper():  # such as the name of a variable
        message = f"{message[:1].lower()}{message[1:]}"
    return f"{command}: {message}{ending} See: {command} --help"
