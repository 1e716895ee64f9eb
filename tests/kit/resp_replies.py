"""The replies of the RESP port of one process, for comparison with those of another one.

    python -m tests.kit.resp_replies [reversed]

writes the pages of SCAN and HSCAN by their cursors, and the replies to a pipeline of all other commands whose replies
do not depend on the time, in hexadecimal digits, as JSON. `reversed` declares the datasets and adds the rows in the
opposite order.
"""

from __future__ import annotations

import json
import sys

from cacheservice.cache.cache import Cache
from cacheservice.ports.resp.commands import COMMANDS
from tests.kit.clocks import started_clock
from tests.kit.datasets import declared
from tests.kit.resp import Words, encode
from tests.kit.resp_peer import publish
from tests.kit.resp_session import FakeLink, make_server

NAMES = ["one", "two", "three"]
ROWS = 500
_TIMED = {"info", "cache.info", "cache.age", "cache.wait", "ttl", "pttl"}
_PAGES = {"scan", "hscan"}


def pages(client: FakeLink, *words: bytes | str | int) -> dict[str, tuple[str, list[str]]]:
    """Return the pages of a scan by the cursors that ask for them."""
    found: dict[str, tuple[str, list[str]]] = {}
    cursor = "0"
    while cursor not in found:
        ((following, page),) = client.ask_all((*words, cursor, "COUNT", 40))
        keys = page[::2] if words[0] == "HSCAN" else page
        found[cursor] = following.decode(), [key.decode() for key in keys]
        cursor = following.decode()
    return found


def pipeline() -> list[Words]:
    """Return commands of every kind, in both versions of the protocol."""
    asked: list[Words] = [(command.name,) for command in COMMANDS if command.name not in _TIMED | _PAGES | {"quit"}]
    asked += [("GET", "one:1"), ("MGET", "one:1", "two:2", "three:x"), ("EXISTS", "one", "one:7"), ("TYPE", "two")]
    asked += [("HGETALL", "one"), ("HKEYS", "two"), ("HVALS", "three"), ("HMGET", "one", 1, 2), ("HLEN", "one")]
    asked += [("COMMAND", "DOCS"), ("COMMAND", "INFO", "get"), ("COMMAND", "LIST"), ("CLIENT", "LIST")]
    asked += [("MULTI",), ("SCAN", 0, "COUNT", 100), ("HSCAN", "one", 0), ("EXEC",)]
    asked += [("SUBSCRIBE", "cache:two", "cache:one", "cache:three"), ("UNSUBSCRIBE",), ("CACHE.LIST",)]
    return [*asked, ("HELLO", 3), *asked]


def main() -> None:
    order = -1 if "reversed" in sys.argv else 1
    clock = started_clock()
    cache = Cache([declared(name) for name in NAMES[::order]], clock.seconds)
    server = make_server(cache, clock)
    for name in NAMES:
        publish(cache, name, range(ROWS)[::order])
    for number in range(2, 6):
        FakeLink(server, number)
    client = FakeLink(server)
    scans = [pages(client, "SCAN"), pages(client, "HSCAN", "two")]
    client.send(b"".join(encode(*words) for words in pipeline()))
    sys.stdout.write(json.dumps({"scans": scans, "replies": client.take().hex()}))


if __name__ == "__main__":
    main()
