"""The steps before there is a service: loading the configuration and opening the log."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from cacheservice import config
from cacheservice.app import signals
from cacheservice.base.errors import ConfigError
from cacheservice.base.interfaces import Log
from cacheservice.config import ConfigFile, Settings
from cacheservice.ops import logs
from cacheservice.sources.postgres import target


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Load the configuration of this environment.

    :raises ConfigError: with every problem of the configuration.
    """
    return config.load(environ, target.problem)


def load_settings_or_exit(environ: Mapping[str, str]) -> Settings:
    """Load the configuration, or print its problems and exit with code 1.

    Each problem is one line on standard error. Used at the start of a program.
    """
    try:
        return load_settings(environ)
    except ConfigError as error:
        print_error(str(error))
        raise SystemExit(1) from None


def load_with_file() -> tuple[Settings, ConfigFile]:
    """Return the current settings and the file that they were read from.

    :raises ConfigError: with every problem of the configuration.
    """
    file = config.config_file(os.environ)  # first: a version that is written during the load must not count as read
    return load_settings(os.environ), file


def make_log(settings: Settings, arguments: Sequence[str] = ()) -> tuple[logs.LineWriter, logs.Threshold, Log]:
    """Return the log writer (not started), the log threshold and the logger.

    :param arguments: those of twistd, which may name a log file. Without one the log goes to standard output.
    """
    path = signals.log_file(arguments)
    try:
        writer = logs.LineWriter(logs.destination(path), logs.lost_line, path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        print_error(f"cacheservice: --logfile: {path}: {reason}; name a file that can be written")
        raise SystemExit(1) from None
    threshold = logs.Threshold(settings.log.level)
    log = logs.make_logger(threshold, settings.log.format, writer.write, colors=path is None and os.isatty(1))
    return writer, threshold, log


def print_error(text: str) -> None:
    """Print a line for a person at a terminal, before there is a log."""
    # twistd replaces sys.stderr by an object that logs.
    print(text, file=sys.__stderr__, flush=True)
