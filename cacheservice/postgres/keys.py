"""The key of a row as it is served: made by PostgreSQL for whole results, here for the keys that were recorded.

Both have to agree for every row. Values of several columns are joined with a separator, and unless they are escaped,
two rows may have the same key: ("a:b", "c") and ("a", "b:c"). A full read refuses that, so a delta has to see it, too:
of a key that can be taken apart in several ways it asks for all rows that have it, not only for the one recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cacheservice.config import DatasetSettings

Key = tuple[str | None, ...]
ESCAPE = "\\"


@dataclass(frozen=True, slots=True)
class KeyForm:
    """How the values of the key's columns become one text."""

    separator: str = ":"
    escaped: bool = False

    @classmethod
    def of(cls, dataset: DatasetSettings) -> KeyForm:
        return cls(dataset.key_separator, dataset.key_escape and len(dataset.key) > 1)

    def join(self, key: Key) -> bytes:
        """The key as it is served."""
        if len(key) == 1 and not self.escaped:
            return str(key[0]).encode()
        return self.separator.join(self._part(str(value)) for value in key).encode()

    def _part(self, value: str) -> str:
        if not self.escaped:
            return value
        return value.replace(ESCAPE, ESCAPE * 2).replace(self.separator, ESCAPE + self.separator)

    def sql(self, columns: Sequence[str]) -> str:
        """The same as an expression.

        :param columns: quoted, as q.column.
        """
        return f" || {literal(self.separator)} || ".join(self._part_sql(f"{column}::text") for column in columns)

    def _part_sql(self, value: str) -> str:
        if not self.escaped:
            return value
        doubled = f"replace({value}, {literal(ESCAPE)}, {literal(ESCAPE * 2)})"
        return f"replace({doubled}, {literal(self.separator)}, {literal(ESCAPE + self.separator)})"

    def is_ambiguous(self, key: Key) -> bool:
        """Whether other values could have the same key."""
        if self.escaped or len(key) == 1:
            return False
        text, found, place = self.join(key).decode(), 0, -1
        while (place := text.find(self.separator, place + 1)) >= 0:
            found += 1
        return found >= len(key)

    def predicate(self, columns: Sequence[str], keys: Iterable[Key]) -> str:
        """A condition that exactly the rows whose served key is one of `keys` meet.

        The literals have no type, so that each takes that of its column, and an index on it can be used.
        """
        known = [key for key in keys if None not in key]
        if len(columns) == 1:
            return f"{columns[0]} = ANY ({array(key[0] for key in known)})"
        plain = [key for key in known if not self.is_ambiguous(key)]
        ambiguous = [self.join(key).decode() for key in known if self.is_ambiguous(key)]
        # Each column by itself, for its index; the combinations that nobody asked for fall through the last condition.
        single = [f"{column} = ANY ({array(key[place] for key in plain)})" for place, column in enumerate(columns)]
        whole = self.joined_predicate(columns, (self.join(key).decode() for key in plain))
        conditions = " AND ".join([*single, whole])
        return f"({conditions}) OR {self.joined_predicate(columns, ambiguous)}" if ambiguous else conditions

    def joined_predicate(self, columns: Sequence[str], keys: Iterable[str]) -> str:
        """The same for keys as they are served."""
        # "C": a nondeterministic collation would take one key for another.
        return f'({self.sql(columns)}) COLLATE "C" = ANY ({array(keys)})'


def array(values: Iterable[object]) -> str:
    """A literal of an array of `values`, each once."""
    texts = [str(value) for value in dict.fromkeys(values)]
    if any('"' in text or "\\" in text for text in texts):
        texts = [text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]
    return literal('{"' + '","'.join(texts) + '"}' if texts else "{}")


def literal(text: str) -> str:
    """`text` as SQL writes it, whatever standard_conforming_strings is."""
    quoted = text.replace("'", "''")
    return f"'{quoted}'" if "\\" not in quoted else " E'" + quoted.replace("\\", "\\\\") + "'"
