"""Commands about hashes: each dataset is one, and its rows are the fields."""

from __future__ import annotations

from itertools import chain

from cacheservice.cache.framing import bulk
from cacheservice.ports.resp import reply
from cacheservice.ports.resp.commands.arguments import count_reads, in_slices, name_in
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CHUNK_ROWS
from cacheservice.ports.resp.server import Client, Command, Reply, Words


def hget(datasets: Datasets, client: Client, words: Words) -> Reply:
    rows, reads = datasets.hash_to_read(words[1])
    nil = reply.NIL[client.protocol]
    answer = (rows and rows.bulk(words[2])) or nil
    count_reads(reads, [answer], nil)
    return answer


def hmget(datasets: Datasets, client: Client, words: Words) -> Reply:
    (rows, reads), fields = datasets.hash_to_read(words[1]), words[2:]
    nil = reply.NIL[client.protocol]

    def some(part: Words) -> bytes:
        answers = [(rows and rows.bulk(field)) or nil for field in part]
        count_reads(reads, answers, nil)
        return b"".join(answers)

    return datasets.keeping(in_slices(reply.array_header(len(fields)), fields, some), [name_in(words[1])])


def hgetall(datasets: Datasets, client: Client, words: Words) -> Reply:
    rows = datasets.whole_hash(words[1])
    header = reply.map_header(len(rows) if rows else 0, client.protocol)
    if not rows:
        return header
    return datasets.keeping(chain([header], reply.pairs(rows.slices(CHUNK_ROWS))), [words[1]])


def hkeys(datasets: Datasets, _: Client, words: Words) -> Reply:
    rows = datasets.whole_hash(words[1])
    header = reply.array_header(len(rows) if rows else 0)
    if not rows:
        return header
    pieces = (b"".join(map(bulk, keys)) for keys, _ in rows.slices(CHUNK_ROWS))
    return datasets.keeping(chain([header], pieces), [words[1]])


def hvals(datasets: Datasets, _: Client, words: Words) -> Reply:
    rows = datasets.whole_hash(words[1])
    header = reply.array_header(len(rows) if rows else 0)
    if not rows:
        return header
    pieces = (b"".join(documents) for _, documents in rows.slices(CHUNK_ROWS))
    return datasets.keeping(chain([header], pieces), [words[1]])


def hexists(datasets: Datasets, _: Client, words: Words) -> Reply:
    rows = datasets.hash(words[1])
    return reply.integer(rows is not None and words[2] in rows)


def hlen(datasets: Datasets, _: Client, words: Words) -> Reply:
    return reply.integer(len(datasets.hash(words[1]) or ()))


def hstrlen(datasets: Datasets, _: Client, words: Words) -> Reply:
    rows = datasets.hash(words[1])
    return reply.integer(len((rows.get(words[2]) if rows is not None else None) or b""))


COMMANDS = (
    Command("hget", hget, 3),
    Command("hmget", hmget, -3),
    Command("hgetall", hgetall, 2),
    Command("hexists", hexists, 3),
    Command("hlen", hlen, 2),
    Command("hkeys", hkeys, 2),
    Command("hvals", hvals, 2),
    Command("hstrlen", hstrlen, 3),
)
