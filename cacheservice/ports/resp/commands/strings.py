"""Commands about string keys: each row is one, NAME:KEY."""

from __future__ import annotations

from collections.abc import Sequence

from cacheservice.cache.counts import Reads
from cacheservice.cache.rows import Rows
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands.arguments import count_reads, in_slices
from cacheservice.ports.resp.datasets import WRONG_TYPE, Datasets
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.server import Client, Command, Reply, Words


def get(datasets: Datasets, client: Client, words: Words) -> Reply:
    name, colon, row = words[1].partition(b":")
    rows, reads = datasets.to_read(name)
    found = rows.bulk(row)
    if found is None:
        if not colon:
            raise CommandError(WRONG_TYPE)
        reads.miss()
        return reply.NIL[client.protocol]
    reads.hit()
    return found


def mget(datasets: Datasets, client: Client, words: Words) -> Reply:
    # All datasets are looked up before the first answer, so that all answers are from the same moment.
    nil = reply.NIL[client.protocol]
    sought = []
    moment: dict[bytes, tuple[Rows, Reads]] = {}
    for key in words[1:]:
        name, colon, row = key.partition(b":")
        if name not in moment:
            moment[name] = datasets.to_read(name)
        rows, reads = moment[name]
        # The key of a hash is nil, as in Redis.
        sought.append((rows if colon else None, reads, row))

    def some(part: Sequence[tuple[Rows | None, Reads, bytes]]) -> bytes:
        answers = [(rows and rows.bulk(row)) or nil for rows, _, row in part]
        if len(moment) == 1:
            count_reads(reads, answers, nil)
        else:
            for (_, of, _), answer in zip(part, answers, strict=True):
                count_reads(of, [answer], nil)
        return b"".join(answers)

    return datasets.keeping(in_slices(reply.array_header(len(sought)), sought, some), moment)


def strlen(datasets: Datasets, _: Client, words: Words) -> Reply:
    rows, row = datasets.string(words[1])
    return reply.integer(len(rows.get(row) or b""))


COMMANDS = (
    Command("get", get, 2),
    Command("mget", mget, -2),
    Command("strlen", strlen, 2),
)
