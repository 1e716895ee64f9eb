"""Laws of the text of queries."""

from __future__ import annotations

from pydantic import ValidationError
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.base.query_text import without_semicolon
from cacheservice.config import DatasetSettings


class Closed(SynchronousTestCase):
    def test_only_the_last_semicolons_go(self) -> None:
        """All but the semicolons after the last word stays, comments included."""
        for query, expected in (
            ("SELECT 1;", "SELECT 1"),
            ("SELECT 1 ; -- ;\n ;/* ; */", "SELECT 1  -- ;\n /* ; */"),
            ("SELECT ';' # 1", "SELECT ';' # 1"),
            ("SELECT 1; SELECT 2;", "SELECT 1; SELECT 2"),
            ("SELECT $$;$$;", "SELECT $$;$$"),
        ):
            self.assertEqual(without_semicolon(query), expected)

    def test_what_would_swallow_what_follows(self) -> None:
        """An open comment, quote or parenthesis is refused with the place where it opens and the way to end it."""
        for query, problem in (
            ("SELECT 1\n/* /* */", "must close the comment that /* opens in line 2; end it with */"),
            ("SELECT 'it''s", "must close the quote that ' opens in line 1; end it with '"),
            ("SELECT\nE'it\\'", "must close the quote that E' opens in line 2; end it with '"),
            ('SELECT "a""', 'must close the quote that " opens in line 1; end it with "'),
            ("SELECT $q$ $$", "must close the quote that $q$ opens in line 1; end it with $q$"),
            ("SELECT (1\n", "must close the ( of line 1; end it with )"),
            ("SELECT 1) AS q, (SELECT 2", "must open what the ) of line 1 closes; or remove it"),
        ):
            for place in ("query", "probe"):
                with self.assertRaises(ValidationError) as raised:
                    DatasetSettings.model_validate({"name": "d", "query": "SELECT 1", "key": "id", place: query})
                (error,) = raised.exception.errors()
                self.assertEqual((error["loc"], error["msg"]), ((place,), f"Value error, {problem}"))
