"""INFO and COMMAND."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Set

from twisted.internet.defer import Deferred

from cacheservice import __version__
from cacheservice.cache.framing import bulk
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.command_docs import catalogue
from cacheservice.ports.resp.commands.arguments import unknown_subcommand
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CommandError, Value
from cacheservice.ports.resp.server import REDIS_VERSION, Client, Command, Reply, Words
from cacheservice.ports.resp.whole import ServiceInfo, Totals, Whole

_DEFAULT = frozenset({"default", "all", "everything"})


def info(datasets: Datasets, client: Client, words: Words) -> Reply:
    wanted = {word.decode("utf-8", "replace").lower() for word in words[1:]} or _DEFAULT
    server = client.server
    if server.whole is not None:
        return Deferred.fromCoroutine(_info_of_whole(server.whole, datasets, client, wanted))
    cache = server.cache
    return _info(datasets, client, wanted, ServiceInfo(os.getpid(), cache.now() - cache.started_at, server.totals()))


async def _info_of_whole(whole: Whole, datasets: Datasets, client: Client, wanted: Set[str]) -> bytes:
    return _info(datasets, client, wanted, await client.server.ask(client, whole.info()))


def _info(datasets: Datasets, client: Client, wanted: Set[str], facts: ServiceInfo) -> bytes:
    sections = [
        "\r\n".join([f"# {title}", *(f"{name}:{value}" for name, value in fields.items()), ""])
        for title, fields in _sections(datasets, client, facts).items()
        if wanted & _DEFAULT or title.lower() in wanted
    ]
    return bulk("\r\n".join(sections).encode())


def _sections(datasets: Datasets, client: Client, facts: ServiceInfo) -> dict[str, Mapping[str, object]]:
    totals = facts.totals
    return {
        "Server": _of_server(client, facts),
        "Clients": {
            "connected_clients": totals.clients,
            "maxclients": client.server.port.max_connections,
            "blocked_clients": totals.blocked,
        },
        "Memory": _of_memory(datasets, totals),
        "Persistence": {"loading": 0, "rdb_bgsave_in_progress": 0, "aof_enabled": 0},
        "Stats": {
            "total_connections_received": totals.connections_received,
            "total_commands_processed": totals.commands_processed,
            "rejected_connections": totals.rejected,
            "expired_keys": 0,
            "evicted_keys": 0,
            "pubsub_channels": len(totals.channels),
        },
        "Replication": {"role": "master", "connected_slaves": 0},
        "CPU": {
            "used_cpu_sys": f"{totals.system_s:.6f}",
            "used_cpu_user": f"{totals.user_s:.6f}",
        },
        "Cluster": {"cluster_enabled": 0},
        "Keyspace": _of_keys(datasets),
    }


def _of_server(client: Client, facts: ServiceInfo) -> dict[str, object]:
    uptime_s = int(facts.uptime_s)
    return {
        "redis_version": REDIS_VERSION,
        "redis_mode": "standalone",
        "server_name": "cacheservice",
        "cacheservice_version": __version__,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64,
        "process_id": facts.pid,
        "tcp_port": client.link.host().port,
        "server_time_usec": int(time.time() * 1e6),
        "uptime_in_seconds": uptime_s,
        "uptime_in_days": uptime_s // 86400,
    }


def _of_memory(datasets: Datasets, totals: Totals) -> dict[str, object]:
    used_bytes, peak_bytes = totals.resident_bytes, totals.peak_bytes
    return {
        "used_memory": used_bytes,
        "used_memory_human": f"{used_bytes / 2**20:.2f}M",
        "used_memory_rss": used_bytes,
        "used_memory_peak": peak_bytes,
        "used_memory_peak_human": f"{peak_bytes / 2**20:.2f}M",
        "used_memory_dataset": sum(each.rows.size_bytes for each in datasets.snapshots().values()),
        "maxmemory": 0,
        "maxmemory_human": "0B",
        "maxmemory_policy": "noeviction",
    }


def _of_keys(datasets: Datasets) -> dict[str, object]:
    loaded = datasets.loaded()
    if not loaded:
        return {}
    keys = datasets.key_count()
    left_ms = [max(0.0, each.settings.max_age_s - (each.age_s() or 0.0)) * 1000 for each in loaded]
    return {"db0": f"keys={keys},expires={keys},avg_ttl={int(sum(left_ms) / len(left_ms))}"}


def command(_: Datasets, client: Client, words: Words) -> Reply:
    known = catalogue().entries
    if len(words) == 1:
        return reply.encode([each.values() for each in known.values()], client.protocol)
    subcommand = words[1].lower()
    names = [word.decode("utf-8", "replace").lower() for word in words[2:]]
    if subcommand == b"count":
        if names:
            raise CommandError("ERR wrong number of arguments for 'command|count' command")
        return reply.integer(len(known))
    if subcommand == b"docs":
        docs = {name: known[name].docs for name in names or known if name in known}
        return reply.encode(docs, client.protocol)
    if subcommand == b"info":
        entries: list[Value] = [known[name].values() if name in known else None for name in names or known]
        return reply.encode(entries, client.protocol)
    if subcommand == b"list":
        return reply.encode(list(known), client.protocol)
    raise unknown_subcommand("COMMAND", words[1])


COMMANDS = (
    Command("info", info, -1, asks=True),
    Command("command", command, -1),
)
