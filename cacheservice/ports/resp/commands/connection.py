"""Commands about the connection itself, and AUTH and HELLO."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred

from cacheservice.cache.framing import bulk
from cacheservice.ports.resp import client_list, reply
from cacheservice.ports.resp.commands.arguments import SYNTAX, number_in, unknown_subcommand
from cacheservice.ports.resp.datasets import Datasets
from cacheservice.ports.resp.inline import integer
from cacheservice.ports.resp.reply import CommandError, Value
from cacheservice.ports.resp.server import (
    PASSWORD,
    REDIS_VERSION,
    Client,
    Command,
    InMulti,
    Reply,
    Words,
    printable,
    wrong_number,
)
from cacheservice.ports.resp.whole import Whole

_WRONGPASS = reply.error("WRONGPASS invalid username-password pair or user is disabled.")
_UNREAD_PASS = reply.error("WRONGPASS too many wrong passwords from this address, so this one was not looked at")


def ping(_: Datasets, client: Client, words: Words) -> Reply:
    if len(words) > 2:
        raise wrong_number("ping")
    if client.channels and client.protocol == 2:
        return reply.encode([b"pong", words[1] if len(words) == 2 else b""], 2)
    return bulk(words[1]) if len(words) == 2 else reply.PONG


def echo(_: Datasets, __: Client, words: Words) -> Reply:
    return bulk(words[1])


def select(_: Datasets, __: Client, words: Words) -> Reply:
    if number_in(words[1]) != 0:
        raise CommandError("ERR DB index is out of range")
    return reply.OK


def quit_(_: Datasets, client: Client, __: Words) -> Reply:
    client.close()
    return reply.OK


def reset(_: Datasets, client: Client, __: Words) -> Reply:
    client.reset()
    return b"+RESET\r\n"


def auth(_: Datasets, client: Client, words: Words) -> Reply:
    if len(words) > 3:
        raise CommandError(SYNTAX)
    if not client.server.password.is_required:
        if len(words) == 2:
            raise CommandError(
                "ERR AUTH <password> called without any password configured for the default user. "
                "Are you sure your configuration is correct?"
            )
        return reply.OK if words[1] == b"default" else _WRONGPASS
    user = words[1] if len(words) == 3 else b"default"
    return _authenticate(client, user, words[-1], lambda: reply.OK)


def hello(_: Datasets, client: Client, words: Words) -> Reply:
    options = list(words[1:])
    protocol = client.protocol
    if options:
        version = integer(options.pop(0))
        if version is None:
            raise CommandError("ERR Protocol version is not an integer or out of range")
        if version not in (2, 3):
            raise CommandError("NOPROTO unsupported protocol version")
        protocol = version
    credentials, name = None, None
    while options:
        option = options.pop(0)
        if option.lower() == b"auth" and len(options) >= 2:
            credentials = (options.pop(0), options.pop(0))
        elif option.lower() == b"setname" and options:
            name = options.pop(0)
        else:
            raise CommandError(f"ERR Syntax error in HELLO option '{printable(option)}'")

    def greet() -> bytes:
        if name is not None:
            client.set_name(_name_in(name))
        client.speak(protocol)
        greeting: dict[str, Value] = {
            "server": "redis",
            "version": REDIS_VERSION,
            "proto": protocol,
            "id": client.id,
            "mode": "standalone",
            "role": "master",
            "modules": [],
        }
        return reply.encode(greeting, protocol)

    if credentials is not None and client.server.password.is_required:
        return _authenticate(client, *credentials, greet)
    if credentials is not None and credentials[0] != b"default":
        return _WRONGPASS
    if not client.is_authenticated:
        raise CommandError(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
            "<user> <pass> option can be used to authenticate the client and select the RESP protocol version at "
            "the same time"
        )
    return greet()


def _authenticate(client: Client, user: bytes, password: bytes, then: Callable[[], bytes]) -> Reply:
    """Check a password; delay the answer to a wrong one.

    :param then: returns the answer to a correct one.
    """
    server, host = client.server, client.link.peer().host
    if not server.passwords.is_checked(host, PASSWORD):
        return Deferred.fromCoroutine(_refuse_unchecked(client))
    if server.password.accepts(user, password):
        client.let_in(host)
        return then()
    return Deferred.fromCoroutine(_refuse(client, host, user, password, then))


async def _refuse_unchecked(client: Client) -> bytes:
    await client.server.passwords.refuse_unchecked()
    return _UNREAD_PASS


async def _refuse(client: Client, host: str, user: bytes, password: bytes, then: Callable[[], bytes]) -> bytes:
    server = client.server
    if not await server.passwords.refuse(host, lambda: server.password.accepts(user, password)):
        return _WRONGPASS
    client.let_in(host)
    return then()


def client_(_: Datasets, client: Client, words: Words) -> Reply:
    subcommand, arguments = words[1].lower(), words[2:]
    match subcommand, arguments:
        case b"id", []:
            return reply.integer(client.id)
        case b"getname", []:
            return bulk(client.name) if client.name else reply.NIL[client.protocol]
        case b"setname", [name]:
            client.set_name(_name_in(name))
            return reply.OK
        case b"setinfo", [attribute, value]:
            return _set_info(client, attribute.lower(), value)
        case b"info", []:
            return bulk(client_list.line(client))
        case b"list", _:
            server = client.server
            if server.whole is not None:
                return Deferred.fromCoroutine(_listed(server.whole, client))
            return bulk(b"".join(map(client_list.line, server.sessions.values())))
        case ((b"no-evict" | b"no-touch"), [switch]) if switch.lower() in (b"on", b"off"):
            return reply.OK
    if subcommand in (b"id", b"getname", b"setname", b"setinfo", b"info", b"no-evict", b"no-touch"):
        raise CommandError(f"ERR wrong number of arguments for 'client|{subcommand.decode()}' command")
    raise unknown_subcommand("CLIENT", words[1])


def _name_in(name: bytes) -> bytes:
    if _has_blanks(name):
        raise CommandError("ERR Client names cannot contain spaces, newlines or special characters.")
    return name


def _set_info(client: Client, attribute: bytes, value: bytes) -> bytes:
    if attribute not in (b"lib-name", b"lib-ver"):
        raise CommandError(f"ERR Unrecognized option '{printable(attribute)}'")
    if _has_blanks(value):
        raise CommandError(f"ERR {attribute.decode()} cannot contain spaces, newlines or special characters.")
    if attribute == b"lib-name":
        client.set_library(name=value)
    else:
        client.set_library(version=value)
    return reply.OK


def _has_blanks(value: bytes) -> bool:
    return any(character < 33 or character > 126 for character in value)


async def _listed(whole: Whole, client: Client) -> bytes:
    return bulk(await client.server.ask(client, whole.client_list()))


COMMANDS = (
    Command("ping", ping, -1, while_subscribed=True),
    Command("echo", echo, 2),
    Command("select", select, 2),
    Command("client", client_, -2, asks=True),
    Command("auth", auth, -2, without_password=True, in_multi=InMulti.REFUSED),
    Command("hello", hello, -1, without_password=True, in_multi=InMulti.REFUSED),
    Command("reset", reset, 1, while_subscribed=True, in_multi=InMulti.RUNS),
    Command("quit", quit_, -1, without_password=True, while_subscribed=True, in_multi=InMulti.RUNS),
)
