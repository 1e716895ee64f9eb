"""SUBSCRIBE and UNSUBSCRIBE."""

from __future__ import annotations

from cacheservice.ports.resp import reply
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.reply import CommandError
from cacheservice.ports.resp.server import Client, Command, InMulti, Reply, Words, printable


def subscribe(_: Datasets, client: Client, words: Words) -> Reply:
    for channel in words[1:]:
        if not client.server.subscriptions.is_channel(channel):
            raise CommandError(f"ERR unknown channel '{printable(channel)}'; there is cache:NAME for each dataset")
    replies = []
    for channel in words[1:]:
        client.subscribe(channel)
        replies.append(reply.push([b"subscribe", channel, len(client.channels)], client.protocol))
    return b"".join(replies)


def unsubscribe(_: Datasets, client: Client, words: Words) -> Reply:
    replies = []
    leaving: list[bytes | None] = [*(words[1:] or sorted(client.channels))] or [None]
    for channel in leaving:
        if channel is not None:
            client.unsubscribe(channel)
        replies.append(reply.push([b"unsubscribe", channel, len(client.channels)], client.protocol))
    return b"".join(replies)


COMMANDS = (
    Command("subscribe", subscribe, -2, while_subscribed=True, in_multi=InMulti.REFUSED),
    Command("unsubscribe", unsubscribe, -1, while_subscribed=True, in_multi=InMulti.REFUSED),
)
