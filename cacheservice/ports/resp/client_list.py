"""The lines of CLIENT LIST."""

from __future__ import annotations

from cacheservice.ports.resp.server import Client, printable


def line(client: Client) -> bytes:
    """Return the line of a client, with its end."""
    link, transaction = client.link, client.transaction
    peer, host = link.peer(), link.host()
    fields = {
        "id": client.id,
        "addr": f"{peer.host}:{peer.port}",
        "laddr": f"{host.host}:{host.port}",
        "name": client.name.decode(),
        "age": int(link.age_s()),
        "idle": int(link.idle_s()),
        "flags": "b" if client.server.is_blocked(client) else "P" if client.channels else "N",
        "db": 0,
        "sub": len(client.channels),
        "psub": 0,
        "multi": -1 if transaction is None else len(transaction.queue),
        "cmd": printable(client.last_command).lower(),
        "user": "default",
        "resp": client.protocol,
        "lib-name": client.library_name.decode(),
        "lib-ver": client.library_version.decode(),
    }
    return " ".join(f"{name}={value}" for name, value in fields.items()).encode() + b"\n"
