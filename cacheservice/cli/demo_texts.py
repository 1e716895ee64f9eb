"""The texts of the demo: the configuration of its service, and commands for users to try."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple

REVIVE_AFTER_S = 10.0
"""How long a process that another one ended stays down, so that users can watch the effect."""
WORKERS = 2
"""Of each service of a fleet."""
USUAL_VALKEY_PORT = 6390


class Ports(NamedTuple):
    """The ports of the service."""

    status: int
    resp: int
    http: int


USUAL_PORTS = Ports(8000, 6380, 8080)


class Place(NamedTuple):
    """The folder of a demo.

    :param is_kept: whether it remains at the end.
    """

    directory: Path
    is_kept: bool

    @property
    def configuration(self) -> Path:
        return self.directory / "cacheservice.toml"

    @property
    def admin_socket(self) -> Path:
        return self.directory / "admin.sock"

    @property
    def log(self) -> Path:
        return self.directory / "service.log"


_CONFIGURATION = """\
# Made by `cacheservice demo`. The database is named by CACHESERVICE_POSTGRES__DSN, which holds a password.
[postgres]
capture = "logical"

[status]
port = {status_port}

[resp]
port = {resp_port}

[http]
port = {http_port}
admin_token = "demo"

[admin]
socket = "{admin_socket}"

[log]
format = "console"

[defaults]
timeout_s = 5

[datasets.products]
query = "SELECT id, sku, name, category, stock FROM shop.products"
key = "id"
interval_s = 5
watch = [{{table = "shop.products", key = "id"}}]

[datasets.prices]
query = "SELECT product_id, currency, amount FROM shop.prices"
key = ["product_id", "currency"]
interval_s = 10
watch = [{{table = "shop.prices", key = ["product_id", "currency"]}}]

[datasets.feature_flags]
query = "SELECT name, enabled, rollout_percent FROM shop.feature_flags"
key = "name"
interval_s = 5
notify = "feature_flags"

[datasets.permissions]
query = '''
SELECT c.id AS customer_id, c.name, array_agg(p.permission ORDER BY p.permission) AS permissions
FROM shop.customers AS c JOIN shop.permissions AS p ON p.customer_id = c.id
GROUP BY c.id
'''
key = "customer_id"
interval_s = 15
required = false
watch = [{{table = "shop.customers", key = "id"}}, {{table = "shop.permissions", key = "customer_id"}}]
"""

_OF_FLEET = """
[workers]
processes = {workers}

[cluster]
enabled = true
prefix = "demo"
name = "{name}"
fallback_after_s = 20
"""

_TO_TRY = """
The service is running. In another terminal:

  Look:     http://127.0.0.1:{http_port}/      in a browser (operator's token: demo)
            {program} status{port}      (live: add --watch)
            {program} tail{tail_ports}
            {program} why products{port}
            echo status | nc -N 127.0.0.1 {status_port}
  Check:    CACHESERVICE_CONFIG={configuration} CACHESERVICE_POSTGRES__DSN={owner} {program} check --db
  Read:     redis-cli -p {resp_port} GET products:42
            redis-cli -p {resp_port} HGETALL feature_flags
            curl -i http://127.0.0.1:{http_port}/v1/datasets/prices/rows/42:EUR
  Change:   {psql} -c "UPDATE shop.prices SET amount = 1.23 WHERE product_id = 42"
            redis-cli -p {resp_port} GET prices:42:EUR      (the new price is there at once)
  Lock it:  {psql} -c "BEGIN; LOCK TABLE shop.products; SELECT pg_sleep(20)"
            {program} why products{port}        (after 5 s: the session that holds the lock)
  Freeze:   kill -STOP {postgres_pid} $(pgrep -P {postgres_pid})     ages rise, nothing else changes
            kill -CONT {postgres_pid} $(pgrep -P {postgres_pid})     the service recovers
  Crash:    kill -QUIT {postgres_pid}       the demo restarts the database after {revive_after_s:.0f} s
  Refresh:  echo "refresh all" | nc -NU {admin_socket}
  Log:      tail -f {log}

Ctrl-C stops everything.{kept}
"""


_TO_TRY_IN_FLEET = """
The fleet is running: one service reads the database, and all serve the same generations.

{table}

In another terminal:

  Look:     http://127.0.0.1:{http_port}/      in a browser (operator's token: demo); each service has its own
            {program} status --port {other_status_port}
  Read:     for port in {resp_ports}; do redis-cli -p $port GET products:42; done
            for port in {http_ports}; do curl -si http://127.0.0.1:$port/v1/datasets/products/rows/42; done
            (the same X-Cache-Generation at each port)
  Change:   {psql} -c "UPDATE shop.prices SET amount = 1.23 WHERE product_id = 42"
            for port in {resp_ports}; do redis-cli -p $port GET prices:42:EUR; done
  Leaders:  for port in {status_ports}; do {program} why products --port $port; done
  Crash:    kill -9 {leader_pid}       {leader}, which leads at the start: within seconds another service leads, and
            the others serve meanwhile; the demo restarts it after {revive_after_s:.0f} s
            kill -9 $(pgrep -P {leader_pid} | head -1)       one worker: it is restarted
  Freeze:   kill -STOP {leader_pid}       the same, but its lead ends only after 4 s without a heartbeat
            kill -CONT {leader_pid}       it follows the new leader
  Valkey:   kill -9 {valkey_pid}       readers notice nothing; the leader continues, the others age until it is back
            kill -STOP {valkey_pid}       after 20 s each service refreshes for itself, less often
            kill -CONT {valkey_pid}       they follow their leader again
            REDISCLI_AUTH=$(cat {password}) redis-cli -p {valkey_port} FLUSHALL
  Database: kill -QUIT {postgres_pid}       ages rise until the demo restarts it, after {revive_after_s:.0f} s

Ctrl-C stops everything.{kept}
"""


class Member(NamedTuple):
    """One service of a fleet.

    :param pid: the process ID of its main process.
    """

    place: Place
    ports: Ports
    pid: int | None


class Parts(NamedTuple):
    """The servers of a fleet.

    :param psql: the command that connects to the database as its owner.
    """

    psql: Sequence[str]
    postgres_pid: int | None
    valkey_port: int
    valkey_pid: int | None
    valkey_password: Path


def configuration(place: Place, ports: Ports) -> str:
    """Return the content of the configuration file."""
    return _CONFIGURATION.format(
        status_port=ports.status, resp_port=ports.resp, http_port=ports.http, admin_socket=place.admin_socket
    )


def configuration_of_fleet(place: Place, ports: Ports) -> str:
    """Return the content of the configuration file of a service of a fleet; its name is that of its folder."""
    return configuration(place, ports) + _OF_FLEET.format(workers=WORKERS, name=place.directory.name)


def what_to_try_in_fleet(place: Place, members: Sequence[Member], parts: Parts) -> str:
    """Return the ports of each service, and the commands to try.

    :param place: the folder of the demo.
    :param members: the first one leads.
    """
    rows = [
        ("service", "process", "status", "RESP", "HTTP"),
        *((each.place.directory.name, each.pid, *each.ports) for each in members),
        ("Valkey", parts.valkey_pid, "", parts.valkey_port, ""),
    ]
    lines = [
        f"  {name:<12}{process:<10}{status:<9}{resp:<8}{http}".rstrip() for name, process, status, resp, http in rows
    ]
    leader, other, *_ = members
    return _TO_TRY_IN_FLEET.format(
        table="\n".join(lines),
        program=_program(),
        http_port=leader.ports.http,
        other_status_port=other.ports.status,
        resp_ports=" ".join(str(each.ports.resp) for each in members),
        http_ports=" ".join(str(each.ports.http) for each in members),
        psql=" ".join(map(quoted, parts.psql)),
        status_ports=" ".join(str(each.ports.status) for each in members),
        leader=leader.place.directory.name,
        leader_pid=leader.pid,
        valkey_pid=parts.valkey_pid,
        valkey_port=parts.valkey_port,
        password=quote(str(parts.valkey_password)),
        postgres_pid=parts.postgres_pid,
        revive_after_s=REVIVE_AFTER_S,
        kept=f" The data remain in {place.directory}." if place.is_kept else "",
    )


def what_to_try(place: Place, ports: Ports, psql: Sequence[str], postgres_pid: int | None) -> str:
    """Return the commands to try.

    :param psql: the command that connects to the database as its owner; its last word is the connection string.
    :param postgres_pid: the process ID of the server.
    """
    port = "" if ports.status == USUAL_PORTS.status else f" --port {ports.status}"
    return _TO_TRY.format(
        program=_program(),
        port=port,
        tail_ports=port if ports.resp == USUAL_PORTS.resp else f"{port} --resp-port {ports.resp}",
        configuration=quote(str(place.configuration)),
        owner=quoted(psql[-1]),
        status_port=ports.status,
        resp_port=ports.resp,
        http_port=ports.http,
        psql=" ".join(map(quoted, psql)),
        postgres_pid=postgres_pid,
        revive_after_s=REVIVE_AFTER_S,
        admin_socket=quote(str(place.admin_socket)),
        log=quote(str(place.log)),
        kept=f" The data remain in {place.directory}." if place.is_kept else "",
    )


def quoted(word: str) -> str:
    """Quote a word for a shell; in double quotes if that is easier to read."""
    if re.fullmatch(r"[\w./ ='-]+", word) and re.search("[ ']", word):
        return f'"{word}"'
    return quote(word)


def _program() -> str:
    """Return a command that runs this program: short if it is on the PATH."""
    if shutil.which("cacheservice"):
        return "cacheservice"
    beside = Path(sys.executable).with_name("cacheservice")
    return quote(str(beside)) if beside.exists() else f"{quote(sys.executable)} -m cacheservice"
