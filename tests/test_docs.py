"""Laws of the README and of docs/: links lead somewhere, quoted code is where they claim, commands do as shown.

docs/index.md describes how a block of commands is marked. The commands run in a folder of their own, one for each
page, with `cacheservice demo` beside them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import psutil
import pytest

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.documents import anchors
from tests.kit.paths import ROOT
from tests.kit.postgres import drop_role, fresh_database, query
from tests.update_references import PAGES, QUOTATION, quotations, updated

LIMIT_S = 60.0  # for what takes seconds on a quiet machine
PORTS = {"status": "8000", "RESP": "6380", "HTTP": "8080"}
OWNER_DSN = "postgresql://owner@db/shop"
READER_DSN = "postgresql://cache_reader@db/shop"
READER_PASSWORD = "choose-one"
PATIENCE_S = 15.0
"""The demo never rests: what is shown may be some seconds away."""
DISTURBED_PATIENCE_S = 45.0
"""Until a dataset has expired, or a refresh has waited for its lock."""

BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[^\n]*?) -->\n(?P=indent))?```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]+)\)")
MARKS = ("not run: ", "file: ", "while: ")
BARE_MARKS = ("runs until stopped", "while frozen")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """`line` is where its text begins in the page."""

    line: int
    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Those of a page in their order, without quotations of code."""
    text = page.read_text(encoding="utf-8")
    quoted = [match.span() for match in QUOTATION.finditer(text)]
    return [
        Block(
            text.count("\n", 0, match.start("text")) + 1, match["mark"] or "", match["language"], dedent(match["text"])
        )
        for match in BLOCK.finditer(text)
        if not any(begin <= match.start() < end for begin, end in quoted)
    ]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Each link of a page leads to a file that there is, and to a heading that is in it."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lost = []
    for match in LINK.finditer(text):
        path, _, anchor = match["target"].partition("#")
        if re.match(r"https?:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        is_line = re.fullmatch(r"L\d+", anchor)
        if not target.exists() or (anchor and not is_line and anchor not in anchors(target)):
            lost.append(match[0])
    assert not lost


def test_every_page_is_in_the_index() -> None:
    """Every page can be reached from docs/index.md."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"]({page.name})" not in index] == []


def test_files_that_contributors_are_sent_to() -> None:
    """Each file and folder that CONTRIBUTING.md names is there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:cacheservice|tests|benchmarks|docs|deploy|migrations)/[\w/.]*)`", text)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_names_are_there(page: Path) -> None:
    """Each setting, event, metric and function that a page names in code type is in the code, or of a library."""
    of_others = re.compile(
        "target_session_attrs|process_.*"  # libpq, prometheus-client
        "|current_date|date_trunc|log_line_prefix|pg_database_owner|temp_file_limit|work_mem"
        "|active_pid|flush_lsn|logical_decoding_work_mem|sent_lsn"  # PostgreSQL
        "|health_check_interval"  # redis-py
    )
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = set(re.findall(r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)+)`", text))
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("cacheservice", "migrations", "deploy")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sql", ".json", ".toml", ".yml", ".yaml")
    ]
    assert (
        sorted(
            name for name in named if not of_others.fullmatch(name) and not any(name in source for source in sources)
        )
        == []
    )


@each_page
def test_quoted_code_stands_there(page: Path) -> None:
    """Code that a page quotes with its file and line is at that line; python -m tests.update_references corrects it."""
    wrong = [
        quotation[:3]
        for quotation in quotations(page.read_text(encoding="utf-8"))
        if quotation.line not in quotation.found
    ]
    assert not wrong


def test_references_are_updated() -> None:
    """What python -m tests.update_references makes of a wrong number is right, and it leaves right ones alone."""
    page = ROOT / "docs" / "from-tutorial-to-production.md"
    text = page.read_text(encoding="utf-8")
    count = len(list(quotations(text)))
    assert count > 30
    assert len(re.findall(r"^\[`[\w./-]+:\d+`\]", text, re.M)) == count, "a quotation is not written as the others"
    shifted = QUOTATION.sub(_a_line_too_far, text)
    assert shifted != text
    assert updated(shifted) == text


def _a_line_too_far(quotation: re.Match[str]) -> str:
    if not (ROOT / quotation["path"]).exists():
        return quotation[0]
    line = quotation["line"]
    return (
        quotation[0].replace(f":{line}`](", f":{int(line) + 1}`](", 1).replace(f"#L{line})", f"#L{int(line) + 1})", 1)
    )


@each_page
def test_marks_are_known(page: Path) -> None:
    """No block is passed over because its mark is misspelt, or without a reason."""
    for block in blocks(page):
        is_known = block.mark in BARE_MARKS or any(
            block.mark.startswith(mark) and len(block.mark) > len(mark) for mark in MARKS
        )
        is_data = block.language in ("", "toml", "python", "js", "json", "yaml", "sql", "ini", "text")
        assert is_known or block.mark == "" or is_data, f"line {block.line}: {block.mark}"


@each_page
def test_commands_stand_in_blocks_that_are_run(page: Path) -> None:
    """No command is in a block that is not marked as commands."""
    hidden = [
        f"line {block.line}: {line}"
        for block in blocks(page)
        if block.language not in ("sh", "console") and not block.mark.startswith("not run: ")
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    assert hidden == []


# Commands


class Demo:
    """`cacheservice demo` while it runs.

    :param said: all that it printed until it printed what to try.
    """

    def __init__(self, process: subprocess.Popen[str], said: str) -> None:
        self._process = process
        self.said = said
        (self.admin_socket,) = re.findall(r"nc -NU (\S+)", said)
        (self._postmaster,) = re.findall(r"kill -QUIT (\d+)", said)
        (change,) = re.findall(r"Change: +(.*) -c ", said)
        self._psql = shlex.split(change)

    def with_its_ports(self, text: str) -> str:
        """`text` with the ports that it took where the usual ones were taken."""
        for name, usual in PORTS.items():
            taken = re.search(rf"the {name} port is (\d+) instead", self.said)
            if taken is None:
                continue
            text = re.sub(rf"\b{usual}\b", taken[1], text)
            if name == "status":
                text = re.sub(r"\bcacheservice (status|why|tail)\b", rf"cacheservice \1 --port {taken[1]}", text)
        return text

    @contextlib.contextmanager
    def within(self, sql: str) -> Iterator[None]:
        """While a session of its database is within the transaction that `sql` begins."""
        command = [*self._psql, "-c", f"{sql}; SELECT pg_sleep(600)"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as psql:
            try:
                yield
            finally:
                psql.send_signal(signal.SIGINT)  # by which psql ends what the server does; at its own end it would not
                psql.communicate()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While its PostgreSQL stands still, all processes of it."""
        postmaster = psutil.Process(int(self._postmaster))
        postmaster.suspend()  # first, so that it starts no more of them
        family = [*postmaster.children(recursive=True), postmaster]
        try:
            _each_that_lives(family, "suspend")
            yield
        finally:
            _each_that_lives(family, "resume")


def _each_that_lives(processes: list[psutil.Process], action: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            getattr(process, action)()


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    # Into a file: nobody reads a pipe while the pages' commands run.
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as output:
        command = [sys.executable, "-u", "-m", "cacheservice", "demo"]
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True) as process:
            try:
                limit = time.monotonic() + 2 * LIMIT_S
                while "Ctrl-C stops everything." not in (said := Path(output.name).read_text(encoding="utf-8")):
                    assert process.poll() is None, said
                    assert time.monotonic() < limit, said
                    time.sleep(0.1)
                yield Demo(process, said)
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(LIMIT_S)


class Folder:
    """Where the commands of a page run, with what a checkout has that they name."""

    def __init__(self, path: Path, demo: Demo, substitutes: dict[str, str]) -> None:
        self.path = path
        self._demo = demo
        self._substitutes = substitutes
        for name in ("deploy", "tac"):
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("secrets"))
        (path / "admin.sock").symlink_to(demo.admin_socket)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{self._environment['PATH']}"
        self._environment["FAKETTY"] = "1"  # redis-cli prints as it does in a terminal

    def real(self, text: str) -> str:
        """`text` with what stands for something else in the pages."""
        for shown, real in self._substitutes.items():
            text = text.replace(shown, real)
        return self._demo.with_its_ports(text)

    def run(self, script: str) -> tuple[int, str]:
        """Run a script of the shell; its exit code, and what it printed. What it exports, the next one has."""
        kept = self.path / ".exported"
        whole = f"set -eu\nif [ -f {kept} ]; then . {kept}; fi\n{self.real(script)}\nexport -p > {kept}\n"
        done = subprocess.run(
            ["bash", "-c", whole],
            check=False,
            cwd=self.path,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        return done.returncode, done.stdout

    def run_until_stopped(self, script: str) -> None:
        """Start the service, wait until it has read something, and stop it in order."""
        any_port = {f"CACHESERVICE_{name}__PORT": "0" for name in ("STATUS", "RESP", "HTTP")}
        with subprocess.Popen(
            ["bash", "-c", f"exec env {self.real(script)}"],
            cwd=self.path,
            env=self._environment | any_port,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as service:
            said, limit = "", time.monotonic() + LIMIT_S
            try:
                assert service.stdout is not None
                while "refresh_published" not in said:
                    line = service.stdout.readline()
                    assert line, said
                    assert time.monotonic() < limit, said
                    said += line
            finally:
                service.terminate()
                rest, _ = service.communicate(timeout=LIMIT_S)
        assert "service_started" in said
        assert '"event": "service_stopped"' in rest
        assert service.returncode == -signal.SIGTERM


_DATE = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d{2} \w{3} \d{4}"
_DIGEST = r"\b(?=[a-f]*\d)[0-9a-f]{8}\b"
_DURATION = r"\b\d[\d.]* (?:s|min|h|d)\b(?: \d+ (?:s|min|h)\b)?"
_NUMBER = r"\d[\d,.:]*"
_VARIED = (_DATE, _DIGEST, _DURATION, _NUMBER)
_VARYING = re.compile(f"({'|'.join(_VARIED)}|…|[ \\t]+)")


def pattern(shown: str) -> re.Pattern[str]:
    """What a shown output stands for: any numbers in the place of its numbers, … for anything, blanks for blanks.

    The same with dates, digests and durations: "up 13 s" stands for "up 3 min 5 s".
    """
    any_of = {"…": r"[^\n]*", " ": r"[ \t]+", "\t": r"[ \t]+"}
    made = ""
    for line in shown.strip("\n").split("\n"):
        if line.strip() == "…":
            made += r"(?:[^\n]*\n)*?"
            continue
        for part in filter(None, _VARYING.split(line.rstrip())):
            if part[0] in any_of:
                made += any_of[part[0]]
            else:
                made += next((each for each in _VARIED if re.fullmatch(each, part)), re.escape(part))
        made += r"[ \t]*\n"
    return re.compile(made)


def steps(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it shows."""
    for step in re.split(r"^\$ ", text, flags=re.M)[1:]:
        lines = step.split("\n")
        length = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\"))
        yield "\n".join(lines[:length]), "\n".join(lines[length:])


def run_console(folder: Folder, block: Block, patience_s: float) -> None:
    for command, shown in steps(block.text):
        wanted = pattern(folder.real(shown))
        limit = time.monotonic() + patience_s
        tries = []
        while True:
            code, printed = folder.run(command)
            tries.append(f"exit code {code}:\n{printed}")
            if code == 0 and (not shown.strip() or wanted.fullmatch(printed.strip("\n") + "\n")):
                break
            assert time.monotonic() < limit, (
                f"$ {command}\nshows:\n{shown}\nbut it was, at first {tries[0]}\nat last {tries[-1]}"
            )
            time.sleep(0.3)


@pytest.fixture
def folder(
    tmp_path: Path, demo: Demo, postgres_server: EmbeddedPostgres, request: pytest.FixtureRequest
) -> Iterator[Folder]:
    """With a database of its own, which the pages name `postgresql://owner@db/shop`."""
    with contextlib.ExitStack() as cleanup:
        database = fresh_database(postgres_server, cleanup.callback)
        query(
            postgres_server,
            database,
            "CREATE TABLE products (id integer PRIMARY KEY, sku text, name text, price numeric);"
            "INSERT INTO products SELECT n, 'SKU-' || n, 'lamp', n FROM generate_series(1, 100) AS n",
        )
        cleanup.callback(drop_role, postgres_server, database, "cache_reader")
        yield Folder(
            tmp_path,
            demo,
            {
                OWNER_DSN: postgres_server.dsn(database=database),
                READER_DSN: postgres_server.dsn("cache_reader", READER_PASSWORD, database),
            },
        )


@each_page
def test_commands_do_what_is_shown(page: Path, folder: Folder, demo: Demo) -> None:
    """Each command of a page runs, one after the other as a reader would type them, and prints what the page shows."""
    for block in blocks(page):
        if block.mark.startswith("not run: "):
            continue
        during: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        patience_s = PATIENCE_S
        if block.mark.startswith("while"):
            _, _, sql = block.mark.partition(": ")
            during = demo.within(sql) if sql else demo.frozen()
            patience_s = DISTURBED_PATIENCE_S
        where = f"{page.relative_to(ROOT)}:{block.line}"
        with during:
            if block.mark.startswith("file: "):
                (folder.path / block.mark.removeprefix("file: ")).write_text(folder.real(block.text), encoding="utf-8")
            elif block.mark == "runs until stopped":
                folder.run_until_stopped(block.text)
            elif block.language == "console":
                run_console(folder, block, patience_s)
            elif block.language == "sh":
                code, printed = folder.run(block.text)
                assert code == 0, f"{where}: {printed}"
            elif block.language == "python":
                (folder.path / "example.py").write_text(folder.real(block.text), encoding="utf-8")
                code, printed = folder.run(f"{sys.executable} -W error example.py")
                assert code == 0, f"{where}: {printed}"


def test_a_page_that_lies_is_found() -> None:
    """What differs from what is shown in more than its numbers does not pass."""
    shown = "products  fresh  age 3.56 s of 15 s  20,000 rows …\n…\nlast line\n"
    assert pattern(shown).fullmatch("products   fresh age 1.2 s of 15 s 19,999 rows  generation 3\nlast line\n")
    assert pattern(shown).fullmatch("products  fresh  age 3 s of 15 s  1 rows x\nmore\nand more\nlast line\n")
    assert not pattern(shown).fullmatch("products  stale  age 3.56 s of 15 s  20,000 rows x\nlast line\n")
    assert not pattern(shown).fullmatch("products  fresh  age 3.56 s of 15 s  20,000 rows x\nlast line\nmore\n")
