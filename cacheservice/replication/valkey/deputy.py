"""Which process of a fleet waits for the leads of the others: a key with a short life, which that process renews.

Nothing depends on it for safety. If two processes are the deputy for a moment, as after a failover of the Valkey, two
compete for the leads, and the lock in the database decides.
"""

from __future__ import annotations

import secrets

from cacheservice.replication.valkey.client import Valkey

DEPUTY_S = 3.0
"""A deputy that has not renewed for so long is not the deputy any more."""

_RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], 0) end"


class Deputy:
    """The key as one process sees it.

    :param prefix: of all keys of the fleet.
    :param name: of this process, for people.
    """

    def __init__(self, valkey: Valkey, prefix: str, name: str) -> None:
        self._valkey = valkey
        self._key = f"{prefix}:deputy".encode()
        self._holder = f"{name} {secrets.token_hex(8)}"

    async def renew(self) -> bool:
        """Be the deputy for `DEPUTY_S` from now on, unless another process is; return whether this one is.

        :raises CacheServiceError: if the Valkey fails.
        """
        renewed = await self._valkey.run(self._key, "EVAL", _RENEW, 1, self._key, self._holder, int(DEPUTY_S * 1000))
        return bool(renewed)

    async def leave(self) -> None:
        """Be the deputy no longer.

        :raises CacheServiceError: if the Valkey fails.
        """
        await self._valkey.run(self._key, "EVAL", _LEAVE, 1, self._key, self._holder)
