"""Laws of the settings of a reading transaction, as they are declared."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

from twisted.trial.unittest import SynchronousTestCase

from cacheservice import config
from cacheservice.base.errors import ConfigError
from cacheservice.config import DatasetSettings
from cacheservice.sources.frames.header import fingerprint
from cacheservice.sources.postgres.session_settings import pinned_sql


class Declared(SynchronousTestCase):
    def load(self, toml: str) -> config.Settings:
        with TemporaryDirectory() as directory, contextlib.chdir(directory):
            Path("cacheservice.toml").write_text(f'[postgres]\ndsn = "host=db"\n{toml}', encoding="utf-8")
            return config.load({}, lambda _: None)

    def problems(self, toml: str) -> list[str]:
        with self.assertRaises(ConfigError) as caught:
            self.load(toml)
        return [problem.removeprefix("cacheservice.toml: ") for problem in caught.exception.problems]

    DATASET = '[datasets.a]\nquery = "SELECT 1 AS id"\nkey = "id"\n'

    def test_what_a_dataset_takes_from_the_service(self) -> None:
        """A dataset has the settings of [postgres], then of [defaults], then its own; of search_path the nearest."""
        general = 'search_path = "a"\nsettings = {TimeZone = "UTC", jit = false, work_mem = 4096}\n'
        loaded = self.load(f'{general}{self.DATASET}settings = {{timezone = "Asia/Kolkata"}}').datasets["a"]
        self.assertEqual(loaded.settings, {"jit": "off", "work_mem": "4096", "timezone": "Asia/Kolkata"})
        self.assertEqual(loaded.search_path, "a, pg_temp")
        loaded = self.load(f'{general}[defaults]\nsearch_path = "b, pg_temp"\n{self.DATASET}').datasets["a"]
        self.assertEqual(loaded.search_path, "b, pg_temp")
        self.assertEqual(self.load(self.DATASET).datasets["a"].search_path, "pg_catalog, public, pg_temp")

    def test_what_is_refused(self) -> None:
        """What would break the service is refused with the reason, and so is a name or a list that cannot be one."""
        for name, reason in {
            "statement_timeout": "the service sets it for each transaction, by timeout_s",
            "SEARCH_PATH": "use the key search_path",
            "client_encoding": "documents are always UTF-8",
            "role": "log in as that role, in postgres.dsn",
        }.items():
            self.assertEqual(
                self.problems(f"settings = {{{name} = 'x'}}\n{self.DATASET}"),
                [f"postgres.settings: {name} cannot be set here: {reason}"],
            )
        self.assertEqual(
            self.problems(f"{self.DATASET}settings = {{'a; DROP TABLE b' = 'x'}}"),
            ["datasets.a.settings: 'a; DROP TABLE b' is not the name of a setting of PostgreSQL"],
        )
        self.assertEqual(
            self.problems(f"{self.DATASET}settings = {{jit = 'on', JIT = 'off'}}"),
            ["datasets.a.settings: jit is set twice"],
        )
        self.assertEqual(
            self.problems(f"{self.DATASET}settings = {{jit = []}}"),
            ["datasets.a.settings: jit must be text, a number, true or false"],
        )
        self.assertEqual(
            self.problems(f"search_path = 'public; DROP TABLE b'\n{self.DATASET}"),
            ['postgres.search_path: must be schemas as SQL writes them, such as "pg_catalog, public, ext"'],
        )

    def test_a_group_has_one_transaction(self) -> None:
        """The datasets of a group have the same settings and search_path."""
        other = self.DATASET.replace("[datasets.a]", "[datasets.b]")
        group = 'group = "g"\n'
        self.assertEqual(
            self.problems(f'{self.DATASET}{group}{other}{group}search_path = "ext"\nsettings = {{jit = "off"}}'),
            [
                f"datasets.b.{key}: must be as in a, which is in the same group and is read in the same transaction"
                for key in ("search_path", "settings")
            ],
        )

    def test_what_was_saved_is_of_the_same_settings(self) -> None:
        """A snapshot saved under other settings or another search_path is not restored."""
        plain = self.load(self.DATASET).datasets["a"]
        others = [
            self.load(f"{self.DATASET}{more}").datasets["a"]
            for more in ('settings = {TimeZone = "Europe/Berlin"}', 'search_path = "ext"')
        ]
        self.assertEqual(len({fingerprint(each) for each in [plain, *others]}), 3)
        self.assertEqual(
            fingerprint(plain), fingerprint(DatasetSettings(name="a", query="SELECT 1 AS id", key=("id",)))
        )


def test_settings_are_quoted() -> None:
    """Names and values are quoted, and the name of an extension's setting part by part."""
    chosen = {"app.tenant": "o'hare", "jit": "off"}
    assert pinned_sql(chosen).splitlines()[-2:] == [
        """SET LOCAL "app"."tenant" TO 'o''hare';""",
        """SET LOCAL "jit" TO 'off';""",
    ]
