"""Laws of a Redis session on bytes alone: greeting, password, transactions, subscriptions, pipelines and its end."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.clients import BYTES_PER_TURN
from cacheservice.ports.resp.inline import ProtocolViolation
from cacheservice.ports.resp.server import COMMANDS_PER_TURN, Command
from cacheservice.ports.resp.session import Step
from cacheservice.ports.resp.state import Mode
from cacheservice.ports.throttle import LONG_WAIT_S, SHORT_WAIT_S
from tests.kit.clocks import started_clock
from tests.kit.resp import Words, encode
from tests.kit.resp_peer import document, filled_cache, publish
from tests.kit.resp_session import FakeLink, make_server, parsed

NOAUTH = "NOAUTH Authentication required."
SECRET = "open sesame"


class SessionTestCase(SynchronousTestCase):
    password = ""

    def setUp(self) -> None:
        self.clock = started_clock()
        self.cache = filled_cache(self.clock.seconds, 20)
        self.looking: Deferred[None] | None = None
        self.server = make_server(self.cache, self.clock, self.password, lambda: self.looking)
        self.client = FakeLink(self.server)
        self.session = self.client.session

    def assert_asks(self, words: str, expected: Any) -> None:
        self.assertEqual(self.client.ask_all(tuple(words.split())), [expected], words)

    def assert_mode(self, mode: Mode) -> None:
        self.assertIs(self.session.mode, mode)


class Greeting(SessionTestCase):
    def test_hello(self) -> None:
        """HELLO changes the version of the protocol, and names the client; a bad option changes neither."""
        self.assertEqual(self.client.ask("GET", "products:nope"), b"$-1\r\n")
        self.assert_asks("HELLO 4", "NOPROTO unsupported protocol version")
        self.assert_asks("HELLO x", "ERR Protocol version is not an integer or out of range")
        self.assert_asks("HELLO 3 NOPE", "ERR Syntax error in HELLO option 'NOPE'")
        self.assert_asks("HELLO 3 SETNAME é", "ERR Client names cannot contain spaces, newlines or special characters.")
        self.assertEqual((self.session.protocol, self.session.name), (2, b""))
        (greeting,) = self.client.ask_all(("HELLO", 3, "SETNAME", "me"))
        self.assertEqual((greeting[b"proto"], greeting[b"id"], greeting[b"server"]), (3, 1, b"redis"))
        self.assertEqual((self.session.protocol, self.session.name), (3, b"me"))
        self.assertEqual(self.client.ask("GET", "products:nope"), b"_\r\n")
        self.assertTrue(self.client.ask("HELLO").startswith(b"%7\r\n"))

    def test_client(self) -> None:
        """CLIENT LIST has a line for each client in the order in which they connected."""
        other = FakeLink(self.server, 2)
        other.ask("CLIENT", "SETINFO", "lib-name", "redis-py")
        other.ask("HELLO", 3)
        (lines,) = self.client.ask_all(("CLIENT", "LIST"))
        first, second = lines.decode().splitlines()
        self.assertEqual(
            first,
            "id=1 addr=192.0.2.1:50000 laddr=192.0.2.200:6379 name= age=12 idle=3 flags=N db=0 sub=0 psub=0 multi=-1 "
            "cmd= user=default resp=2 lib-name= lib-ver=",
        )
        self.assertIn("cmd=hello user=default resp=3 lib-name=redis-py", second)

    def test_quit(self) -> None:
        """After QUIT nothing runs."""
        self.client.send(encode("PING") + encode("QUIT") + encode("PING"))
        self.assertEqual((self.client.take(), self.session.step), (b"+PONG\r\n+OK\r\n", Step.CLOSE))

    def test_reset(self) -> None:
        """RESET ends the transaction, the subscriptions, the name and the version of the protocol."""
        self.client.ask_all(("HELLO", 3, "SETNAME", "me"), ("SUBSCRIBE", "cache:products"), ("MULTI",), ("PING",))
        self.assert_mode(Mode.QUEUING)
        self.assert_asks("RESET", b"RESET")
        self.assert_mode(Mode.PLAIN)
        self.assertEqual(
            (self.session.protocol, self.session.name, self.session.channels, self.server.subscriptions.channels),
            (2, b"", frozenset(), {}),
        )
        self.assert_asks("EXEC", "ERR EXEC without MULTI")


class Password(SessionTestCase):
    password = SECRET

    def test_before_auth(self) -> None:
        """Before AUTH nothing runs but AUTH, HELLO and QUIT; limits for strangers hold for what they send."""
        for words in ("GET products:1", "PING", "MULTI", "RESET", "FOO", "SET a b", "SUBSCRIBE cache:products"):
            self.assert_asks(words, NOAUTH)
        self.assertTrue(self.client.ask("HELLO", 3).startswith(b"-NOAUTH HELLO must be called"))
        self.assert_mode(Mode.LOCKED)
        self.client.send(b"*11\r\n")
        self.assertEqual(self.client.take(), b"-ERR Protocol error: unauthenticated multibulk length\r\n")
        self.assertIs(self.session.step, Step.CLOSE)

    def test_let_in(self) -> None:
        """AUTH and HELLO let in, in a pipeline too; RESET locks again."""
        for words in (("AUTH", SECRET), ("AUTH", "default", SECRET), ("HELLO", 2, "AUTH", "default", SECRET)):
            self.client.send(encode(*words) + encode("GET", "products:1"))
            self.assertTrue(self.client.take().endswith(document(1, 1) + b"\r\n"))
            self.assert_mode(Mode.PLAIN)
            self.assertEqual(self.client.ask("RESET"), b"+RESET\r\n")
            self.assert_mode(Mode.LOCKED)

    def test_wrong(self) -> None:
        """A wrong password waits, and so does the rest of the pipeline; the user counts too."""
        for words in (("AUTH", "wrong"), ("AUTH", "other", SECRET), ("HELLO", 3, "AUTH", "default", "wrong")):
            self.client.send(encode(*words) + encode("PING"))
            self.assertEqual((self.client.take(), self.client.is_waiting), (b"", True))
            self.clock.advance(SHORT_WAIT_S)
            answers = parsed(self.client.take())
            self.assertEqual(answers, ["WRONGPASS invalid username-password pair or user is disabled.", NOAUTH], words)
        self.assertEqual(self.server.port.rejected["auth_failed"], 3)

    def test_too_many_guesses(self) -> None:
        """While many guesses of an address wait, not even the right password is compared."""
        while not self.server.passwords.is_full("192.0.2.1"):
            self.server.passwords.throttle.failed("192.0.2.1")
        self.client.send(encode("AUTH", SECRET))
        self.clock.advance(LONG_WAIT_S)
        self.assertTrue(self.client.take().startswith(b"-WRONGPASS too many wrong passwords from this address"))
        self.assertEqual(FakeLink(self.server, 2).ask("AUTH", SECRET), b"+OK\r\n")

    def test_a_new_password(self) -> None:
        """A password that its file has by now is let in after the file has been read."""
        self.looking = Deferred()
        self.client.send(encode("AUTH", "new") + encode("PING"))
        self.server.password.replace("new")
        self.looking.callback(None)
        self.assertEqual(self.client.take(), b"+OK\r\n+PONG\r\n")

    def test_syntax(self) -> None:
        """AUTH takes one or two words."""
        self.assert_asks("AUTH", "ERR wrong number of arguments for 'auth' command")
        self.assert_asks("AUTH a b c", "ERR syntax error")


class Transactions(SessionTestCase):
    def test_exec(self) -> None:
        """Queued commands run at EXEC, and the reply of each is in its place, errors too."""
        answers = self.client.ask_all(
            ("MULTI",), ("GET", "products:1"), ("STRLEN", "products"), ("ping",), ("EXEC",), ("EXEC",)
        )
        self.assertEqual(answers[:4], [b"OK", b"QUEUED", b"QUEUED", b"QUEUED"])
        self.assertEqual(answers[4][0], document(1, 1))
        self.assertTrue(str(answers[4][1]).startswith("WRONGTYPE"))
        self.assertEqual(answers[4][2:], [b"PONG"])
        self.assertEqual(answers[5], "ERR EXEC without MULTI")

    def test_discard(self) -> None:
        """DISCARD drops the queue."""
        self.assert_asks("DISCARD", "ERR DISCARD without MULTI")
        self.assertEqual(self.client.ask_all(("MULTI",), ("PING",), ("DISCARD",)), [b"OK", b"QUEUED", b"OK"])
        self.assert_mode(Mode.PLAIN)

    def test_nested(self) -> None:
        """MULTI within MULTI is an error that breaks nothing."""
        answers = self.client.ask_all(("MULTI",), ("MULTI",), ("PING",), ("EXEC",))
        self.assertEqual(answers[1], "ERR MULTI calls can not be nested")
        self.assertEqual(answers[3], [b"PONG"])

    def test_broken(self) -> None:
        """A command that cannot be queued aborts the transaction: unknown, of the wrong length, or not allowed."""
        for words in (
            ("FOO",),
            ("GET",),
            ("SET", "a", "b"),
            ("AUTH", "x"),
            ("HELLO",),
            ("SUBSCRIBE", "cache:products"),
            ("DISCARD", "x"),
            ("MULTI", "x"),
            ("RESET", "x"),
        ):
            answers = self.client.ask_all(("MULTI",), words, ("PING",), ("EXEC",), ("PING",))
            self.assertIsInstance(answers[1], str, words)
            self.assertEqual(answers[3], "EXECABORT Transaction discarded because of previous errors.", words)
            self.assertEqual(answers[4], b"PONG")

    def test_exec_with_words(self) -> None:
        """EXEC with more words ends the transaction."""
        aborted = "EXECABORT Transaction discarded because of: wrong number of arguments for 'exec' command"
        answers = self.client.ask_all(("EXEC", "x"), ("MULTI",), ("PING",), ("EXEC", "x"), ("EXEC",))
        self.assertEqual(answers, [aborted, b"OK", b"QUEUED", aborted, "ERR EXEC without MULTI"])

    def test_one_moment(self) -> None:
        """A transaction that takes several turns reads the snapshots of its beginning, whatever is published."""
        commands = [("GET", "products:1")] * (COMMANDS_PER_TURN + 10)
        self.client.ask_all(("MULTI",), *commands)
        self.session.feed(encode("EXEC"))
        self.session.work()
        self.assertIs(self.session.step, Step.ANSWER)
        pieces: Any = self.session.take_pending()
        begun = next(pieces)
        publish(self.cache, "products", range(20))
        (answers,) = parsed(begun + b"".join(pieces))
        self.assertEqual(answers, [document(1, 1)] * len(commands))


class Subscriptions(SessionTestCase):
    def test_messages(self) -> None:
        """A publish is a message of the version of the client's protocol; those of a choked client wait."""
        three = FakeLink(self.server, 2)
        three.ask("HELLO", 3)
        for client in (self.client, three):
            client.ask("SUBSCRIBE", "cache:products")
        self.client.is_choked = True
        publish(self.cache, "products", range(1))
        self.assertEqual(self.client.take(), b"")
        self.assertTrue(three.take().startswith(b">3\r\n$7\r\nmessage\r\n$14\r\ncache:products\r\n"))
        self.client.is_choked = False
        self.client.deliver()
        self.assertTrue(self.client.take().startswith(b"*3\r\n$7\r\nmessage\r\n"))

    def test_allowed(self) -> None:
        """In version 2 a subscriber may only manage its subscriptions; in version 3 it may do anything."""
        self.assert_asks(
            "SUBSCRIBE cache:nope", "ERR unknown channel 'cache:nope'; there is cache:NAME for each dataset"
        )
        self.assert_mode(Mode.PLAIN)
        self.client.ask("SUBSCRIBE", "cache:products", "cache:empty")
        self.assert_mode(Mode.SUBSCRIBED)
        self.assertTrue(self.client.ask("GET", "products:1").startswith(b"-ERR Can't execute 'get': only"))
        self.assertTrue(self.client.ask("MULTI").startswith(b"-ERR Can't execute 'multi': only"))
        self.assert_asks("PING hi", [b"pong", b"hi"])
        self.assertEqual(
            parsed(self.client.ask("UNSUBSCRIBE")),
            [[b"unsubscribe", b"cache:empty", 1], [b"unsubscribe", b"cache:products", 0]],
        )
        self.assert_mode(Mode.PLAIN)
        self.assert_asks("UNSUBSCRIBE", [b"unsubscribe", None, 0])
        self.client.ask_all(("HELLO", 3), ("SUBSCRIBE", "cache:products"))
        self.assert_mode(Mode.PLAIN)
        self.client.ask("HELLO", 2)
        self.assert_mode(Mode.SUBSCRIBED)

    def test_a_subscriber_that_does_not_read(self) -> None:
        """It is dropped when a thousand messages wait."""
        self.client.ask("SUBSCRIBE", "cache:empty")
        self.client.is_choked = True
        for _ in range(1001):
            self.assertFalse(self.client.was_dropped)
            publish(self.cache, "empty", range(0))
        self.assertTrue(self.client.was_dropped)


class Pipelines(SessionTestCase):
    commands: tuple[Words, ...] = (
        ("GET", "products:1"),
        ("get", "products:2"),
        ("GeT", "products:3"),
        ("GET", "products:nope"),
        ("GET", "nope:1"),
        ("GET",),
        ("PING",),
        ("MGET", "products:5", "nope"),
        ("MULTI",),
        ("GET", "products:4"),
        ("EXEC",),
        ("HGETALL", "products"),
        ("HGET", "products", "7"),
    )

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 10**9))
    def test_however_it_is_cut(self, seed: int) -> None:
        """A pipeline has the same replies in one piece, in any pieces, and command by command."""
        data = b"".join(encode(*words) for words in self.commands)
        whole, cut, single = (FakeLink(self.server, number) for number in (2, 3, 4))
        whole.send(data)
        choose, at = Random(seed), 0
        while at < len(data):
            size_bytes = choose.randrange(1, 60)
            cut.send(data[at : at + size_bytes])
            at += size_bytes
        for words in self.commands:
            single.send(encode(*words))
        self.assertEqual(whole.take(), single.received)
        self.assertEqual(cut.received, single.received)

    def test_turns(self) -> None:
        """A turn runs so many commands, or so many bytes of replies and one more; each is counted once."""
        self.session.feed(encode("PING") * 1000)
        self.assertEqual((len(self.session.work()), self.session.step), (COMMANDS_PER_TURN, Step.MORE))
        self.client.go_on()
        self.assertEqual(
            (self.client.take(), self.session.step), (b"+PONG\r\n" * (1000 - COMMANDS_PER_TURN), Step.READ)
        )
        self.assertEqual(self.server.commands_processed, 1000)
        publish(self.cache, "empty", range(1))
        dataset = self.cache.dataset("products")
        size_bytes = len(document(1, 1))
        many = BYTES_PER_TURN // size_bytes + 100
        for command in (("GET", "products:1"), ("HGET", "products", "1")):
            hits = dataset.counts.resp.hits
            self.session.feed(encode(*command) * many)
            self.client.go_on()
            self.assertEqual(len(parsed(self.client.take())), many)
            self.assertEqual(dataset.counts.resp.hits - hits, many)

    def test_large_documents(self) -> None:
        """GETs that exceed a turn end it, and the rest is answered and counted in later ones."""
        rows = [("ECHO", b"x" * (BYTES_PER_TURN // 2))] * 5
        self.session.feed(b"".join(encode(*words) for words in rows))
        self.assertEqual((len(self.session.work()), self.session.step), (2, Step.MORE))
        self.assertEqual((len(self.session.work()), self.session.step), (2, Step.MORE))
        self.assertEqual((len(self.session.work()), self.session.step), (1, Step.READ))

    def test_a_violation(self) -> None:
        """Bytes that are not a request end the session, after the replies before them."""
        self.client.send(encode("PING") + b"*1\r\n:1\r\n" + encode("PING"))
        self.assertEqual(self.client.take(), b"+PONG\r\n-ERR Protocol error: expected '$', got ':'\r\n")
        self.assertEqual((self.session.step, self.server.port.rejected["protocol_error"]), (Step.CLOSE, 1))

    def test_too_big(self) -> None:
        """A request that does not end within 64 MiB is refused when they have come."""
        self.client.send(b"*2\r\n$3\r\nGET\r\n$500000000\r\n")
        self.assertTrue(self.session.is_within_request)
        violation = self.assertRaises(ProtocolViolation, self.session.feed, b"x" * (64 << 20))
        self.assertEqual(self.session.refuse(violation), b"-ERR Protocol error: too big request\r\n")

    def test_another_protocol(self) -> None:
        """What an HTTP client sends ends the connection at once."""
        for line in (b"POST / HTTP/1.1\r\n", b"Host: localhost\r\n"):
            client = FakeLink(self.server, 2)
            client.send(line + encode("PING"))
            self.assertIs(client.session.step, Step.ABORT)

    def test_a_bug(self) -> None:
        """A command that raises is answered and logged, and the session goes on."""

        def broken(*_: Any) -> bytes:
            raise ZeroDivisionError

        self.patch(self.server.table, "by_word", {b"ECHO": Command("echo", broken, 2)})
        answers = self.client.ask_all(("ECHO", "a"), ("PING",))
        self.assertEqual(answers, ["ERR internal error; its traceback is in the log", b"PONG"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
