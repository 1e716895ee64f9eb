"""The group of all commands: a help in sections, late imports, one-line errors and exit codes."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple, NoReturn

import click

from cacheservice.cli import exit
from cacheservice.cli.terminal import print_error

Sections = Mapping[str, Mapping[str, "Listed"]]
"""The commands by name, by the title of their section in the help."""


class Listed(NamedTuple):
    """An entry in the list of commands.

    It has the command's place, as MODULE:NAME in this package, and a short description.
    """

    where: str
    what: str


class Program(click.Group):
    """The group of all commands. Each command is imported on demand."""

    def __init__(
        self,
        name: str | None = None,
        *,
        sections: Sections,
        callback: Callable[..., object] | None = None,
        params: list[click.Parameter] | None = None,
        help: str | None = None,
        context_settings: dict[str, object] | None = None,
    ) -> None:
        super().__init__(name, callback=callback, params=params, help=help, context_settings=context_settings)
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
            hint = f"Did you mean '{near[0]}'?" if near else f"The commands are {', '.join(self._listed)}."
            raise click.UsageError(f"no such command '{name}'. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        *_: object,
        **extra: object,
    ) -> NoReturn:
        """Run a command, and exit with its code; see `exit`."""
        for stream in (sys.stdout, sys.stderr):
            # Characters that the terminal cannot show become question marks instead of an error.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            code = super().main(args, prog_name or "cacheservice", complete_var, standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(exit.USAGE)
        except Exception as error:
            ending = exit.ending(error)
            if ending is None:
                raise
            if ending.text:
                print_error(ending.text)
            sys.exit(ending.code)
        sys.exit(code if isinstance(code, int) else exit.OK)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        with _while_output_is_read():
            return super().make_context(info_name, args, parent, **extra)  # it prints --help and --version

    def invoke(self, ctx: click.Context) -> object:
        with _while_output_is_read():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands in sections."""
        for title, section in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, listed.what) for name, listed in section.items()])


@contextmanager
def _while_output_is_read() -> Iterator[None]:
    """End the command silently if the reader of its output has gone, such as `head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush the rest at exit, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(exit.by_signal(signal.SIGPIPE)) from None
