"""Laws of the table of commands: `command_docs.json` describes the same commands in the same way."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.ports.resp.command_docs import catalogue
from cacheservice.ports.resp.commands import COMMANDS
from cacheservice.ports.resp.server import InMulti, Table


class Commands(SynchronousTestCase):
    def test_catalogue(self) -> None:
        """Each command has its entry, and no entry is without its command; the arity is the one that is checked."""
        entries = {entry.name: entry.arity for entry in catalogue().entries.values()}
        self.assertEqual({command.name: command.arity for command in COMMANDS}, entries)
        self.assertEqual(len(COMMANDS), len(entries), "each is listed once")

    def test_no_write(self) -> None:
        """No command is one of those that write."""
        self.assertEqual({command.name.encode() for command in COMMANDS} & catalogue().writes, set())

    def test_without_password(self) -> None:
        """The catalogue's flag no_auth is on the commands that run before AUTH, except RESET, which Redis allows."""
        flagged = {entry.name for entry in catalogue().entries.values() if "no_auth" in entry.flags}
        self.assertEqual({command.name for command in COMMANDS if command.without_password}, flagged - {"reset"})

    def test_words(self) -> None:
        """The limits of words follow from the arity."""
        for command in COMMANDS:
            exact = command.arity > 0
            self.assertEqual((command.least, command.most == command.least), (abs(command.arity), exact), command.name)

    def test_in_multi(self) -> None:
        """What changes the session as a whole is not queued."""
        by_fate = {fate: {each.name for each in COMMANDS if each.in_multi is fate} for fate in InMulti}
        self.assertEqual(by_fate[InMulti.RUNS], {"multi", "exec", "discard", "reset", "quit"})
        self.assertEqual(by_fate[InMulti.REFUSED], {"subscribe", "unsubscribe", "auth", "hello"})

    def test_spellings(self) -> None:
        """Commands are found in capitals and in small letters."""
        table = Table(COMMANDS)
        self.assertIs(table.by_word[b"HGET"], table.by_word[b"hget"])
        self.assertEqual(len(table.by_word), 2 * len(COMMANDS))
