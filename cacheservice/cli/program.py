"""How every command ends: in one line that says what to do, with the exit code that belongs to it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from cacheservice.errors import CacheServiceError, ConfigError

_USAGE = 2


class Program(click.Group):
    """The group of all commands: its help shows them in sections, its errors are one line each, never a traceback.

    :param sections: the names of commands by the title that they stand under in the help.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._sections = sections

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
        for title, names in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=80)) for name in names])


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
    return f"{command}: {message[:1].lower()}{message[1:]}{ending} See: {command} --help"
