"""Finds the row whose bytes cannot be converted to UTF-8.

A refresh has failed with them. The server converts rows while it sends them, and its error names neither row nor
column. Therefore the rows are read once more without a conversion, and decoded here.
"""

from __future__ import annotations

from collections.abc import Callable

from psycopg2 import extensions

from cacheservice.base.errors import QueryFailed, RefreshFailed
from cacheservice.base.interfaces import Reactor
from cacheservice.base.timers import pause
from cacheservice.sources.postgres.guard import GuardedConnection

_SQLSTATES = ("22021", "22P05")
"""character_not_in_repertoire, untranslatable_character"""
_CHUNK_ROWS = 200
_MOST_KEY_CHARACTERS = 80
_WITHOUT_CONVERSION = "SET LOCAL client_encoding = SQL_ASCII"
_UNCONVERTED = "SQL_ASCII"


def is_about_bytes(error: QueryFailed) -> bool:
    return error.sqlstate in _SQLSTATES


async def name_row(
    reactor: Reactor, guard: GuardedConnection, begin: str, rows_sql: str, name: str, error: QueryFailed
) -> QueryFailed | None:
    """Return `error` with the dataset, its first bad row's key and the encoding.

    None if all rows are good. The encoding is the database's.

    :param guard: the session of the refresh that failed; its deadline still applies.
    :param begin: the statements that begin a reading transaction.
    :param rows_sql: returns (key, document) of each row of the dataset.
    """
    encoding = guard.parameter("server_encoding")
    decode = _decoder(encoding)
    try:
        await guard.execute("ROLLBACK")
        await guard.execute(f"{begin}{_WITHOUT_CONVERSION}")
        await guard.execute(f"DECLARE rows NO SCROLL CURSOR FOR {rows_sql}")
        while True:
            cursor = await guard.execute(f"FETCH FORWARD {_CHUNK_ROWS} FROM rows")
            for key, document in cursor.fetchall():
                if key is not None and not (decode(key) and decode(document)):
                    return _named(name, encoding, _shown(key), error)
            if not cursor.rowcount:
                return None
            await pause(reactor)
    except RefreshFailed:
        return None  # the error of the refresh matters more


def _named(name: str, encoding: str, key: str, error: QueryFailed) -> QueryFailed:
    what = (
        "bytes that are not text in UTF-8, and the database's encoding is SQL_ASCII, which checks none"
        if encoding == _UNCONVERTED
        else f"a character of the database's encoding {encoding} that has no form in UTF-8"
    )
    return QueryFailed(
        f'{name}: the row with the key "{key}" holds {what} (SQLSTATE {error.sqlstate})', error.sqlstate, error.advice
    )


def _decoder(encoding: str) -> Callable[[bytes], bool]:
    """Return a function that checks whether stored bytes can become UTF-8."""
    codec = "utf-8" if encoding == _UNCONVERTED else extensions.encodings.get(encoding, "utf-8")

    def decodes(data: bytes) -> bool:
        try:
            data.decode(codec)
        except UnicodeDecodeError:
            return False
        return True

    return decodes


def _shown(key: bytes) -> str:
    text = key.decode("utf-8", "backslashreplace")
    return text if len(text) <= _MOST_KEY_CHARACTERS else f"{text[:_MOST_KEY_CHARACTERS]}…"
