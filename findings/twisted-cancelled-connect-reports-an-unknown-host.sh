#!/usr/bin/env bash
# A connect by host name that is cancelled at once reports that the host is unknown, even if the host is an IP address.
#
# Versions: Twisted 26.10.0.
# Setting: `HostnameEndpoint(reactor, "127.0.0.1", port).connect(factory)` to a server that listens, cancelled in the same
#   turn of the reactor, and another one that is cancelled once the connection attempt has begun.
# Guess before the run: both Deferreds fail with CancelledError, or with ConnectingCancelledError as those of
#   `TCP4ClientEndpoint` do, so that a caller can tell its own cancellation from a server that cannot be reached.
# Seen: the first fails with DNSLookupError, "Couldn't find the hostname '127.0.0.1'"; the second with
#   ConnectingCancelledError. A loop that tries again after errors of the network, and is stopped by cancelling it, goes on
#   for ever if it is cancelled in the first turn.
# Expected output, and the script fails if it differs:
#   cancelled at once: DNSLookupError: DNS lookup failed: Couldn't find the hostname '127.0.0.1'.
#   cancelled later: ConnectingCancelledError
#   not cancelled: connected
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q twisted==26.10.0
cat >"$work/run.py" <<'PY'
import socket

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import ConnectingCancelledError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater, react

LIMIT_S = 10


async def outcome(connecting):
    try:
        protocol = await connecting
    except ConnectingCancelledError:
        return "ConnectingCancelledError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    protocol.transport.abortConnection()
    return "connected"


async def main():
    listening = reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.1")
    endpoint = HostnameEndpoint(reactor, "127.0.0.1", listening.getHost().port, timeout=LIMIT_S)

    at_once = endpoint.connect(Factory.forProtocol(Protocol))
    at_once.cancel()
    print("cancelled at once:", await outcome(at_once))

    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fillers = []
        for _ in range(8):  # a full backlog leaves further attempts without an answer
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        later = HostnameEndpoint(reactor, "127.0.0.1", port, timeout=LIMIT_S).connect(Factory.forProtocol(Protocol))
        await deferLater(reactor, 0.2, lambda: None)
        later.cancel()
        print("cancelled later:", await outcome(later))
        for filler in fillers:
            filler.close()

    print("not cancelled:", await outcome(endpoint.connect(Factory.forProtocol(Protocol))))
    await listening.stopListening()


react(lambda _: Deferred.fromCoroutine(main()))
PY
"$work/venv/bin/python" "$work/run.py" | tee "$work/seen"
diff - "$work/seen" <<'EXPECTED'
cancelled at once: DNSLookupError: DNS lookup failed: Couldn't find the hostname '127.0.0.1'.
cancelled later: ConnectingCancelledError
not cancelled: connected
EXPECTED
