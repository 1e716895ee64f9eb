"""The command line: `cacheservice COMMAND`.

Each command is imported on demand, because importing all of them takes three times as long as a status query.
"""

from __future__ import annotations

import click

from cacheservice import __version__
from cacheservice.cli.program import Listed, Program

_SECTIONS = {
    "Try it": {
        "demo": Listed("demo:demo", "A sample database and the service in front of it, in one go."),
    },
    "Prepare": {
        "check": Listed("check:check", "Is the configuration right? (--db: and the database ready for it?)"),
        "migrate": Listed("prepare:migrate", "Bring the service's schema into the database; make a reader."),
        "watch": Listed("prepare:watch", "Record the keys of a table's changed rows, for deltas."),
        "unwatch": Listed("prepare:unwatch", "Undo watch."),
    },
    "Run": {
        "run": Listed("run:run", "Run the service, in the foreground."),
        "reload": Listed("reload:reload", "Make it read its configuration again; wait for the result."),
    },
    "Look": {
        "status": Listed("status:status", "How are the service and its datasets? (--watch: live)"),
        "why": Listed("status:why", "Why is a dataset as it is, and what is there to do?"),
        "health": Listed("health:health", "Is it alive? Exit code 0 or 1, for containers."),
        "tail": Listed("tail:tail", "Follow publishes, failures and changes of state."),
    },
    "Shell": {
        "completion": Listed("completion:completion", "Print what makes a shell complete commands and datasets."),
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
      cacheservice demo                  everything at once, on a sample database
      cacheservice check --db            are the configuration and the database ready?
      cacheservice run                   the service
      cacheservice status                how is it?      (--watch: live)
      cacheservice why products          why is this one old?
      cacheservice COMMAND --help        more of each, with examples
    """
