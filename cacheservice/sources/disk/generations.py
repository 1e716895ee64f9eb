"""The saved generations of each dataset, as the store knows them. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import ref

from cacheservice.base.errors import UnknownGeneration
from cacheservice.cache.rows import Rows
from cacheservice.cache.snapshot import Snapshot
from cacheservice.sources.disk.layout import Saved, renewal_of, snapshot_path
from cacheservice.sources.frames.header import Header

Names = tuple[str, ...]
"""The names of the datasets of one group, or the name of a single dataset."""


class Generations:
    """The generations on disk: as they were found, updated by each save and by each file that was refused.

    For each generation that was saved or loaded by this process it knows which rows it holds, by weak references.

    :param directory: the directory of the files.
    :param keep: files kept of a dataset, at least 1.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self._keep = keep
        self._saved: dict[str, Saved] = {}
        self._rows: dict[str, dict[int, ref[Rows]]] = {}

    def path(self, name: str, generation: int) -> Path:
        """Return the file of a generation."""
        return snapshot_path(self.directory, name, generation)

    def of(self, name: str) -> list[int]:
        """Return the generations of one dataset, newest first."""
        return list(self._saved.get(name, ()))

    def of_one_moment(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the generations that can be restored, newest first.

        For a group these are the combinations of generations of one moment.
        """
        if len(names) == 1:
            return [(generation,) for generation in self.of(names[0])]
        return of_one_moment([self._saved.get(name, {}) for name in names])

    def unreadable(self, name: str) -> list[int]:
        """Return the generations of one dataset whose headers could not be read."""
        return [generation for generation, header in self._saved.get(name, {}).items() if header is None]

    def holds(self, header: Header) -> bool:
        """Return whether the rows with this header are saved under its generation."""
        saved = self._saved.get(header.dataset, {}).get(header.generation)
        return saved is not None and header.renews(saved)

    def to_keep(self, names: Names, snapshots: Sequence[Snapshot]) -> dict[str, set[int]]:
        """Return the generations of each dataset to keep on disk once `snapshots` are saved.

        Of several files with the same rows only the newest is kept.
        """
        generations = tuple(snapshot.generation for snapshot in snapshots)
        # Generations only rise, so a higher number on disk is from before the restored snapshot. If it stayed, it would
        # be restored as the newest.
        older = [
            each
            for each in self.of_one_moment(names)
            if each != generations
            and all(other <= new for other, new in zip(each, generations, strict=True))
            and not all(map(self._has_rows, names, each, snapshots))
        ]
        moments = [generations, *older[: self._keep - 1]]
        return {name: set(each) for name, each in zip(names, zip(*moments, strict=True), strict=True)}

    def _has_rows(self, name: str, generation: int, snapshot: Snapshot) -> bool:
        """Return whether that generation holds the very rows of `snapshot`.

        That happens when a rollback was undone.
        """
        saved = self._rows.get(name, {}).get(generation)
        return saved is not None and saved() is snapshot.rows

    def to_remove(self, kept: Mapping[str, set[int]]) -> list[Path]:
        """Return the files of these datasets whose generations are not in `kept`."""
        return [
            path
            for name, generations in kept.items()
            for generation in self.of(name)
            if generation not in generations
            for path in (self.path(name, generation), renewal_of(self.path(name, generation)))
        ]

    def note_found(self, found: Mapping[str, Saved]) -> None:
        """Add the generations of datasets that were not known.

        Those of known datasets stay, because the saves of this process have kept them current.
        """
        self._saved = {**found, **self._saved}

    def note_loaded(self, name: str, generation: int, rows: Rows) -> None:
        """Note the rows of a generation that was loaded."""
        self._rows.setdefault(name, {})[generation] = ref(rows)

    def note_saved(self, header: Header, rows: ref[Rows], kept: set[int]) -> None:
        """Note a generation that was saved, with its rows, and forget the generations that are not in `kept`."""
        name, generation = header.dataset, header.generation
        older = self._saved.get(name, {})
        others = [each for each in older if each in kept and each != generation]
        known = self._rows.get(name, {}) | {generation: rows}
        self._rows[name] = {each: known[each] for each in known if each in kept}
        self._saved[name] = {generation: header, **{each: older[each] for each in others}}

    def forget(self, name: str, generation: int) -> None:
        """Note that a generation is not on disk any more."""
        self._saved.get(name, {}).pop(generation, None)
        self._rows.get(name, {}).pop(generation, None)

    def unknown(self, name: str, generation: int) -> UnknownGeneration:
        """Return the error for a generation that is not on disk."""
        known = ", ".join(map(str, self.of(name))) or "none"
        return UnknownGeneration(f"generation {generation} of {name} is not on disk; there are: {known}")


def of_one_moment(saved: Sequence[Saved]) -> list[tuple[int, ...]]:
    """Return the combinations of a group's generations of one moment, newest first.

    A generation was served from its first read to its last renewal. The members of a group are read together, so
    wherever these spans overlap there is a moment at which all of them were served.
    """
    known = [[(number, header) for number, header in each.items() if header is not None] for each in saved]
    return [tuple(number for number, _ in combined) for combined in _overlapping(known)]


def _overlapping(members: Sequence[Sequence[tuple[int, Header]]]) -> list[list[tuple[int, Header]]]:
    if not members:
        return [[]]
    first, *others = members
    rests = _overlapping(others)
    return [[each, *rest] for each in first for rest in rests if _overlap([header for _, header in (each, *rest)])]


def _overlap(headers: Sequence[Header]) -> bool:
    ends = [max(header.as_of, header.modified_as_of) for header in headers]
    return max(header.modified_as_of for header in headers) <= min(ends)
