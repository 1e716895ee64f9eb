"""INFO and COMMAND."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Mapping

from cacheservice import __version__
from cacheservice.cache.framing import bulk
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.command_docs import catalogue
from cacheservice.ports.resp.commands.arguments import unknown_subcommand
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CommandError, Value
from cacheservice.ports.resp.server import REDIS_VERSION, Client, Command, Reply, Words

_DEFAULT = frozenset({"default", "all", "everything"})


def info(datasets: Datasets, client: Client, words: Words) -> Reply:
    wanted = {word.decode("utf-8", "replace").lower() for word in words[1:]} or _DEFAULT
    sections = [
        "\r\n".join([f"# {title}", *(f"{name}:{value}" for name, value in fields.items()), ""])
        for title, fields in _sections(datasets, client).items()
        if wanted & _DEFAULT or title.lower() in wanted
    ]
    return bulk("\r\n".join(sections).encode())


def _sections(datasets: Datasets, client: Client) -> dict[str, Mapping[str, object]]:
    server = client.server
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "Server": _of_server(client),
        "Clients": {
            "connected_clients": len(server.sessions),
            "maxclients": server.port.max_connections,
            "blocked_clients": sum(each.link.is_waiting for each in server.sessions.values()),
        },
        "Memory": _of_memory(datasets, usage.ru_maxrss * 1024),
        "Persistence": {"loading": 0, "rdb_bgsave_in_progress": 0, "aof_enabled": 0},
        "Stats": {
            "total_connections_received": server.connections_received,
            "total_commands_processed": server.commands_processed,
            "rejected_connections": server.port.rejected["too_many_connections"],
            "expired_keys": 0,
            "evicted_keys": 0,
            "pubsub_channels": len(server.subscriptions.channels),
        },
        "Replication": {"role": "master", "connected_slaves": 0},
        "CPU": {
            "used_cpu_sys": f"{usage.ru_stime:.6f}",
            "used_cpu_user": f"{usage.ru_utime:.6f}",
        },
        "Cluster": {"cluster_enabled": 0},
        "Keyspace": _of_keys(datasets),
    }


def _of_server(client: Client) -> dict[str, object]:
    cache = client.server.cache
    uptime_s = int(cache.now() - cache.started_at)
    return {
        "redis_version": REDIS_VERSION,
        "redis_mode": "standalone",
        "server_name": "cacheservice",
        "cacheservice_version": __version__,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64,
        "process_id": os.getpid(),
        "tcp_port": client.link.host().port,
        "server_time_usec": int(time.time() * 1e6),
        "uptime_in_seconds": uptime_s,
        "uptime_in_days": uptime_s // 86400,
    }


def _of_memory(datasets: Datasets, peak_bytes: int) -> dict[str, object]:
    used_bytes = _resident_bytes()
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


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


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
    Command("info", info, -1),
    Command("command", command, -1),
)
