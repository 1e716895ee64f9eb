"""Commands that Redis does not have."""

from __future__ import annotations

from twisted.internet.defer import Deferred

from cacheservice.base.errors import Stopped, UnknownDataset
from cacheservice.cache.dataset import Dataset
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands.arguments import number_in
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.server import Client, Command, Reply, Words
from cacheservice.ports.resp.whole import Whole
from cacheservice.views import collect
from cacheservice.views import json as as_json

_MAX_WAIT_MS = 86_400_000


def cache_list(datasets: Datasets, client: Client, _: Words) -> Reply:
    return reply.encode(list(datasets.cache.datasets), client.protocol)


def cache_info(datasets: Datasets, client: Client, words: Words) -> Reply:
    dataset, whole = datasets.find(words[1]), client.server.whole
    if whole is not None:
        return Deferred.fromCoroutine(_info_of_whole(whole, client, dataset.name))
    return reply.encode(as_json.dataset(collect.dataset(dataset)), client.protocol)


async def _info_of_whole(whole: Whole, client: Client, name: str) -> bytes:
    try:
        fields = await client.server.ask(client, whole.dataset(name))
    except UnknownDataset as error:  # the main process has removed it
        raise CommandError(f"ERR {error}") from None
    return reply.encode(fields, client.protocol)


def cache_age(datasets: Datasets, client: Client, words: Words) -> Reply:
    datasets.rows(words[1])
    return reply.encode(round(datasets.find(words[1]).age_s() or 0.0, 3), client.protocol)


def cache_wait(datasets: Datasets, client: Client, words: Words) -> Reply:
    """Wait until the snapshot includes a transaction.

    An error replies to a wait for a refresh in a process that is stopping, or does not refresh.
    It blocks only its connection. Within MULTI it does not wait, like the blocking commands of Redis.
    """
    dataset = datasets.find(words[1])
    transaction_id, timeout_ms = number_in(words[2]), number_in(words[3])
    if transaction_id < 0 or not 0 <= timeout_ms <= _MAX_WAIT_MS:
        raise CommandError("ERR XID and TIMEOUT_MS must not be negative, and TIMEOUT_MS at most a day")
    if client.in_transaction:
        snapshot = dataset.snapshot
        present = datasets.cache.database.server
        return reply.integer(snapshot is not None and snapshot.includes(transaction_id, present))
    return Deferred.fromCoroutine(_included(client, dataset, transaction_id, timeout_ms / 1000))


async def _included(client: Client, dataset: Dataset, transaction_id: int, timeout_s: float) -> bytes:
    try:
        return reply.integer(await client.server.freshness.includes(dataset, transaction_id, timeout_s))
    except (UnknownDataset, Stopped) as error:  # it was removed during the wait, or nothing refreshes it
        raise CommandError(f"ERR {error}") from None


COMMANDS = (
    Command("cache.list", cache_list, 1),
    Command("cache.info", cache_info, 2, asks=True),
    Command("cache.age", cache_age, 2),
    Command("cache.wait", cache_wait, 4),
)
