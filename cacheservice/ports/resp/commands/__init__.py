"""The commands of the RESP port, one module for each kind.

Each command is a function of the datasets, the client and its words, and returns a `Reply`. `COMMANDS` is the only list
of them. `command_docs.json` describes the same commands for COMMAND; a test compares the two.
"""

from __future__ import annotations

from cacheservice.ports.resp.commands import (
    cache,
    connection,
    hashes,
    keys,
    scans,
    server,
    strings,
    subscriptions,
    transactions,
)

COMMANDS = (
    *strings.COMMANDS,
    *keys.COMMANDS,
    *hashes.COMMANDS,
    *scans.COMMANDS,
    *connection.COMMANDS,
    *transactions.COMMANDS,
    *subscriptions.COMMANDS,
    *server.COMMANDS,
    *cache.COMMANDS,
)
