"""The served key of a row, as SQL and for recorded keys.

PostgreSQL makes the keys of full reads, and this module those of recorded rows. Both must agree for every row. Values
of several columns are joined with a separator. Unless they are escaped, two rows may have the same key: ("a:b", "c")
and ("a", "b:c"). A full read refuses such rows, so a delta has to detect them, too. Therefore, if a key can be split in
several ways, the delta asks for all rows with the joined key, not only for the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cacheservice.config import DatasetSettings
from cacheservice.sources.full_or_delta import Key
from cacheservice.sources.postgres.quoting import array, literal

ESCAPE = "\\"


@dataclass(frozen=True, slots=True)
class KeyForm:
    """How the values of the key's columns are joined to one text."""

    separator: str = ":"
    escaped: bool = False

    @classmethod
    def of(cls, dataset: DatasetSettings) -> KeyForm:
        return cls(dataset.key_separator, dataset.key_escape and len(dataset.key) > 1)

    def join(self, key: Key) -> bytes:
        """Return the key as it is served."""
        if len(key) == 1 and not self.escaped:
            return str(key[0]).encode()
        return self.separator.join(self._part(str(value)) for value in key).encode()

    def _part(self, value: str) -> str:
        if not self.escaped:
            return value
        return value.replace(ESCAPE, ESCAPE * 2).replace(self.separator, ESCAPE + self.separator)

    def sql(self, columns: Sequence[str]) -> str:
        """Return the SQL expression for the key as it is served.

        :param columns: quoted, as q.column.
        """
        return f" || {literal(self.separator)} || ".join(self._part_sql(f"{column}::text") for column in columns)

    def _part_sql(self, value: str) -> str:
        if not self.escaped:
            return value
        doubled = f"replace({value}, {literal(ESCAPE)}, {literal(ESCAPE * 2)})"
        return f"replace({doubled}, {literal(self.separator)}, {literal(ESCAPE + self.separator)})"

    def is_ambiguous(self, key: Key) -> bool:
        """Return whether other values could have the same key."""
        if self.escaped or len(key) == 1:
            return False
        text, found, place = self.join(key).decode(), 0, -1
        while (place := text.find(self.separator, place + 1)) >= 0:
            found += 1
        return found >= len(key)

    def predicate(self, columns: Sequence[str], keys: Iterable[Key]) -> str:
        """Return a condition that matches exactly the rows whose served key is in `keys`.

        The literals have no type, so each takes the type of its column, and an index on the column can be used.
        """
        known = [key for key in keys if None not in key]
        if len(columns) == 1:
            return f"{columns[0]} = ANY ({array(key[0] for key in known)})"
        plain = [key for key in known if not self.is_ambiguous(key)]
        ambiguous = [self.join(key).decode() for key in known if self.is_ambiguous(key)]
        # A condition for each column, for its index; the last condition removes combinations that are not in `keys`.
        single = [f"{column} = ANY ({array(key[place] for key in plain)})" for place, column in enumerate(columns)]
        whole = self.joined_predicate(columns, (self.join(key).decode() for key in plain))
        conditions = " AND ".join([*single, whole])
        return f"({conditions}) OR {self.joined_predicate(columns, ambiguous)}" if ambiguous else conditions

    def joined_predicate(self, columns: Sequence[str], keys: Iterable[str]) -> str:
        """Return the same condition for keys as they are served."""
        # "C", because a nondeterministic collation could match a different key.
        return f'({self.sql(columns)}) COLLATE "C" = ANY ({array(keys)})'
