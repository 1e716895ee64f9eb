"""Laws of what the process owes to its parent: signals, the log file, and the commands of service managers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path

from tests.kit import pgbouncer
from tests.kit.daemon import PRODUCTS, QUICK, DaemonTestCase
from tests.kit.paths import ROOT
from tests.kit.pgbouncer import running_pgbouncer
from tests.kit.ports import free_port
from tests.kit.postgres import query
from tests.kit.waiting import GIVE_UP_S, wait_until

TO_A_FILE = ("sh", "-c", 'exec "$0" "$@" --logfile=service.log')


class Process(DaemonTestCase):
    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        return subprocess.run(
            [sys.executable, "-m", "cacheservice", *arguments],
            check=False,
            cwd=self.directory,
            env={**inherited, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=GIVE_UP_S,
        )

    def until_logged(self, path: Path, event: str) -> None:
        wait_until(lambda: path.exists() and f'"{event}"' in path.read_text(), event)

    def test_signals_of_users(self) -> None:
        """SIGUSR1 and SIGUSR2 do not end it; a line explains why nothing happens."""
        daemon = self.started()
        daemon.wait_until_ready()
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            daemon.process.send_signal(number)
            wait_until(lambda number=number: [x for x in daemon.lines if x.get("signal") == number.name], "the signal")  # type: ignore[misc]
        self.assertEqual(daemon.ask("ruok"), "imok")

    def test_a_log_file(self) -> None:
        """twistd's --logfile gets the log; SIGUSR1 begins it again after a rotation, and no line is lost."""
        daemon = self.started(self.configuration(port=free_port()), before=TO_A_FILE)
        log, old = self.directory / "service.log", self.directory / "service.log.1"
        self.until_logged(log, "service_started")
        log.rename(old)
        daemon.process.send_signal(signal.SIGUSR1)
        self.until_logged(log, "log_reopened")
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.wait(GIVE_UP_S)
        self.assertIn("service_stopped", log.read_text())
        self.assertEqual((daemon.output, log.stat().st_mode & 0o777), ("", 0o640 & ~_umask()))

    def test_a_log_file_that_cannot_be_written(self) -> None:
        """It does not start, and reports why in one line."""
        nowhere = ("sh", "-c", 'exec "$0" "$@" --logfile=missing/service.log')
        daemon = self.started(before=nowhere)
        self.assertEqual(daemon.process.wait(GIVE_UP_S), 1)
        self.assertRegex(daemon.errors, r"^cacheservice: --logfile: .*missing/service.log: no such file or dir.*\n$")

    def test_health(self) -> None:
        """It queries the configured address, all addresses included, and distinguishes alive from ready and dead."""
        port = free_port()
        text = self.configuration(dsn="postgresql://nobody@127.0.0.1:1/x", port=port)
        daemon = self.started(text.replace("[status]\n", '[status]\nhost = "::"\n'))
        daemon.event("service_started")
        alive, ready = self.command("health"), self.command("health", "--ready")
        self.assertEqual((alive.returncode, alive.stdout), (0, "imok\n"))
        self.assertEqual(ready.returncode, 1)
        self.assertRegex(ready.stderr, r"answered ready with 'notready products:never_loaded'\n$")
        daemon.end()
        dead = self.command("health")
        self.assertEqual(dead.returncode, 1)
        self.assertIn("connection refused", dead.stderr)

    def test_health_with_a_broken_file(self) -> None:
        """A broken file does not make the service that runs unhealthy; no answer names the file."""
        port = free_port()
        daemon = self.started(self.configuration(port=port))
        daemon.event("service_started")
        (self.directory / "cacheservice.toml").write_text("[[[")
        alive = self.command("health", "--port", str(port))
        self.assertEqual((alive.returncode, alive.stdout, alive.stderr), (0, "imok\n", ""))
        elsewhere = self.command("health", "--host", "127.0.0.99")
        self.assertEqual(elsewhere.returncode, 1)
        self.assertRegex(
            elsewhere.stderr,
            r"^cacheservice: no answer from 127\.0\.0\.99:8000: .*; the service may listen elsewhere, "
            r"see --host and --port: "
            r"cacheservice\.toml: line 1, column 3: .*\n$",
        )

    def test_all_addresses(self) -> None:
        """ "::" is IPv6 and IPv4 alike, on each port."""
        text = self.configuration().replace("port = 0\n", 'port = 0\nhost = "::"\n')
        daemon = self.started(text.replace("[resp]\n", '[resp]\npassword = "x"\n'))
        started = daemon.event("service_started")
        for name in ("status", "resp", "http"):
            self.assertIn(started[name].rpartition(":")[0], ("[::]", "0.0.0.0"))
            port = int(started[name].rpartition(":")[2])
            for host in ("127.0.0.1", "::1") if started[name].startswith("[") else ("127.0.0.1",):
                socket.create_connection((host, port), timeout=GIVE_UP_S).close()

    def test_reload(self) -> None:
        """It waits for the result: 0 with what was read, 1 with every problem and a service that goes on."""
        admin = f'[admin]\nsocket = "{self.directory}/admin"\n'
        good = self.configuration(PRODUCTS, admin)
        daemon = self.started(good)
        daemon.wait_until_ready()
        told = self.command("reload")
        self.assertEqual((told.returncode, told.stderr), (0, ""))
        path = self.directory / "cacheservice.toml"
        self.assertRegex(
            told.stdout, f"^OK reloaded: 0 added, 0 changed, 0 removed, 1 unchanged; from {path}, modified 20"
        )
        self.assertIn(", configuration of 20", daemon.ask("status"))
        path.write_text(good + "[limits]\nmax_connections = 0\nnonsense = 1\n")
        told = self.command("reload")
        self.assertEqual((told.returncode, told.stdout), (1, ""))
        self.assertIn("limits.max_connections: must be at least 1", told.stderr)
        self.assertIn("limits.nonsense: unknown key", told.stderr)
        self.assertEqual(daemon.ask("ready"), "ready")
        daemon.end()
        path.write_text(good)
        told = self.command("reload")
        self.assertEqual(told.returncode, 1)
        self.assertRegex(told.stderr, r"no answer from .*/admin: .*; is the service running")
        path.write_text(self.configuration(PRODUCTS))
        told = self.command("reload")
        self.assertEqual(told.returncode, 1)
        self.assertIn("set admin.socket, or send SIGHUP", told.stderr)

    def test_reload_with_a_broken_file(self) -> None:
        """Nothing is sent, and the file is named; with --socket the service itself rejects the file."""
        socket_path = self.directory / "admin"
        good = self.configuration(PRODUCTS, f'[admin]\nsocket = "{socket_path}"\n')
        daemon = self.started(good)
        daemon.wait_until_ready()
        path = self.directory / "cacheservice.toml"
        path.write_text(good + "interval_s = = 1\n")
        line = good.count("\n") + 1
        told = self.command("reload")
        self.assertEqual((told.returncode, told.stdout), (2, ""))
        self.assertRegex(
            told.stderr,
            rf"^cacheservice\.toml: line {line}, column 14: .*; nothing was sent: fix the configuration, or name the "
            r"admin socket with --socket\n$",
        )
        told = self.command("reload", "--socket", str(socket_path))
        self.assertEqual((told.returncode, told.stdout), (1, ""))
        self.assertIn(f"cacheservice.toml: line {line}, column 14", told.stderr)
        path.write_text(good.replace(f'"{socket_path}"', "7"))
        told = self.command("reload")
        self.assertEqual(told.returncode, 2)
        self.assertIn("cacheservice.toml: admin.socket: must be text in quotes; nothing was sent", told.stderr)
        path.unlink()
        told = self.command("reload")
        self.assertEqual(told.returncode, 2)
        self.assertRegex(told.stderr, "^cacheservice.toml: not found in the working directory; nothing was sent: ")
        self.assertEqual(daemon.ask("ready"), "ready")


class RotatedSecret(DaemonTestCase):
    def test_it_is_read_again(self) -> None:
        """After a refused login the file of the DSN is read again, without a reload, and used if it has changed."""
        role = f"rotated_{self.database}"
        query(self.server, self.database, f"CREATE ROLE {role} LOGIN PASSWORD 'first'")
        self.addCleanup(query, self.server, self.database, f"DROP ROLE {role}")
        secret = self.directory / "dsn"
        secret.write_text(self.server.dsn(role, "first", self.database) + "\n")
        without = self.configuration(QUICK).partition("[status]")[2]
        daemon = self.started(f"[status]{without}", environ={"CACHESERVICE_POSTGRES__DSN_FILE": str(secret)})
        daemon.wait_until_ready()
        query(self.server, self.database, f"ALTER ROLE {role} PASSWORD 'second'")
        query(
            self.server, self.database,
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'",
        )  # fmt: skip
        daemon.event("refresh_failed")
        wait_until(lambda: daemon.json()["postgres"]["state"] == "down", "the refusal")
        self.assertNotIn("dsn_read_again", [line["event"] for line in daemon.lines])
        secret.write_text(self.server.dsn(role, "second", self.database) + "\n")
        daemon.event("dsn_read_again")
        wait_until(lambda: daemon.json()["postgres"]["state"] == "up", "the new password")
        wait_until(lambda: daemon.json()["datasets"]["products"]["consecutive_failures"] == 0, "a refresh")
        for password in ("first", "second"):
            self.assertNotIn(f":{password}@", daemon.output)

    def test_behind_pgbouncer(self) -> None:
        """PgBouncer refuses a password with an SQLSTATE of its own, and the file is read again, too."""
        assert pgbouncer.PROGRAM, pgbouncer.NEEDED
        with running_pgbouncer(self.server) as dsn:
            right = dsn(database=self.database)
            parts = urllib.parse.urlsplit(right)
            secret = self.directory / "dsn"
            secret.write_text(right.replace(f":{parts.password}@", ":wrong@"))
            without = self.configuration(QUICK).partition("[status]")[2]
            daemon = self.started(f"[status]{without}", environ={"CACHESERVICE_POSTGRES__DSN_FILE": str(secret)})
            self.assertIn("authentication failed", daemon.event("refresh_failed")["error"])
            secret.write_text(right)
            daemon.event("dsn_read_again")
            daemon.wait_until_ready()
            daemon.end()

    def test_a_password_file(self) -> None:
        """The file that `passfile` or PGPASSFILE names is read at each login."""
        role = f"rotated_{self.database}"
        query(self.server, self.database, f"CREATE ROLE {role} LOGIN PASSWORD 'second'")
        self.addCleanup(query, self.server, self.database, f"DROP ROLE {role}")
        passwords = self.directory / "passwords"
        passwords.write_text(f"127.0.0.1:{self.server.port}:*:{role}:first\n")
        passwords.chmod(0o600)
        dsn = f"{self.server.dsn(role, database=self.database)}?passfile={passwords}"
        daemon = self.started(self.configuration(QUICK, dsn=dsn))
        self.assertIn("password authentication failed", daemon.event("refresh_failed")["error"])
        passwords.write_text(f"127.0.0.1:{self.server.port}:*:{role}:second\n")
        daemon.wait_until_ready()
        daemon.end()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
