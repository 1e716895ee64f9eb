"""Laws of the configuration: what loads, what is refused, and in which words."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from twisted.trial.unittest import SynchronousTestCase

from cacheservice import config
from cacheservice.base.errors import ConfigError
from cacheservice.config import Settings

SECRET = "postgresql://u:hunter2@db/shop"
DSN = f'[postgres]\ndsn = "{SECRET}"\n'
PRODUCTS = '[datasets.products]\nquery = "SELECT 1 AS id"\nkey = "id"\n'
FILE = "cacheservice.toml"


def no_dsn_problem(_dsn: str) -> str | None:
    return None


class Loading(SynchronousTestCase):
    """A directory of its own is the working directory of each test."""

    def setUp(self) -> None:
        directory = self.enterContext(TemporaryDirectory())
        self.enterContext(contextlib.chdir(directory))

    def load(self, toml: str | None = None, /, **environ: str) -> Settings:
        if toml is not None:
            Path(FILE).write_text(toml, encoding="utf-8")
        return config.load({f"CACHESERVICE_{name}": value for name, value in environ.items()}, no_dsn_problem)

    def problems(self, toml: str | None = None, /, **environ: str) -> list[str]:
        with self.assertRaises(ConfigError) as caught:
            self.load(toml, **environ)
        for problem in caught.exception.problems:
            self.assertNotIn("hunter2", problem)
            self.assertEqual(len(problem.splitlines()), 1, problem)
        return list(caught.exception.problems)


class WhatLoads(Loading):
    def test_a_group_is_refreshed_at_one_time(self) -> None:
        """The schedule is the same for all of a group; a difference is a problem that names both."""
        group = 'query = "SELECT 1"\nkey = "id"\ngroup = "g"\n'
        toml = f"{DSN}[datasets.a]\n{group}interval_s = 5\n[datasets.b]\n{group}interval_s = 6\nmax_age_s = 99\n"
        with self.assertRaises(ConfigError) as caught:
            self.load(toml)
        problem = f"{FILE}: datasets.b.interval_s: must be 5, as in a, which is in the same group"
        self.assertEqual(caught.exception.problems, (problem,))
        self.load(toml.replace("interval_s = 6", "interval_s = 5"))

    def test_defaults(self) -> None:
        """With a DSN and one dataset, every other key has the contract's default."""
        loaded = self.load(DSN + PRODUCTS)
        self.assertEqual((loaded.postgres.connect_timeout_s, loaded.postgres.max_connections), (5.0, 2))
        self.assertEqual((loaded.status.host, loaded.status.port, loaded.admin.socket), ("127.0.0.1", 8000, ""))
        self.assertEqual((loaded.resp.enabled, loaded.resp.host, loaded.resp.port), (True, "127.0.0.1", 6380))
        self.assertEqual((loaded.http.enabled, loaded.http.host, loaded.http.port), (True, "127.0.0.1", 8080))
        self.assertEqual((loaded.resp.password.get_secret_value(), loaded.http.token.get_secret_value()), ("", ""))
        self.assertEqual((loaded.limits.max_connections, loaded.limits.idle_timeout_s), (10_000, 300.0))
        self.assertFalse(loaded.limits.allow_anonymous)
        self.assertEqual((loaded.log.level, loaded.log.format), ("info", "json"))
        self.assertEqual(
            loaded.datasets["products"].model_dump(),
            {
                "name": "products",
                "query": "SELECT 1 AS id",
                "key": ("id",),
                "interval_s": 600.0,
                "timeout_s": 30.0,
                "max_age_s": 1800.0,
                "required": True,
                "retry_initial_s": 1.0,
                "retry_max_s": 60.0,
                "jitter": 0.1,
                "min_rows": 0,
                "max_shrink": 0.5,
                "on_column_removed": "hold",
                "notify": "",
                "probe": "",
                "group": "",
                "watch": (),
                "max_delta": 0.1,
                "full_interval_s": 3600.0,
                "max_rows": 0,
                "on_expired": "serve",
                "max_bytes": 0,
                "search_path": "pg_catalog, public, pg_temp",
                "settings": {},
                "key_separator": ":",
                "key_escape": False,
            },
        )

    def test_dsn_is_kept_secret(self) -> None:
        """The DSN can be read on request, and is in no repr."""
        loaded = self.load(DSN + PRODUCTS)
        self.assertEqual(loaded.postgres.dsn.get_secret_value(), SECRET)
        self.assertNotIn("hunter2", repr(loaded) + str(loaded))

    def test_frozen(self) -> None:
        """Nothing in loaded settings can be set, added or removed."""
        loaded = self.load(DSN + PRODUCTS)
        for table, key in ((loaded, "log"), (loaded.status, "port"), (loaded.datasets["products"], "query")):
            with self.assertRaises(ValidationError):
                setattr(table, key, getattr(table, key))
        with self.assertRaises(TypeError):
            loaded.datasets["prices"] = loaded.datasets["products"]  # type: ignore[index]

    def test_whole_numbers_of_seconds_are_floats(self) -> None:
        """Seconds are floats, also when the file has them without a point."""
        interval_s = self.load(DSN + PRODUCTS + "interval_s = 60").datasets["products"].interval_s
        self.assertEqual((interval_s, type(interval_s)), (60.0, float))

    def test_key_is_a_tuple(self) -> None:
        """A key of one column or of several is a tuple of columns, from the file as from the environment."""
        several = PRODUCTS.replace('"id"\n', '["shop", "id"]\n')
        self.assertEqual(self.load(DSN + several).datasets["products"].key, ("shop", "id"))
        for text, columns in (("sku", ("sku",)), ('["shop", "sku"]', ("shop", "sku"))):
            loaded = self.load(DSN + PRODUCTS, DATASETS__PRODUCTS__KEY=text)
            self.assertEqual(loaded.datasets["products"].key, columns)

    def test_datasets_inherit_defaults(self) -> None:
        """A dataset's own key wins over [defaults], which wins over the built-in default; max_age_s follows."""
        toml = DSN + "[defaults]\ninterval_s = 20\njitter = 0\n" + PRODUCTS + "jitter = 0.5\n"
        products = self.load(toml).datasets["products"]
        self.assertEqual((products.interval_s, products.max_age_s, products.jitter), (20.0, 60.0, 0.5))

    def test_order_of_declaration(self) -> None:
        """Datasets keep the order in which the file declares them."""
        toml = DSN + "".join(PRODUCTS.replace("products", name) for name in ("b", "a", "c"))
        self.assertEqual(list(self.load(toml).datasets), ["b", "a", "c"])

    def test_longest_name(self) -> None:
        """A dataset's name may have 63 characters, the length of a PostgreSQL identifier."""
        self.assertIn("p" * 63, self.load(DSN + PRODUCTS.replace("products", "p" * 63)).datasets)

    def test_ip_addresses(self) -> None:
        """The status port accepts any IP address, or localhost."""
        for host in ("0.0.0.0", "::1", "localhost"):
            self.assertEqual(self.load(DSN + PRODUCTS, STATUS__HOST=host).status.host, host)

    def test_file_that_is_named(self) -> None:
        """CACHESERVICE_CONFIG names the file; problems call it as it was named; empty is the same as unset."""
        self.load(DSN + PRODUCTS, CONFIG="")
        Path("other.toml").write_text(DSN + PRODUCTS + "max_rows = -1", encoding="utf-8")
        self.assertEqual(
            self.problems(CONFIG="./other.toml"), ["./other.toml: datasets.products.max_rows: must be at least 0"]
        )


class Environment(Loading):
    def test_wins_over_the_file(self) -> None:
        """A variable wins over the file, and is read as the type its key wants."""
        loaded = self.load(
            DSN + "[status]\nport = 1\n" + PRODUCTS + "interval_s = 5\nrequired = true\n",
            STATUS__PORT="2",
            DATASETS__PRODUCTS__INTERVAL_S="30",
            DATASETS__PRODUCTS__REQUIRED="false",
            DEFAULTS__TIMEOUT_S="7.5",
            DATASETS__PRODUCTS__QUERY="1",
        )
        products = loaded.datasets["products"]
        self.assertEqual((loaded.status.port, products.interval_s, products.required), (2, 30.0, False))
        self.assertEqual((products.timeout_s, products.query), (7.5, "1"))

    def test_no_file_is_needed(self) -> None:
        """Without a file the environment can provide everything."""
        loaded = self.load(POSTGRES__DSN=SECRET, DATASETS__P__QUERY="SELECT 1 AS id", DATASETS__P__KEY="id")
        self.assertEqual(list(loaded.datasets), ["p"])

    def test_names_with_underscores(self) -> None:
        """A dataset's name may hold two underscores or end in one; the key is what follows the last pair."""
        for name in ("a__b", "a_", "a__"):
            toml = DSN + PRODUCTS.replace("products", name)
            loaded = self.load(toml, **{f"DATASETS__{name.upper()}__MAX_ROWS": "9"})
            self.assertEqual({name: one.max_rows for name, one in loaded.datasets.items()}, {name: 9})

    def test_not_ours(self) -> None:
        """Variables that Kubernetes sets for a service of our name, and those of others, are left alone."""
        Path(FILE).write_text(DSN + PRODUCTS, encoding="utf-8")
        names = ("CACHESERVICE_PORT", "CACHESERVICE_SERVICE_HOST", "CACHESERVICE_PORT_8000_TCP_ADDR", "MY__PORT")
        config.load(dict.fromkeys(names, "tcp://10.0.0.1:8000"), no_dsn_problem)

    def test_from_a_secret_file(self) -> None:
        """X_FILE stands for the content of its file, less one newline at the end."""
        Path("dsn").write_text(SECRET + " \n\n")
        Path("port").write_text("81\n")
        loaded = self.load(PRODUCTS, POSTGRES__DSN_FILE="dsn", STATUS__PORT_FILE="port")
        self.assertEqual((loaded.postgres.dsn.get_secret_value(), loaded.status.port), (SECRET + " \n", 81))

    def test_secret_file_unreadable(self) -> None:
        """A secret's file that cannot be read is one problem under the variable, which never shows the path."""
        Path("latin1").write_bytes(b"caf\xe9")
        for path, why in (
            (SECRET, "no such file"),
            (".", "it is a folder; name the file in it"),
            ("latin1", "byte 4 is not UTF-8"),
        ):
            self.assertEqual(
                self.problems(PRODUCTS, POSTGRES__DSN_FILE=path),
                [f"CACHESERVICE_POSTGRES__DSN_FILE: the file that it names cannot be read: {why}"],
            )

    def test_secret_file_of_a_new_dataset(self) -> None:
        """A dataset whose only variable cannot be read is declared all the same."""
        for variable, text in (("DATASETS__P__QUERY_FILE", "none.sql"), ("DATASETS__P__QUERY", "\udce9")):
            self.assertEqual(
                [problem.split(":")[0] for problem in self.problems(DSN, **{variable: text})],
                [f"CACHESERVICE_{variable}", "CACHESERVICE_DATASETS__P__KEY"],
            )

    def test_a_byte_order_mark(self) -> None:
        """A file that begins with one, as some editors write it, is read as one without."""
        Path("marked").write_bytes(b"\xef\xbb\xbfx = 1\n")
        Path("plain").write_bytes(b"x = 1\n")
        problems = self.problems(CONFIG="marked")
        self.assertEqual(problems, [each.replace("plain", "marked") for each in self.problems(CONFIG="plain")])
        self.assertIn("marked: x: ", str(problems))

    def test_not_text(self) -> None:
        """Bytes that are not UTF-8, which os.environ holds as lone surrogates, are a problem like others."""
        problems = self.problems(
            PRODUCTS, POSTGRES__DSN="\udce9", DEFAULTS__JITTER="1", **{"DATASETS__\udce9__MAX_ROWS": "1"}
        )
        self.assertEqual(problems[0], "CACHESERVICE_POSTGRES__DSN: must be text in UTF-8")
        self.assertTrue(any("a dataset's name must begin" in problem for problem in problems))

    def test_given_twice(self) -> None:
        """A variable beside its _FILE is a problem, because one of them is a mistake."""
        self.assertEqual(
            self.problems(PRODUCTS, POSTGRES__DSN=SECRET, POSTGRES__DSN_FILE="dsn"),
            ["CACHESERVICE_POSTGRES__DSN: also set as CACHESERVICE_POSTGRES__DSN_FILE; keep one of the two"],
        )

    def test_unknown(self) -> None:
        """A variable that names no key is a problem under its own name, with the nearest key."""
        inheritable = ", ".join(config.DefaultsSettings.model_fields)
        self.assertEqual(
            self.problems(
                DSN + PRODUCTS,
                STATUS__PROT="1",
                STATUS__PORT__MAX="1",
                STATSU__PORT="1",
                STATSU__HOST="1",
                DEFAULTS__QUERY="SELECT 1",
                DATASETS__PRODUCTS__INTERVL_S="1",
                DATASETS__PRODUCTS__NAME="x",
                DATASETS__PRODUCTS="1",
            ),
            [
                'CACHESERVICE_STATUS__PORT__MAX: unknown key; did you mean "port"?',
                'CACHESERVICE_STATUS__PROT: unknown key; did you mean "port"?',
                f"CACHESERVICE_DEFAULTS__QUERY: unknown key; known are {inheritable}",
                "CACHESERVICE_DATASETS__PRODUCTS: names a dataset but not a key of it; "
                "for its query, set CACHESERVICE_DATASETS__PRODUCTS__QUERY",
                'CACHESERVICE_DATASETS__PRODUCTS__INTERVL_S: unknown key; did you mean "interval_s"?',
                f"CACHESERVICE_DATASETS__PRODUCTS__NAME: unknown key; known are query, key, {inheritable}",
                'CACHESERVICE_STATSU__HOST: unknown table; did you mean "status"?',
                'CACHESERVICE_STATSU__PORT: unknown table; did you mean "status"?',
            ],
        )

    def test_bad_values(self) -> None:
        """A variable's bad value is reported under the variable, in the words that the file's would get."""
        for key, text, problem in (
            ("INTERVAL_S", "0", "must be greater than 0"),
            ("INTERVAL_S", "soon", "must be a number"),
            ("INTERVAL_S", "nan", "must be a finite number"),
            ("MAX_ROWS", "1.5", "must be a whole number"),
            ("REQUIRED", "maybe", "must be true or false"),
            ("QUERY", "", "must not be empty"),
            ("KEY", "", "must be the name of a column, or a list of such names"),
            ("KEY", '["id", 1]', "must be the name of a column, or a list of such names"),
            ("KEY", '["id"', "must be the name of a column, or a list of such names"),
        ):
            variable = f"DATASETS__PRODUCTS__{key}"
            self.assertEqual(self.problems(DSN + PRODUCTS, **{variable: text}), [f"CACHESERVICE_{variable}: {problem}"])

    def test_bad_default(self) -> None:
        """A bad default is one problem under its variable, however many datasets inherit it."""
        self.assertEqual(
            self.problems(DSN + PRODUCTS + PRODUCTS.replace("products", "prices"), DEFAULTS__JITTER="1"),
            ["CACHESERVICE_DEFAULTS__JITTER: must be less than 1"],
        )

    def test_dataset_of_the_environment_alone(self) -> None:
        """What a dataset lacks that only variables name (a slip in one, often) is reported as variables."""
        self.assertEqual(
            self.problems(DSN + PRODUCTS, DATASETS__PRODCUTS__MAX_ROWS="1"),
            [
                "CACHESERVICE_DATASETS__PRODCUTS__QUERY: required; the SQL whose result is kept",
                "CACHESERVICE_DATASETS__PRODCUTS__KEY: required; "
                'the column that names a row, or a list of columns to join with ":"',
            ],
        )


class Problems(Loading):
    def problem_of(self, toml: str) -> str:
        """The one problem of a file, less the file's name."""
        (problem,) = self.problems(toml)
        return problem.removeprefix(f"{FILE}: ")

    def test_values(self) -> None:
        """Each key refuses what it cannot be, in words that state what it can be."""
        number, whole, flag = "must be a number", "must be a whole number", "must be true or false"
        table, text = "must be a table", "must be text in quotes"
        timer = "must be at most 2000000 (23 days): the reactor's timers hold at most 24 days"
        address = 'must be an IP address or "localhost": other names would need a blocking look-up'
        columns = "must be the name of a column, or a list of such names"
        for key, value, problem in (
            ("postgres.dsn", '""', "must not be empty"),
            ("postgres.dsn", "5", text),
            ("postgres.dsn", '{password = "hunter2"}', text),
            ("postgres.max_connections", "0", "must be at least 1"),
            ("postgres.max_load", "-0.1", "must be at least 0"),
            ("postgres.connect_timeout_s", "0", "must be greater than 0"),
            ("status.host", '"db.example"', address),
            ("status.host", '""', address),
            ("status.port", "65536", "must be at most 65535"),
            ("status.port", "-1", "must be at least 0"),
            ("status.port", "80.0", whole),
            ("status.port", '"80"', whole),
            ("status.port", "true", whole),
            ("status", "5", table),
            ("admin.socket", "1", text),
            ("limits.max_connections", "0", "must be at least 1"),
            ("limits.idle_timeout_s", "0", "must be greater than 0"),
            ("log.level", '"loud"', "must be 'debug', 'info', 'warning' or 'error'"),
            ("log.format", "1", "must be 'json' or 'console'"),
            ("defaults.interval_s", "-1", "must be greater than 0"),
            ("defaults", "[]", table),
            ("datasets.products.query", '""', "must not be empty"),
            ("datasets.products.key", "[]", columns),
            ("datasets.products.key", '["id", ""]', columns),
            ("datasets.products.key", "{id = 1}", columns),
            ("datasets.products.interval_s", "0", "must be greater than 0"),
            ("datasets.products.interval_s", "2000001", timer),
            ("datasets.products.interval_s", "true", number),
            ("datasets.products.interval_s", '"60"', number),
            ("datasets.products.interval_s", "inf", "must be a finite number"),
            ("datasets.products.interval_s", "1" + "0" * 400, number),
            ("datasets.products.timeout_s", "nan", "must be a finite number"),
            ("datasets.products.max_age_s", "0", "must be greater than 0"),
            ("datasets.products.required", "1", flag),
            ("datasets.products.required", '"true"', flag),
            ("datasets.products.retry_initial_s", "0", "must be greater than 0"),
            ("datasets.products.jitter", "1", "must be less than 1"),
            ("datasets.products.jitter", "-0.1", "must be at least 0"),
            ("datasets.products.max_rows", "-1", "must be at least 0"),
            ("datasets.products.max_bytes", "0.5", whole),
            ("datasets.prices", "5", table),
            ("datasets", "5", table),
        ):
            document: dict[str, Any] = {
                "postgres": {"dsn": f'"{SECRET}"'},
                "datasets": {"products": {"query": '"SELECT 1"', "key": '"id"'}},
            }
            *tables, last = key.split(".")
            inner = document
            for name in tables:
                inner = inner.setdefault(name, {})
            inner[last] = value
            self.assertEqual(self.problem_of(as_toml(document)), f"{key}: {problem}")

    def test_retry_bounds(self) -> None:
        """retry_initial_s is never above retry_max_s, and the problem names the bound that was set."""
        low = "retry_max_s: must be at least retry_initial_s, which is"
        self.assertEqual(self.problem_of(DSN + PRODUCTS + "retry_max_s = 0.5"), f"datasets.products.{low} 1")
        self.assertEqual(self.problem_of(DSN + PRODUCTS + "retry_initial_s = 61"), f"datasets.products.{low} 61")
        inherited = DSN + "[defaults]\nretry_max_s = 0.5\n" + PRODUCTS + PRODUCTS.replace("products", "prices")
        self.assertEqual(self.problem_of(inherited), f"defaults.{low} 1, in datasets.products")
        self.load(DSN + "[defaults]\nretry_initial_s = 100\n" + PRODUCTS + "retry_max_s = 100")

    def test_max_age_waits_for_interval(self) -> None:
        """A refused interval_s is the only problem: the max_age_s that would follow from it is not one."""
        self.assertEqual(
            self.problem_of(DSN + PRODUCTS + "interval_s = -1"), "datasets.products.interval_s: must be greater than 0"
        )

    def test_a_dataset_called_watch(self) -> None:
        """A dataset may have the name of a key, and its problems are reported as those of any other."""
        self.assertEqual(
            self.problem_of(DSN + '[datasets.watch]\nkey = "id"\n'),
            "datasets.watch.query: required; the SQL whose result is kept",
        )

    def test_a_glance_needs_no_whole_configuration(self) -> None:
        """Addresses and names can be read without a DSN, from the file and from the environment; what is refused or
        cannot be read is the default."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "c.toml"
            environ = {"CACHESERVICE_CONFIG": str(file), "CACHESERVICE_RESP__PASSWORD": "hidden-word"}
            file.write_text('[status]\nport = 8100\n[resp]\nport = "x"\n[datasets.a]\n[datasets.b]\nquery = 1\n')
            seen = config.glance(environ | {"CACHESERVICE_STATUS__HOST": "::1"})
            self.assertEqual((seen.status.host, seen.status.port, seen.datasets), ("::1", 8100, ("a", "b")))
            self.assertEqual((seen.resp.port, seen.resp.host), (6380, "127.0.0.1"))
            for text in ("[[[", "status = 1\ndatasets = 2", ""):
                file.write_text(text)
                seen = config.glance(environ)
                self.assertEqual((seen.status.port, seen.datasets), (8000, ()))
            self.assertEqual(seen.resp.password.get_secret_value(), "hidden-word")
            self.assertNotIn("hidden-word", repr(seen))
            file.unlink()
            self.assertEqual(config.glance(environ).status.port, 8000)

    def test_a_glance_knows_what_it_could_not_read(self) -> None:
        """A default stands in for an unknown value, and its problem is available; an environment value is known."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "c.toml"
            environ = {"CACHESERVICE_CONFIG": str(file)}
            seen = config.glance(environ)
            self.assertEqual(seen.problem("status", "port"), f"{file}: cannot be read: no such file")
            seen = config.glance(environ | {"CACHESERVICE_STATUS__PORT": "8100"})
            self.assertEqual((seen.status.port, seen.problem("status", "port")), (8100, None))
            self.assertIn("no such file", str(seen.problem("status", "host")))
            file.write_text('[status]\nport = "8100"\nhost = "::1"\n[admin]\nsoket = "a"\n[resp]\nport = 7\n')
            seen = config.glance(environ | {"CACHESERVICE_RESP__PASSWORD_FILE": f"{folder}/none"})
            self.assertEqual((seen.status.host, seen.problem("status", "host"), seen.status.port), ("::1", None, 8000))
            self.assertEqual(seen.problem("status", "port"), f"{file}: status.port: must be a whole number")
            self.assertEqual(
                seen.problem("admin", "socket"), f'{file}: admin.soket: unknown key; did you mean "socket"?'
            )
            self.assertEqual((seen.resp.port, seen.problem("resp", "port")), (7, None))
            self.assertEqual(
                seen.problem("resp", "password"),
                "CACHESERVICE_RESP__PASSWORD_FILE: the file that it names cannot be read: no such file",
            )
            file.write_text("status = 1\n[[admin]]\n")
            seen = config.glance(environ)
            self.assertEqual(seen.problem("status", "port"), f"{file}: status: must be a table")
            self.assertEqual(seen.problem("admin", "socket"), f"{file}: admin: must be a table")
            self.assertIsNone(seen.problem("resp", "port"))

    def test_unknown(self) -> None:
        """A key or table that the contract does not know, or that does not work yet, is a problem."""
        self.assertEqual(
            self.problem_of(DSN + PRODUCTS + "intervall_s = 1"),
            'datasets.products.intervall_s: unknown key; did you mean "interval_s"?',
        )
        self.assertEqual(
            self.problem_of(DSN + "sslmode = 1\n" + PRODUCTS),
            "postgres.sslmode: unknown key; known are dsn, connect_timeout_s, max_connections, max_load, "
            "capture, publication, search_path, settings",
        )
        known = ", ".join(config.Settings.model_fields)
        self.assertEqual(self.problem_of(DSN + PRODUCTS + "[fleets]\n"), f"fleets: unknown table; known are {known}")
        self.assertEqual(self.problem_of("logs = 1\n" + DSN + PRODUCTS), 'logs: unknown key; did you mean "log"?')
        self.assertIn("name: unknown key;", self.problem_of(DSN + PRODUCTS + 'name = "x"'))
        self.assertIn('."[key]": unknown key; did you mean "key"?', self.problem_of(DSN + PRODUCTS + '"[key]" = 1'))
        self.assertIn("watches: unknown key;", self.problem_of(DSN + PRODUCTS + "watches = []"))

    def test_open_to_all(self) -> None:
        """Rows are not served to other machines over the Redis protocol without a password, unless that is allowed."""
        every = DSN + PRODUCTS + '[resp]\nhost = "0.0.0.0"\n'
        self.assertEqual(
            self.problem_of(every),
            "resp.host: other machines could read without a password; set resp.password, or a loopback address",
        )
        for more in ('password = "secret"\n', "enabled = false\n", "[limits]\nallow_anonymous = true\n"):
            self.load(every + more)
        self.load(every, RESP__PASSWORD="secret")
        self.load(DSN + PRODUCTS + '[resp]\nhost = "::1"\n')

    def test_no_query_in_defaults(self) -> None:
        """[defaults] holds neither query nor key; an unknown key in it is reported once and passed to no dataset."""
        defaults = '[defaults]\nquery = "x"\nkey = "id"\nintervals = 1\n'
        self.assertEqual(
            [problem.split("; ")[0] for problem in self.problems(DSN + defaults + "[datasets.products]\n")],
            [f"{FILE}: defaults.{key}: unknown key" for key in ("query", "key", "intervals")]
            + [f"{FILE}: datasets.products.{key}: required" for key in ("query", "key")],
        )

    def test_names_of_datasets(self) -> None:
        """A dataset's name is [a-z][a-z0-9_]{0,62}; another one is reported on one line, as TOML writes it."""
        rule = "a dataset's name must begin with a letter and have at most 63 lower-case letters, digits and _"
        for header in ("Products", "9x", "a-b", '"a b"', '"a\\nb"', "p" * 64, "_x"):
            toml = DSN + PRODUCTS.replace("products", header)
            self.assertEqual(self.problem_of(toml), f"datasets.{header}: {rule}")

    def test_required(self) -> None:
        """An empty file lacks a DSN and a dataset, and both problems explain what is needed."""
        dsn = f"{FILE}: postgres.dsn: required; the database to read, as a libpq URI or key=value string"
        none = f"{FILE}: datasets: none declared; add a [datasets.NAME] table with query and key"
        self.assertEqual(self.problems(""), [dsn, none])
        Path(FILE).unlink()
        absent = f"{FILE}: not found in the working directory; create it, or name another file in CACHESERVICE_CONFIG"
        self.assertEqual(self.problems(), [absent])
        self.assertEqual(self.problems(POSTGRES__DSN=SECRET, RESP__HOST="::"), [absent])
        found = self.problems(STATUS__PORT="-1")
        self.assertEqual(found, [absent, "CACHESERVICE_STATUS__PORT: must be at least 0"])
        # A service without a file is declared in the environment, and has all of its problems reported.
        found = self.problems(DATASETS__A__QUERY="SELECT 1 AS id", DATASETS__A__KEY="id")
        self.assertEqual(found, [absent, dsn])

    def test_all_at_once_in_order(self) -> None:
        """Every problem is reported, in the order of the documented tables, not the file's; datasets as declared."""
        toml = "nonsense = 1\n[log]\nlevel = 1\n[datasets.b]\nmax_rows = -1\njitter = 2\n[datasets.a]\nkey = 1\n"
        problems = self.problems(toml + '[status]\nport = -1\n[postgres]\ndsn = ""\n', LIMITS__MAX_CONNECTIONS="0")
        self.assertEqual(
            [problem.split(": ")[-2] for problem in problems],
            [
                "postgres.dsn",
                "status.port",
                "CACHESERVICE_LIMITS__MAX_CONNECTIONS",
                "log.level",
                "datasets.b.query",
                "datasets.b.key",
                "datasets.b.jitter",
                "datasets.b.max_rows",
                "datasets.a.query",
                "datasets.a.key",
                "nonsense",
            ],
        )

    def test_dsn_problem(self) -> None:
        """The driver's error for a DSN is reported with the other problems, under the name of the DSN's source."""
        Path(FILE).write_text(DSN + PRODUCTS + "max_rows = -1", encoding="utf-8")
        asked: list[str] = []

        def dsn_problem(dsn: str) -> str:
            asked.append(dsn)
            return "must be a URI"

        for environ, where in (
            ({}, f"{FILE}: postgres.dsn"),
            ({"CACHESERVICE_POSTGRES__DSN": SECRET}, "CACHESERVICE_POSTGRES__DSN"),
        ):
            with self.assertRaises(ConfigError) as caught:
                config.load(environ, dsn_problem)
            self.assertEqual(
                caught.exception.problems,
                (f"{where}: must be a URI", f"{FILE}: datasets.products.max_rows: must be at least 0"),
            )
        self.assertEqual(asked, [SECRET, SECRET])

        Path(FILE).write_text(DSN + PRODUCTS, encoding="utf-8")
        with self.assertRaises(ConfigError):  # also when it is the only one
            config.load({}, dsn_problem)

    def test_secrets_do_not_ride_on_the_exception(self) -> None:
        """A ConfigError has no cause or context, so no traceback of it can print what was refused."""
        with self.assertRaises(ConfigError) as caught:
            self.load(DSN + "[log]\nlevel = 1")
        self.assertIsNone(caught.exception.__context__)
        self.assertIsNone(caught.exception.__cause__)
        with self.assertRaises(ValidationError) as refused:
            config.PostgresSettings(dsn=[SECRET])  # nor can what the models raise by themselves
        self.assertNotIn("hunter2", str(refused.exception))


class UnreadableFile(Loading):
    def test_syntax(self) -> None:
        """A syntax error is reported with its line and column, and how to fix it; a value is not shown."""
        end = "the end of the file"
        quote = "the quote that opens there is not closed on its line"
        quotes = "the three quotes that open there are not closed"
        for text, place, fix in (
            ("[log]\n\nlevel info", "line 3, column 7: expected '=' after a key in", "write it as key"),
            ('[postgres]\ndsn = "secret\n\n[log]', f"line 2, column 7: {quote}", "close it, or use three"),
            ("# it's\n'a' = \"it's\"\nx = 'secret\ny = 'z'", f"line 3, column 5: {quote}", "close it, or use three"),
            ("x = 'secret\nb = 1", f"line 1, column 5: {quote}", "close it, or use three"),
            ("\nx = 'secret", f"line 2, column 5: {quote}", "close it, or use three"),
            ('x = """secret\nb', f"line 1, column 5: {quotes}", "with the same three"),
            ("x = '''a''''\ny = '''secret\n'", f"line 2, column 5: {quotes}", "with the same three"),
            ("x = 'a\x01'", "line 1, column 7: found invalid character", "remove the character"),
            ("interval_s = 010", "line 1, column 15: a number begins with 0", "remove the leading zero"),
            ("x = [1, -007]", "line 1, column 11: a number begins with 0", "remove the leading zero"),
            ("x = [{a = 1,\n b = 2}]", "line 1, column 13: a table in braces ends on the line", "write it on one line"),
            ("x = {\n b = 2}", "line 1, column 6: a table in braces ends on the line", "write it on one line"),
            ("[datasets.a]\n[datasets.a]", "line 2, column 12: [datasets.a] is declared twice", "this table once"),
            ("a = 1\na = 2\n", "line 2, column 6: cannot overwrite a value", "remove one of the two"),
            ("x = [1,", f"line 1, {end}: invalid value", "write text in quotes"),
            ("x = {a=1", f"line 1, {end}: unclosed inline table", "close the table with }"),
            ("x = products", "line 1, column 5: invalid value", "write text in quotes"),
            ("[a\nb=1", "line 1, column 3: expected ']'", "close the table's name with ]"),
            ('x = "a\\q"', "line 1, column 9: unescaped", "use single quotes"),
            ("a = 1 b = 2", "line 1, column 7: expected newline", "one key on a line"),
            ("é = 1", "line 1, column 1: invalid statement", "other names need quotes"),
            ("[[w]]\n[w]", "line 2, column 3: [w] is declared twice", "another name"),
            ("x = {a = 1}\n[x.b]", "line 2, column 5: ", "; "),
        ):
            (problem,) = self.problems(text)
            self.assertTrue(problem.startswith(f"{FILE}: {place}"), problem)
            self.assertIn(fix, problem)
            self.assertNotIn("secret", problem)

    def test_not_text(self) -> None:
        """A file that is not UTF-8, a directory, and a number without end are problems like others."""
        Path("latin1").write_bytes(b"x = '\xe9'")
        self.assertEqual(self.problems(CONFIG="latin1"), ["latin1: cannot be read: byte 6 is not UTF-8"])
        self.assertEqual(self.problems(CONFIG="."), [".: cannot be read: it is a folder; name the file in it"])
        too_long = f"{FILE}: cannot be read: a number in it is too long, or its nesting too deep"
        self.assertEqual(self.problems("x = " + "1" * 5000), [too_long])
        self.assertEqual(self.problems("x = " + "[" * 5000), [too_long])

    def test_missing(self) -> None:
        """A file that CACHESERVICE_CONFIG names has to be there, even if the environment has everything."""
        everything = {"POSTGRES__DSN": SECRET, "DATASETS__P__QUERY": "SELECT 1 AS id", "DATASETS__P__KEY": "id"}
        self.assertEqual(
            self.problems(CONFIG="etc/none.toml", **everything), ["etc/none.toml: cannot be read: no such file"]
        )

    def test_no_guesses(self) -> None:
        """Beside a file that cannot be read only problems of the environment are reported, not what seems missing."""
        self.assertEqual(
            self.problems("[]", STATUS__PORT="x", DATASETS__PRODUCTS__MAX_ROWS="1"),
            [
                f"{FILE}: line 1, column 2: invalid initial character for a key part; a bare name consists of letters, "
                "digits, _ and -; other names need quotes",
                "CACHESERVICE_STATUS__PORT: must be a whole number",
            ],
        )


class Reference(SynchronousTestCase):
    def test_every_key_is_described(self) -> None:
        """The reference lists each key once, with its default as TOML and a description."""
        rows = {path: (default, description) for path, default, description in config.reference()}
        self.assertEqual(len(rows), len(config.reference()))
        self.assertTrue(all(description for _default, description in rows.values()))
        self.assertEqual(list(rows)[2:5], ["postgres.max_connections", "postgres.max_load", "postgres.capture"])
        self.assertEqual(rows["datasets.NAME.query"], ("required", "the SQL whose result is kept"))
        self.assertEqual(rows["status.host"][0], '"127.0.0.1"')
        self.assertEqual(rows["datasets.NAME.required"][0], "true")
        self.assertIn("3 x interval_s unless set", rows["datasets.NAME.max_age_s"][1])
        self.assertNotIn("datasets.NAME.name", rows)
        self.assertEqual([path for path in rows if path.startswith("defaults.")], [])


def as_toml(document: dict[str, Any]) -> str:
    """`document` as TOML on one line a top-level key; leaves are TOML already."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{quoted(key)} = {inline(one)}" for key, one in value.items()) + "}"
        return value

    return "".join(f"{quoted(key)} = {inline(value)}\n" for key, value in document.items())


def quoted(name: str) -> str:
    escaped = "".join(f"\\U{ord(char):08x}" if char in '"\\' or not char.isprintable() else char for char in name)
    return f'"{escaped}"'


characters = st.characters(codec="utf-8")
scalars = st.one_of(
    st.sampled_from(["true", "false", "inf", "-inf", "nan", "1979-05-27", "07:32:00", "[]", "{}", '""', "[[1]]"]),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda number: format(number, ".17e")),
    st.text(characters, max_size=20).map(quoted),
)
known = [path.split(".") for path, _default, _description in config.reference()]
names = st.one_of(
    st.sampled_from(sorted({name for path in known for name in path} | {"defaults", "name", "[key]"})),
    st.text(characters, max_size=8),
)
documents = st.dictionaries(
    names, st.recursive(scalars, lambda inner: st.dictionaries(names, inner, max_size=6), max_leaves=30), max_size=8
)


@st.composite
def sound_but_for_some(draw: st.DrawFn) -> dict[str, Any]:
    """A document that would load, with a few of its keys set to anything."""
    document: dict[str, Any] = {"postgres": {"dsn": '"x"'}, "datasets": {"NAME": {"query": '"x"', "key": '"id"'}}}
    for *tables, key in draw(st.lists(st.sampled_from(known), max_size=4)):
        inner = document
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[key] = draw(scalars)
    document["datasets"] = {"name": document["datasets"]["NAME"]}
    return document


variables = st.dictionaries(
    st.one_of(
        st.sampled_from(known).map("__".join).map(str.upper),
        st.text("A__" + string.ascii_uppercase + "_", max_size=12),
        st.text("A_", max_size=6).map(lambda tail: "DATASETS__" + tail),
    ).map("CACHESERVICE_".__add__),
    st.one_of(st.text(characters.filter(lambda char: char != "\0"), max_size=12), scalars),
    max_size=5,
)


class AnyInput(Loading):
    @settings(max_examples=300, deadline=None)
    @given(documents | sound_but_for_some(), variables)
    def test_loads_or_raises_config_error(self, document: dict[str, Any], environ: dict[str, str]) -> None:
        """Whatever the file and the environment hold, it loads or is a ConfigError of lines that stand alone; a glance
        at it raises nothing."""
        environ.pop("CACHESERVICE_CONFIG", None)
        Path(FILE).write_text(as_toml(document), encoding="utf-8")
        config.glance(environ)
        try:
            loaded = config.load(environ, no_dsn_problem)
        except ConfigError as error:
            self.assertTrue(error.problems)
            self.assertEqual(len(set(error.problems)), len(error.problems))
            for problem in error.problems:
                self.assertEqual(len(problem.splitlines()), 1, problem)
                self.assertFalse(problem.startswith(f"{FILE}: line"), problem)  # `as_toml` writes TOML
        else:
            self.assertTrue(loaded.datasets)
