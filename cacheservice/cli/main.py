"""The command line: `cacheservice COMMAND`.

Each command is imported on demand, because importing all of them takes three times as long as a status query.
"""

from __future__ import annotations

import click

from cacheservice import __version__
from cacheservice.cli.program import Listed, Program

_SECTIONS = {
    "Try it": {
        "demo": Listed("demo:demo", "Start a sample database and the service in front of it."),
    },
    "Prepare": {
        "check": Listed("check:check", "Check the configuration (--db: and the database)."),
        "migrate": Listed("prepare:migrate", "Create or update the service's schema; create a reader."),
        "watch": Listed("prepare:watch", "Record the keys of a table's changed rows, for deltas."),
        "unwatch": Listed("prepare:unwatch", "Undo watch."),
    },
    "Run": {
        "run": Listed("run:run", "Run the service in the foreground."),
        "reload": Listed("reload:reload", "Reload the configuration, and wait for the result."),
    },
    "Look": {
        "status": Listed("status:status", "Show the service and its datasets (--watch: live)."),
        "why": Listed("status:why", "Explain the state of a dataset, and what to do."),
        "health": Listed("health:health", "Check that the service is alive: exit code 0 or 1."),
        "tail": Listed("tail:tail", "Follow publishes, failures and changes of state."),
    },
    "Shell": {
        "completion": Listed("completion:completion", "Print a script that completes commands and datasets."),
    },
}


@click.group(
    cls=Program,
    sections=_SECTIONS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="cacheservice")
def main() -> None:
    """Keeps the results of declared PostgreSQL queries hot in memory, with the age of every answer known.

    The configuration is cacheservice.toml in the working directory, or the file that CACHESERVICE_CONFIG names.

    \b
    To begin:
      cacheservice demo                  a sample database with the service in front of it
      cacheservice check --db            check the configuration and the database
      cacheservice run                   run the service
      cacheservice status                show its state      (--watch: live)
      cacheservice why products          explain why a dataset is old
      cacheservice COMMAND --help        more about each command, with examples
    """
