"""Renders the output of `cacheservice status` with rich.

The problems come first and in full, then all datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cacheservice.cli.asking import Address, Answer
from cacheservice.cli.problems import Problem, Severity, next_attempt, problems, standby_words
from cacheservice.ports.report import duration, times

MOST_WRITTEN_OUT = 8
"""Further problems are only counted; the table below lists them all."""

_LINES_OF_A_PROBLEM = 6
_OTHER_LINES = 8
"""The head, two problems of the service, the table's head, and the empty lines between them."""

_BLOCKED = "It was blocked: "
_TO_DO = "What to do: "

_STATE_STYLES = {"fresh": "green", "stale": "yellow", "expired": "bold red", "never_loaded": "bold red"}
_SEVERITY_STYLES = {Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"}


class Picture(NamedTuple):
    """An answer, and for datasets with a problem the sentences of `why`."""

    address: Address
    answer: Answer
    advice: Mapping[str, tuple[str, ...]]
    names: Collection[str] = ()

    @property
    def shown(self) -> dict[str, Mapping[str, Any]]:
        """The datasets of the answer, or the requested ones."""
        return {name: dataset for name, dataset in self.answer.datasets.items() if not self.names or name in self.names}


def render(picture: Picture, width: int, *, bars: bool, height: int | None = None) -> RenderableType:
    """Render the status.

    :param width: of the terminal, in columns.
    :param bars: whether it can show bars; a pipe cannot.
    :param height: of the screen, in lines, if it is redrawn continuously: content that does not fit is omitted.
    """
    found = problems(picture.answer, picture.names)
    parts: list[RenderableType] = [_head(picture)]
    loading = _loading(picture, bars=bars)
    if found:
        most = MOST_WRITTEN_OUT
        if height is not None:
            # The lines that the table leaves, or half of the screen if the table would fill it.
            left = height - len(picture.shown) - loading.row_count - _OTHER_LINES
            lines = left if left >= _LINES_OF_A_PROBLEM else height // 2
            most = max(1, min(most, lines // _LINES_OF_A_PROBLEM))
        parts += ["", *_written_out(found, picture.advice, most)]
    if loading.row_count:
        parts += ["", loading]
    return Group(*parts, "", _table(picture, found, width, height))


def _head(picture: Picture) -> Text:
    service, postgres = picture.answer.facts["service"], picture.answer.facts["postgres"]
    head = Text(f"cacheservice {service['version']} at {picture.address}: ")
    head.append("ready" if service["ready"] else "NOT READY", "bold green" if service["ready"] else "bold red")
    head.append(", PostgreSQL ")
    head.append(postgres["state"], {"up": "green", "down": "bold red"}.get(postgres["state"], "yellow"))
    head.append(f", up {duration(service['uptime_s'])}")
    if postgres["listening"]:
        head.append(", listening")
    if standby := standby_words(picture.answer):
        head.append(", ")
        head.append(standby, "yellow" if postgres["standby"]["problem"] else "")
    return head


def _written_out(
    found: Collection[Problem], advice: Mapping[str, tuple[str, ...]], most: int
) -> Iterator[RenderableType]:
    """Yield all problems of the service, and at most `most` problems of datasets."""
    of_datasets = [problem for problem in found if problem.dataset]
    for problem in [*(problem for problem in found if not problem.dataset), *of_datasets[:most]]:
        line = Text()
        if problem.dataset:
            line.append(f"{problem.dataset} ", "bold")
            # The word for the problem, then the figures.
            word, _, rest = problem.what.partition(",")
            line.append(word, _SEVERITY_STYLES[problem.severity])
            line.append(f",{rest}" if rest else "")
        else:
            line.append(problem.what, _SEVERITY_STYLES[problem.severity])
        yield line
        details = Table.grid(padding=(0, 1))
        details.add_column(style="dim", no_wrap=True)
        details.add_column(overflow="fold")
        for label, words in (
            ("since", [problem.since]),
            ("why", [*problem.reasons, *_after(_BLOCKED, advice.get(problem.dataset or "", ()))]),
            ("do", _after(_TO_DO, advice.get(problem.dataset or "", ()))),
            ("next", [problem.next]),
        ):
            for number, text in enumerate(filter(None, words)):
                details.add_row("" if number else label, Text(text))
        if details.row_count:
            yield Padding(details, (0, 0, 0, 2))
    if (others := len(of_datasets) - most) > 0:
        are = "datasets have problems" if others > 1 else "dataset has a problem"
        yield Text(f"and {others} more {are}; the table begins with those", "yellow")


def _after(beginning: str, sentences: Collection[str]) -> list[str]:
    return [text.removeprefix(beginning).removesuffix(".") for text in sentences if text.startswith(beginning)]


def _loading(picture: Picture, *, bars: bool) -> Table:
    """Return a progress bar for each dataset that is being read.

    The bar only moves back and forth if the number of rows is unknown.
    """
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    if bars:
        grid.add_column(width=30)
    grid.add_column(no_wrap=True, justify="right")
    for name, dataset in picture.shown.items():
        progress = dataset["progress"]
        if not progress:
            continue
        rows, expected = progress["rows"], progress["expected_rows"]
        bar = ProgressBar(total=expected or None, completed=min(rows, expected or rows), pulse=not expected)
        share = f"  {min(99, 100 * rows // expected)} %" if expected else ""
        of = f" of about {expected:,}" if expected else ""
        grid.add_row(Text(f"reading {name}", "cyan"), *([bar] if bars else []), f"{rows:,}{of} rows{share}")
    return grid


class _Column(NamedTuple):
    title: str
    cell: Callable[[str, Mapping[str, Any]], str | Text]
    right: bool = False
    least_width: int = 0
    """The least useful width of a column that may be truncated; 0 if it must not be."""


def _table(picture: Picture, found: Collection[Problem], width: int, height: int | None) -> Table:
    """Return a line for each dataset, those with problems first.

    Columns that do not fit are omitted.
    """
    shown = picture.shown
    names = list(dict.fromkeys([problem.dataset for problem in found if problem.dataset in shown] + list(shown)))
    if height is not None:
        del names[height:]
    cells = {column: [column.cell(name, shown[name]) for name in names if name is not None] for column in _COLUMNS}
    widths = {column: max(map(_width, [column.title, *texts])) for column, texts in cells.items()}
    for column in _COLUMNS:
        if column.least_width:
            others = sum(widths[other] + len(_GAP) for other in widths if other != column)
            widths[column] = min(widths[column], max(column.least_width, width - others))
    for column in _DROPPED_FIRST:
        if sum(widths.values()) + len(_GAP) * (len(widths) - 1) > width:
            del widths[column]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, len(_GAP) - 1, 0, 0), pad_edge=False, show_edge=False)
    for column, column_width in widths.items():
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            # The column of names is never truncated: a long name continues on the next line.
            max_width=column_width if column.least_width else None,
            no_wrap=column is not _COLUMNS[0],
            overflow="fold" if column is _COLUMNS[0] else "ellipsis",
        )
    for row in zip(*(cells[column] for column in widths), strict=True):
        table.add_row(*row)
    return table


def _width(cell: str | Text) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell_len(cell)


def _state(dataset: Mapping[str, Any]) -> Text:
    text = Text(dataset["state"].replace("_", " "), _STATE_STYLES.get(dataset["state"], "yellow"))
    for flag in ("held", "pinned"):
        if dataset[flag]:
            text.append(f", {flag}", "yellow")
    if dataset["consecutive_failures"]:
        text.append(", failing", "yellow")
    return text


def _next(dataset: Mapping[str, Any]) -> str:
    if dataset["progress"]:
        return "reading"
    return "waits" if dataset["refreshing"] else next_attempt(dataset) or "–"


def _last(dataset: Mapping[str, Any]) -> Text:
    last = dataset["last_attempt"]
    if last is None:
        return Text("–")
    if last["outcome"] == "failed":
        return Text(f"failed {times(dataset['consecutive_failures'])}: {last['error']}", "yellow")
    if last["outcome"] == "held":
        return Text(f"held: it {last['error']}", "yellow")
    return Text(f"{last['outcome']} in {duration(last['took_s'])}{_change(dataset)}")


def _change(dataset: Mapping[str, Any]) -> str:
    change = dataset["last_change"]
    if not change or dataset["last_attempt"]["outcome"] != "published":
        return ""
    signs = (("+", "added"), ("~", "changed"), ("-", "removed"))
    counts = " ".join(f"{sign}{change[what]:,}" for sign, what in signs if change[what])
    # A full read of the same content does not publish: without counts, the columns differ or there are no rows.
    return f" ({counts or ('no row differs' if dataset['rows'] else 'no rows')})"


_COLUMNS = (
    _Column("dataset", lambda name, _: Text(name)),
    _Column("state", lambda _, dataset: _state(dataset)),
    _Column("age", lambda _, dataset: "–" if dataset["age_s"] is None else duration(dataset["age_s"]), right=True),
    _Column("limit", lambda _, dataset: duration(dataset["max_age_s"]).replace(".00 s", " s"), right=True),
    _Column("rows", lambda _, dataset: f"{dataset['rows']:,}", right=True),
    _Column("size", lambda _, dataset: size(dataset["bytes"]), right=True),
    _Column("gen.", lambda _, dataset: str(dataset["generation"] or "–"), right=True),
    _Column("next", lambda _, dataset: _next(dataset)),
    _Column("last attempt", lambda _, dataset: _last(dataset), least_width=20),
)
_DROPPED_FIRST = tuple(
    column
    for title in ("last attempt", "size", "gen.", "limit", "rows")
    for column in _COLUMNS
    if column.title == title
)
_GAP = "  "


def size(count: int) -> str:
    """Format bytes in powers of 1024, as `du -h` does: 512 B, 1.9 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
