"""Which address is tried when, what is reported of those that failed, and what is never shown."""

from __future__ import annotations

import psycopg2
import pytest

from cacheservice.base.errors import DatabaseUnavailable, DeadlineExceeded, NoSessionLeft
from cacheservice.sources.postgres.addresses import DEMOTED_S, TRIAL_S, Address, Memory, passes, share_s
from cacheservice.sources.postgres.refusal import Tried, ends_the_search, not_connected, tried
from cacheservice.sources.postgres.target import parse

A, B, C = (Address(name, f"10.0.0.{number}", "5432") for number, name in enumerate("abc", 1))


def test_the_order_is_kept_while_nothing_fails() -> None:
    assert Memory().ordered([B, A, C], 0.0) == [B, A, C]


def test_what_failed_is_last_for_a_while_and_then_first_again() -> None:
    memory = Memory()
    memory.failed(A, 0.0, silent=True)
    assert memory.ordered([A, B, C], DEMOTED_S - 1) == [B, C, A]
    assert memory.ordered([A, B, C], DEMOTED_S + 1) == [A, B, C]
    assert memory.trial_s(A, DEMOTED_S - 1) is None
    assert memory.trial_s(A, DEMOTED_S + 1) == TRIAL_S
    memory.failed(A, DEMOTED_S + 1, silent=True)
    assert memory.ordered([A, B], 2.5 * DEMOTED_S)[0] == B, "twice as long after the second failure"
    memory.answered(A)
    assert memory.ordered([A, B, C], DEMOTED_S + 2) == [A, B, C]


def test_failing_again_while_demoted_does_not_add_up() -> None:
    """Where all hosts are down, each of a hundred attempts fails at each of them."""
    memory = Memory()
    for _ in range(100):
        memory.failed(A, 0.0, silent=True)
    assert memory.ordered([A, B], DEMOTED_S + 1) == [A, B]


def test_shares() -> None:
    assert share_s(10, 2, None, None) == 5
    assert share_s(5, 1, None, None) == 5
    assert share_s(10, 2, 2.0, None) == 2, "connect_timeout of the connection string"
    assert share_s(10, 2, None, 1.0) == 1
    assert share_s(10, 1, None, 1.0) == 10, "nothing else is left"
    assert share_s(-1, 2, None, None) == 0


def test_passes() -> None:
    assert passes("prefer-standby") == ("standby", "any")
    assert passes("read-write") == ("read-write",)


def test_hosts_and_ports() -> None:
    assert parse("host=a,b port=1,").hosts() == [("a", "1"), ("b", "5432")]
    assert parse("host=a,b port=7").hosts() == [("a", "7"), ("b", "7")]
    assert parse("host=/run/x,,c").hosts() == [("/run/x", "5432"), ("", "5432"), ("c", "5432")]


def test_a_refused_login_is_told_with_its_sqlstate() -> None:
    error = psycopg2.OperationalError(
        'connection to server at "a" (10.0.0.1), port 5432 failed: FATAL:  28P01: password authentication failed for '
        'user "me"\nLOCATION:  auth_failed, auth.c:331\n'
    )
    assert tried("a", error) == Tried("a", 'FATAL:  password authentication failed for user "me"', "28P01")


def test_which_failures_end_the_search() -> None:
    for sqlstate, ends in {"28P01": True, "3D000": True, "57P03": False, "53300": False, "": False}.items():
        assert ends_the_search(Tried("a", "", sqlstate)) is ends


def test_each_address_is_told_with_its_own_cause() -> None:
    target = parse("host=a,b")
    error = not_connected([Tried("a", "Connection refused"), Tried("b", "FATAL:  full", "53300")], target, 3.0)
    assert isinstance(error, NoSessionLeft)
    assert str(error) == "PostgreSQL refused the connection: a: Connection refused; b: FATAL: full"
    silent = not_connected([Tried("a", "did not answer within 1 s", silent=True)], target, 3.0)
    assert isinstance(silent, DeadlineExceeded)


TLS_AND_LIMITS = {
    "server does not support SSL, but SSL was required": "ssl = on",
    "SSL error: certificate verify failed": "sslrootcert must name",
    'root certificate file "/root/.postgresql/root.crt" does not exist': "sslrootcert=FILE",
    'server certificate for "db.example" does not match host name "db"': "verify-ca",
    'weak sslmode "require" may not be used with sslrootcert=system (use "verify-full")': "verify-full",
    'private key file "/k" has group or world access; file must have permissions u=rw (0600) or less': "chmod 600",
    'could not load private key file "/k": bad decrypt': "sslkey=FILE",
    "SSL error: tlsv1 alert protocol version": "ssl_min_protocol_version",
    "SSL error: something new": "sslmode",
    'FATAL:  53300: too many connections for role "few"': "ALTER ROLE few CONNECTION LIMIT",
    'FATAL:  53300: too many connections for database "shop"': "ALTER DATABASE shop CONNECTION LIMIT",
    "FATAL:  53300: sorry, too many clients already": "max_connections of the server",
    'FATAL:  28000: no pg_hba.conf entry for host "::1", user "a", database "a", no encryption': "sslmode=require",
    "FATAL:  28000: connection requires a valid client certificate": "sslcert=FILE",
    "session is read-only": "target_session_attrs=primary",
    "server is in hot standby mode": "target_session_attrs",
    "Connection refused": "check that PostgreSQL is running",
    'the name look-up of "db" found no address': "name server",
}


@pytest.mark.parametrize("message", TLS_AND_LIMITS)
def test_advice(message: str) -> None:
    error = not_connected([tried("a", psycopg2.OperationalError(message))], parse("host=a"), 1.0)
    assert isinstance(error, DatabaseUnavailable)
    assert TLS_AND_LIMITS[message] in error.advice


@pytest.mark.parametrize("password", ["a", "s", "role", "w", "e"])
def test_a_short_password_garbles_neither_message_nor_advice(password: str) -> None:
    target = parse(f"host=a user=me password={password}")
    message = f'FATAL:  28P01: password authentication failed for user "me", password={password}'
    error = not_connected([tried("a", psycopg2.OperationalError(message))], target, 1.0)
    assert str(error).endswith('password authentication failed for user "me", password=***')
    assert "check the user" in error.advice


def test_redaction() -> None:
    for password in ("a", "shop", "long enough it is"):
        target = parse(f"host=a password='{password}'")
        for text in f"is '{password}' right", f"postgresql://me:{password}@h/x", f"password={password} x":
            assert password not in target.redact(text).split("***")[-1].replace("is right", "")
            assert "***" in target.redact(text)
    assert parse("host=a password='a@b c/d'").redact("postgresql://me:a%40b%20c%2Fd@h") == "postgresql://me:***@h"
    assert parse("host=a password=shop").redact("the shopping list") == "the shopping list"
