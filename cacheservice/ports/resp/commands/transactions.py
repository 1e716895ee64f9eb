"""MULTI, EXEC and DISCARD."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from twisted.internet.defer import Deferred

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
    queue, server = transaction.queue, client.server
    if server.whole is not None and any(server.table.by_name[words[0].lower()].asks for words in queue):
        return Deferred.fromCoroutine(_exec_asking(datasets, client, queue))
    return _run(datasets, client, queue, {})


async def _exec_asking(datasets: Datasets, client: Client, queue: Sequence[Words]) -> bytes | Iterator[bytes]:
    """Ask the main process for the replies that it has, then run the other commands together."""
    known: dict[int, bytes] = {}
    by_name = client.server.table.by_name
    for number, words in enumerate(queue):
        if by_name[words[0].lower()].asks:
            answer = client.run_queued(words, datasets)
            try:
                whole = await answer if isinstance(answer, Deferred) else answer
            except CommandError as error:
                whole = reply.error(str(error))
            assert isinstance(whole, bytes), "an answer of the main process is one piece"
            known[number] = whole
    return _run(datasets, client, queue, known)


def _run(
    datasets: Datasets, client: Client, queue: Sequence[Words], known: Mapping[int, bytes]
) -> bytes | Iterator[bytes]:
    """Run commands on the snapshots of one moment.

    :param known: the replies that are known already, by their places in the queue.
    """
    out = [reply.array_header(len(queue))]
    size_bytes = 0
    for number, each in enumerate(queue):
        answer = known[number] if number in known else _at_once(client, each, datasets)
        if isinstance(answer, bytes):
            out.append(answer)
            size_bytes += len(answer)
            if size_bytes < BYTES_PER_TURN and (number + 1) % COMMANDS_PER_TURN:
                continue
            answer = iter(())
        frozen = datasets.frozen()
        rest = _rest(client, queue, number + 1, known, frozen)
        return Streamed(chain(out, answer, rest), frozen.snapshots())
    return b"".join(out)


def _rest(
    client: Client, queue: Sequence[Words], start: int, known: Mapping[int, bytes], frozen: Datasets
) -> Iterator[bytes]:
    for number in range(start, len(queue)):
        answer = known[number] if number in known else _at_once(client, queue[number], frozen)
        if isinstance(answer, bytes):
            yield answer
        else:
            yield from answer
        if not (number + 1 - start) % COMMANDS_PER_TURN:
            yield b""


def _at_once(client: Client, words: Words, datasets: Datasets) -> bytes | Iterator[bytes]:
    answer = client.run_queued(words, datasets)
    assert not isinstance(answer, Deferred), "nothing waits within MULTI"
    return answer


COMMANDS = (
    Command("multi", multi, 1, in_multi=InMulti.RUNS),
    Command("exec", exec_, 1, in_multi=InMulti.RUNS),
    Command("discard", discard, 1, in_multi=InMulti.RUNS),
)
