"""Replaces the secrets that clients send while the service runs.

Kubernetes and other systems rotate a secret by writing a new one to its file. Before a port refuses a client, the files
are read again, because the client's secret may be the new one. A reload replaces secrets as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from cacheservice.base.interfaces import Log, Reactor
from cacheservice.base.internal_errors import log_internal_error
from cacheservice.base.threads import in_thread
from cacheservice.config import Settings

_INTERVAL_S = 1.0
_NAMES = {"password": "resp.password", "token": "http.token", "admin_token": "http.admin_token"}

Look = Callable[[], Deferred[None] | None]
"""Reads the files again; fires when their secrets are in effect. None if it is too early, or without files."""


def no_files() -> Deferred[None] | None:
    """Return None: the `Look` of a port whose secrets come from no file."""
    return None


@dataclass(frozen=True, slots=True)
class ClientSecrets:
    """The secrets of the ports; the repr shows none of them.

    An empty text means that no secret is required.
    """

    password: str
    token: str
    admin_token: str

    def __repr__(self) -> str:
        return "ClientSecrets(…)"

    @classmethod
    def of(cls, settings: Settings) -> ClientSecrets:
        """Return the secrets of a configuration."""
        resp, http = settings.resp, settings.http
        return cls(resp.password.get_secret_value(), http.token.get_secret_value(), http.admin_token.get_secret_value())

    def replaced_by(self, wanted: Mapping[str, str]) -> ClientSecrets:
        """Return the secrets with the new values of `wanted`, by the names of their keys.

        A secret that is empty stays empty: whether a port requires a secret is decided at the start.
        """
        kept = asdict(self)
        return replace(self, **{name: wanted.get(_NAMES[name]) or kept[name] for name in kept if kept[name]})

    def by_key(self) -> dict[str, str]:
        """Return the secrets by the names of their keys in the configuration."""
        return {_NAMES[name]: secret for name, secret in asdict(self).items()}


class Secrets:
    """The present secrets of the ports."""

    def __init__(self, started: ClientSecrets, log: Log) -> None:
        self._current = started
        self._log = log
        self._replace: list[Callable[[ClientSecrets], None]] = []

    @property
    def current(self) -> ClientSecrets:
        """The secrets that are in effect now."""
        return self._current

    def watch(self, replaced: Callable[[ClientSecrets], None]) -> None:
        """Call `replaced` with all secrets whenever one changes. It must not raise."""
        self._replace.append(replaced)

    def look(self) -> Deferred[None] | None:
        """Look for newer secrets: a `Look`. There are none here."""
        return None

    def take(self, secrets: Mapping[str, str]) -> list[str]:
        """Apply secrets by the names of their keys; return the names that changed."""
        before = self._current.by_key()
        wanted = self._current.replaced_by(secrets)
        if wanted.token and wanted.token == wanted.admin_token:
            # Readers would get the rights of operators.
            self._log.error("secret_not_used", error="http.token and http.admin_token are the same; the old ones stay")
            wanted = replace(wanted, token=self._current.token, admin_token=self._current.admin_token)
        self._current = wanted
        replaced = [name for name, secret in wanted.by_key().items() if secret != before[name]]
        if replaced:
            for each in self._replace:
                each(wanted)
        return replaced


class Rotation(Secrets):
    """Replaces the secrets of the ports by those in their files.

    It is either idle or reading. While it reads, all callers of `look` wait for the same read.

    :param read: returns the secrets that have files, by the names of their keys; it blocks.
    :param has_files: whether any secret has a file.
    :param reactor: `IReactorTime`, monotonic, and `IReactorThreads`.
    """

    def __init__(
        self,
        started: ClientSecrets,
        read: Callable[[], Mapping[str, str]],
        *,
        has_files: bool,
        reactor: Reactor,
        log: Log,
    ) -> None:
        super().__init__(started, log)
        self._read = read
        self._has_files = has_files
        self._reactor = reactor
        self._looked_at = -math.inf
        self._waiting: list[Deferred[None]] | None = None

    def look(self) -> Deferred[None] | None:
        """Read the files in a thread, at most once a second: a `Look`."""
        if not self._has_files:
            return None
        if self._waiting is None:
            now = self._reactor.seconds()
            if now - self._looked_at < _INTERVAL_S:
                return None
            self._looked_at, self._waiting = now, []
            reading = in_thread(self._reactor, self._read)
            reading.addCallback(self._found, self._current).addErrback(self._broken).addCallback(self._looked)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def _found(self, secrets: Mapping[str, str], before: ClientSecrets) -> None:
        # A reload that ended during the read may have applied newer ones.
        if self._current is before and (replaced := self.take(secrets)):
            self._log.info(
                "secrets_read_again", keys=replaced, reason="a client was refused, and the files have changed"
            )

    def _broken(self, failure: Failure) -> None:
        log_internal_error(self._log, failure)

    def _looked(self, _: None) -> None:
        waiting, self._waiting = self._waiting or [], None
        for each in waiting:
            each.callback(None)
