"""What a Valkey may fail with. Messages name the node, never a password."""

from __future__ import annotations

from cacheservice.base.errors import CacheServiceError


class ValkeyDown(CacheServiceError):
    """The server cannot be reached, does not answer in time, or cannot serve now. Try again later."""


class ValkeyRefused(CacheServiceError):
    """The server refused a command, for a reason that stays until somebody changes it.

    `code` is the first word of its error, such as NOAUTH or OOM.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
