"""MULTI, EXEC and DISCARD."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from cacheservice.ports.clients import BYTES_PER_TURN
from cacheservice.ports.held import Streamed
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.server import COMMANDS_PER_TURN, Client, Command, InMulti, Reply, Words


def multi(_: Datasets, client: Client, __: Words) -> Reply:
    if client.transaction is not None:
        raise CommandError("ERR MULTI calls can not be nested")
    client.begin()
    return reply.OK


def discard(_: Datasets, client: Client, __: Words) -> Reply:
    if client.end_transaction() is None:
        raise CommandError("ERR DISCARD without MULTI")
    return reply.OK


def exec_(datasets: Datasets, client: Client, _: Words) -> Reply:
    """Run the queued commands on the snapshots of one moment.

    Commands that exceed this turn run in later ones, on the snapshots that are served now.
    """
    transaction = client.end_transaction()
    if transaction is None:
        raise CommandError("ERR EXEC without MULTI")
    if transaction.is_broken:
        raise CommandError("EXECABORT Transaction discarded because of previous errors.")
    queue = transaction.queue
    out = [reply.array_header(len(queue))]
    size_bytes = 0
    for number, each in enumerate(queue, 1):
        answer = client.run_queued(each, datasets)
        if isinstance(answer, bytes):
            out.append(answer)
            size_bytes += len(answer)
            if size_bytes < BYTES_PER_TURN and number % COMMANDS_PER_TURN:
                continue
            answer = iter(())
        frozen = datasets.frozen()
        return Streamed(chain(out, answer, _rest(client, queue[number:], frozen)), frozen.snapshots())
    return b"".join(out)


def _rest(client: Client, queue: list[Words], frozen: Datasets) -> Iterator[bytes]:
    for number, words in enumerate(queue, 1):
        answer = client.run_queued(words, frozen)
        if isinstance(answer, bytes):
            yield answer
        else:
            yield from answer
        if not number % COMMANDS_PER_TURN:
            yield b""


COMMANDS = (
    Command("multi", multi, 1, in_multi=InMulti.RUNS),
    Command("exec", exec_, 1, in_multi=InMulti.RUNS),
    Command("discard", discard, 1, in_multi=InMulti.RUNS),
)
