"""Advice about errors of the server, of TLS and of libpq.

It is chosen by SQLSTATE, and by the words of the message if there is no SQLSTATE.
"""

from __future__ import annotations

import re

_BY_SQLSTATE = {
    "28": "check the user, its password and pg_hba.conf",
    "3D000": "check the database's name in postgres.dsn",
    "42501": "grant the reader what the query reads, e.g. GRANT SELECT ON … TO …",
    "42P01": "create the table, name its schema in the query, or grant USAGE on the schema",
    "42703": "correct the column's name in the query or in key",
    "53300": "raise max_connections of the server, or lower postgres.max_connections",
    "57P03": "nothing to do if it ends by itself: the server starts, stops or recovers",
    "22021": "correct the bytes in that column: they are not text in the database's encoding",
    "22P05": "correct that value, or move the database to UTF8: it has no form in UTF-8",
}

_REFUSED = (
    # More exact than the SQLSTATE, so checked first. The words are those of PostgreSQL, libpq and OpenSSL.
    (
        r'too many connections for role "(?P<name>[^"]*)"',
        "raise the limit of the role (ALTER ROLE {name} CONNECTION LIMIT …), or end other sessions of the role",
    ),
    (
        r'too many connections for database "(?P<name>[^"]*)"',
        "raise the limit of the database (ALTER DATABASE {name} CONNECTION LIMIT …), or end other sessions there",
    ),
    (r"max_client_conn", "raise max_client_conn of PgBouncer, or lower postgres.max_connections"),
    (
        r"session is read-only",
        "target_session_attrs=read-write asks for sessions that may write, and those of a role with "
        "default_transaction_read_only, as `cacheservice migrate` makes it, may not: use target_session_attrs=primary",
    ),
    (r"session is not read-only|hot standby mode", "name a server in postgres.dsn that fits its target_session_attrs"),
    (
        r"connection requires a valid client certificate|certificate authentication failed",
        "name the reader's certificate and key in postgres.dsn: sslcert=FILE sslkey=FILE",
    ),
    (
        r"no pg_hba\.conf entry .*no encryption",
        "allow the reader in pg_hba.conf; if it is allowed there with TLS only (hostssl), use sslmode=require",
    ),
)
_TLS = (
    (
        r"server does not support SSL|server does not support TLS",
        "enable TLS on the server (ssl = on), or use sslmode=prefer if the network can be trusted",
    ),
    (
        r"root certificate file|no certificate or crl found",
        "name the file of the authority that signed the server's certificate: sslrootcert=FILE, "
        "or sslrootcert=system for authorities that the system trusts",
    ),
    (
        r"certificate verify failed|self.signed certificate|unable to get (local )?issuer|unknown ca",
        "sslrootcert must name the authority that signed the server's certificate, and the certificate must be valid "
        "today: openssl s_client -starttls postgres -showcerts -connect HOST:PORT",
    ),
    (
        r"server certificate for .* does not match host name|could not get server's host name from server certificate",
        "name the host in postgres.dsn as the server's certificate does, or use sslmode=verify-ca",
    ),
    (r"weak sslmode", "use sslmode=verify-full with sslrootcert=system"),
    (r"private key file .* (group or world access|permissions)", "chmod 600 the file that sslkey names"),
    (
        r"private key file|certificate file|certificate present, but not private key|bad decrypt",
        "correct sslcert=FILE and sslkey=FILE in postgres.dsn: a pair in PEM format that this user may read",
    ),
    (
        r"unsupported protocol|wrong version number|alert protocol version|no protocols available",
        "allow a common TLS version on both sides: ssl_min_protocol_version of the server and of postgres.dsn",
    ),
    (r"invalid response to SSL negotiation", "check host and port in postgres.dsn: the server is not PostgreSQL"),
    (r"\bSSL\b", "check the certificates and sslmode on both sides; the server's log has more details"),
)
_NO_SQLSTATE = (
    (r"name look-up|could not translate host name", "check the host's name in postgres.dsn, and the name server"),
    (r"password|authentication|pg_hba|role \".*\" does not exist", _BY_SQLSTATE["28"]),
    (r'database ".*" does not exist', _BY_SQLSTATE["3D000"]),
    (r"too many|connection slots", _BY_SQLSTATE["53300"]),
    (r"Permission denied|No such file or directory", "check the path of the server's socket in postgres.dsn"),
    (r"Connection refused", "check that PostgreSQL is running, and check the host and port in postgres.dsn"),
    (
        r"timeout expired|timed out",
        "look for a frozen or overloaded server or a lost network path, and check the host and port in postgres.dsn",
    ),
)


def for_query(sqlstate: str) -> str | None:
    """Return advice about the error of a statement.

    Advice for the error's class is the fallback; None if there is no advice.
    """
    return _BY_SQLSTATE.get(sqlstate) or _BY_SQLSTATE.get(sqlstate[:2])


def for_login(sqlstate: str, message: str, dsn_source: str = "postgres.dsn") -> str | None:
    """Return advice about a session that did not open.

    :param message: the unchanged message of the driver.
    :param dsn_source: the setting, the variable or the option that holds the DSN.
    """
    advice = _for_login(sqlstate, message)
    return advice and advice.replace("postgres.dsn", dsn_source)


def _for_login(sqlstate: str, message: str) -> str | None:
    exact = _first(_REFUSED, message)
    if exact is not None:
        return exact
    if sqlstate:
        return for_query(sqlstate)
    return _first(_TLS, message) or _first(_NO_SQLSTATE, message)


def _first(table: tuple[tuple[str, str], ...], message: str) -> str | None:
    for words, advice in table:
        if found := re.search(words, message, re.IGNORECASE | re.DOTALL):
            return advice.format(**found.groupdict()) if found.groupdict() else advice
    return None
