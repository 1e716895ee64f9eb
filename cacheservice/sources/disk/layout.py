"""The names of the files in the directory of saved snapshots, and the work on whole files.

Everything that touches a file blocks, so callers use a thread.

A dataset `products` has a file ``products.000000000007.snapshot`` for generation 7, and beside it
``products.000000000007.renewal`` if later reads returned the same rows. A file that is being written has a hidden name
that ends in ``.tmp``; a file that was refused has the suffix ``.rejected``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Generator, Iterable
from contextlib import suppress
from pathlib import Path

from cacheservice.base import file_errors
from cacheservice.base.errors import SnapshotRejected
from cacheservice.config import DatasetSettings
from cacheservice.sources.disk.format import read, read_whole_header
from cacheservice.sources.frames.header import Header

Saved = dict[int, Header | None]
"""The generations of a dataset on disk, newest first, with their headers after renewals; None if the header cannot be
read."""

_SAVED = re.compile(r"([a-z][a-z0-9_]{0,62})\.(?!0{12})([0-9]{12})\.snapshot")
_RENEWAL = re.compile(r"[a-z][a-z0-9_]{0,62}\.[0-9]{12}\.renewal")
_TEMPORARY = re.compile(r"\.[a-z][a-z0-9_]{0,62}\.[0-9]{12}\.[0-9]+\.tmp")


def snapshot_path(directory: Path, name: str, generation: int) -> Path:
    """Return the file of a generation."""
    return directory / f"{name}.{generation:012}.snapshot"


def renewal_of(path: Path) -> Path:
    """Return the file that renews the saved file `path`."""
    return path.with_suffix(".renewal")


def temporary_path(directory: Path, name: str, generation: int) -> Path:
    """Return the file under which this process writes a generation until it is complete."""
    return directory / f".{name}.{generation:012}.{os.getpid()}.tmp"


def scan(directory: Path, busy: Collection[Path]) -> dict[str, Saved]:
    """Return the saved files by dataset.

    The unfinished files of a killed process are removed; those in `busy` are being written by this one.

    :raises OSError: if the directory exists and cannot be read.
    """
    found: dict[str, Saved] = {}
    try:
        entries = sorted(directory.iterdir(), reverse=True)
    except FileNotFoundError:
        return found
    for path in entries:
        if _TEMPORARY.fullmatch(path.name) and path not in busy:
            remove([path])
        elif (named := _SAVED.fullmatch(path.name)) and path.is_file():
            found.setdefault(named[1], {})[int(named[2])] = _saved_header(path)
        elif _RENEWAL.fullmatch(path.name) and not path.with_suffix(".snapshot").exists():
            remove([path])  # a killed process left it without its snapshot
    return found


def _saved_header(path: Path) -> Header | None:
    try:
        header, blocks = read(path)
    except (SnapshotRejected, OSError):
        return None  # logged when it is loaded
    blocks.close()
    return _renewed(header, path)


def _renewed(header: Header, path: Path) -> Header:
    """Return the header after its renewal.

    The file's own header is returned if there is no renewal, or if the renewal is damaged or belongs to other rows.
    """
    try:
        renewed = read_whole_header(renewal_of(path))
    except (SnapshotRejected, OSError):
        return header
    return renewed if renewed.renews(header) else header


def open_saved(path: Path, settings: DatasetSettings, generation: int) -> tuple[Header, Generator[bytes]]:
    """Return the header of a file after its renewal, and a generator of its blocks; see `read`.

    :raises SnapshotRejected: if something is wrong with the file, or it belongs to something else.
    :raises OSError: if it cannot be read.
    """
    header, blocks = read(path)
    try:
        header.check(settings, generation, path.name)
    except SnapshotRejected:
        blocks.close()
        raise
    return _renewed(header, path), blocks


def move_aside(path: Path) -> None:
    """Rename a refused file, so that it is not tried again, and remove its renewal."""
    with suppress(OSError):
        path.replace(path.with_name(f"{path.name}.rejected"))
    remove([renewal_of(path)])


def remove(paths: Iterable[Path]) -> None:
    """Remove these files, as far as possible."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def problem_of(directory: Path, error: Exception) -> str:
    """Return the problem of a save or a restore.

    The text is the same each time the same problem occurs.
    """
    if isinstance(error, OSError):
        return file_errors.of_folder("persistence.directory", directory, error)
    return f"{directory}: an internal error, {type(error).__name__}; its traceback is in the log"
