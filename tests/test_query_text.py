"""Laws of the text of queries: whatever PostgreSQL takes for a part of a query stays in effect when it is wrapped."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.query_text import closed, without_semicolon
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.sources.postgres.statements import columns_query, probe_query, rows_query, whole_query
from tests.kit.postgres import connect, fresh_database

PIECES = st.sampled_from(
    [
        "'", "''", '"', "E'", "e'", "U&'", "x'1'", "N'", "$$", "$a$", "$é$", "$1", "a$", "\\", "\\'", "/*", "*/", "--",
        "-", "#", ";", "\n", "\r", " ", "\t", "(", ")", "1", "a", "e", "é", "*", "/", "+", "@", "|", "{", "}", "`", ":",
        ",",
    ]
)  # fmt: skip
VALUES = st.sampled_from(
    [
        "1", "(6 # 3)", "7#3", "'a--b'", "'/*'", "';'", "E'a\\';--'", "e'\\\\'", "'it''s;'", "$$;--'$$",
        "$q$/*;*/$$$q$", "'x'\n'y;'", "E'x'\n'y\\';'", "E'x' -- ;'\n -- '\n'y\\'--'", "'é'", "'{a;b}'::text",
        "ARRAY[1,2]::text", "'`#{}'", "(2 ^ 3)", "@ -5", "U&'d\\0061t;'", "'\\'", "'a'||'\\'", "B'10'", "(1 - -1)",
        "5 /* ; */ * 2", "'1'::\"text\"",
    ]
)  # fmt: skip
BETWEEN = st.sampled_from(
    ["", " ", "\n", "/* ; */", "/* /* ' */ \" */", "-- ; '\n", "--\r", "\t", " /**/ ", "/*/ */", "/* -- */"]
)
ENDS = st.lists(st.sampled_from([";", " ", "\n", "-- ; a '\n", "/* ; */", "/* /* ; */ ' */", "--;"]), max_size=5)


@pytest.mark.usefixtures("server")
class QueryText(SynchronousTestCase):
    server: EmbeddedPostgres

    def setUp(self) -> None:
        name = fresh_database(self.server, self.addCleanup)
        self.connection = connect(self.server, name)
        self.addCleanup(self.connection.close)

    def answer(self, statement: str) -> tuple[list[tuple[Any, ...]], str]:
        """What the server answers: rows, or its error."""
        with closing(self.connection.cursor()) as cursor:
            try:
                cursor.execute(statement)
                return (cursor.fetchall() if cursor.description else []), ""
            except psycopg2.Error as error:
                return [], str(error)

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(VALUES, BETWEEN, BETWEEN), min_size=1, max_size=4), ENDS)
    @example([("1", "", "")], ["-- ;"])
    def test_what_is_in_effect(self, columns: list[tuple[str, str, str]], ends: list[str]) -> None:
        """A wrapped query returns what the query returns by itself, and so does a wrapped probe."""
        listed = ",".join(f" {before} ({value}) {after}" for value, before, after in columns)
        query = f"SELECT{listed}" + "".join(ends)
        rows, error = self.answer(query)
        assume(not error)
        self.assertEqual(self.answer(whole_query(query)), (rows, ""))
        self.assertEqual(closed(query), query)
        one = f"SELECT ({columns[0][0]}) {columns[0][1]}" + "".join(ends)
        rows, error = self.answer(f"SELECT ({columns[0][0]})::text")
        self.assertEqual(self.answer(probe_query(one)), (rows, error))

    @settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))
    @given(st.lists(PIECES, max_size=12).map("".join))
    @example("E'a'\n'\\'")
    @example("E'a' --'\n'\\''")
    @example("'a'\n'\\'")
    @example("a$b$;")
    @example("$a$;$A$")
    @example("/*/;")
    @example("1$a$ ' $a$")
    def test_what_is_open(self, text: str) -> None:
        """What the server calls unterminated is found open, and what it accepts is not."""
        _, error = self.answer(f"SELECT 1 WHERE 1 = 1 {text}")
        try:
            without_semicolon(text)
        except ValueError:
            self.assertNotEqual(error, "")
        else:
            self.assertNotIn("unterminated", error)

    def test_operators_of_postgresql(self) -> None:
        """No character but those of PostgreSQL's comments begins one."""
        for condition, expected in (("2 = 1 # 3", 1), ("3 = 1 # 3", 0), ("'{`#}' = '{`#}' -- # {", 1)):
            query = f"SELECT 1 AS id WHERE {condition}"
            for end in ("", ";", " ; -- # ;\n;", "/* ' */;"):
                self.assertEqual(len(self.answer(whole_query(query + end))[0]), expected, query + end)
                self.assertEqual(len(self.answer(rows_query(query + end, ["id"]))[0]), expected)
                self.assertEqual(self.answer(columns_query(query + end)), ([], ""))
        self.assertEqual(self.answer(probe_query("SELECT 5 # 3;"))[0][0][0], "6")
