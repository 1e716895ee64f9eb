"""`cacheservice completion`: prints a shell's completion script."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_PROGRAM = "cacheservice"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that makes SHELL complete commands, options, and the datasets of the configuration file.

    \b
    Examples:
      source <(cacheservice completion bash)                              bash, this session only
      cacheservice completion bash > ~/.local/share/bash-completion/completions/cacheservice
      cacheservice completion zsh > "${fpath[1]}/_cacheservice"           zsh
      cacheservice completion fish > ~/.config/fish/completions/cacheservice.fish
    """
    script = get_completion_class(shell)
    assert script is not None, "click knows all choices"
    click.echo(script(context.find_root().command, {}, _PROGRAM, f"_{_PROGRAM.upper()}_COMPLETE").source())
