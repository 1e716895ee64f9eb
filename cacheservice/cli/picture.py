"""Renders the output of `cacheservice status` with rich.

The problems come first and in full, then all datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cacheservice.cli.client import Endpoint
from cacheservice.views import capture, fleet
from cacheservice.views.facts import Dataset, Facts
from cacheservice.views.problems import Problem, Severity, next_attempt, problems
from cacheservice.views.table import workers_lines
from cacheservice.views.units import duration, last_attempt, size, standby

_MOST_WRITTEN_OUT = 8
"""Further problems are only counted; the table below lists them all."""
_LINES_OF_A_PROBLEM = 6
_OTHER_LINES = 8
"""The head, two problems of the service, the table's head, and the empty lines between them."""

_STATE_STYLES = MappingProxyType(
    {"fresh": "green", "stale": "yellow", "expired": "bold red", "never_loaded": "bold red"}
)
_DATABASE_STYLES = MappingProxyType({"up": "green", "down": "bold red"})
_SEVERITY_STYLES = MappingProxyType({Severity.WARNING: "yellow", Severity.CRITICAL: "bold red"})


class Picture(NamedTuple):
    """The facts about a service, and the names of the datasets to show; without names, all."""

    endpoint: Endpoint
    facts: Facts
    names: Collection[str] = ()

    @property
    def shown(self) -> Mapping[str, Dataset]:
        return self.facts.only(self.names).datasets


def render(picture: Picture, width: int, *, bars: bool, height: int | None = None) -> RenderableType:
    """Render the status.

    :param width: of the terminal, in columns.
    :param bars: whether it can show bars; a pipe cannot.
    :param height: of the screen, in lines, if it is redrawn continuously: content that does not fit is omitted.
    """
    found = problems(picture.facts, picture.names)
    parts: list[RenderableType] = [_head(picture), *map(Text, workers_lines(picture.facts.service))]
    parts += map(Text, fleet.line(picture.shown.values()))
    loading = _loading(picture, bars=bars)
    if found:
        most = _MOST_WRITTEN_OUT
        if height is not None:
            # The lines that the table leaves, or half of the screen if the table would fill it.
            left = height - len(picture.shown) - loading.row_count - _OTHER_LINES
            lines = left if left >= _LINES_OF_A_PROBLEM else height // 2
            most = max(1, min(most, lines // _LINES_OF_A_PROBLEM))
        parts += ["", *_written_out(found, most)]
    if loading.row_count:
        parts += ["", loading]
    return Group(*parts, "", _table(picture.shown, found, width, height))


def _head(picture: Picture) -> Text:
    service, database = picture.facts.service, picture.facts.database
    head = Text(f"cacheservice {service.version} at {picture.endpoint}: ")
    head.append("ready" if service.ready else "NOT READY", "bold green" if service.ready else "bold red")
    head.append(", PostgreSQL ")
    head.append(database.state, _DATABASE_STYLES.get(database.state, "yellow"))
    head.append(f", up {duration(service.uptime_s)}")
    if database.listening:
        head.append(", listening")
    if capture.is_streaming(database.capture):
        head.append(", capturing from the log")
    if database.standby is not None:
        head.append(", ")
        head.append(standby(database.standby), "yellow" if database.standby.problem else "")
    return head


def _written_out(found: Sequence[Problem], most: int) -> Iterator[RenderableType]:
    """Yield all problems of the service, and at most `most` problems of datasets."""
    of_datasets = [problem for problem in found if problem.dataset]
    for problem in [*(problem for problem in found if not problem.dataset), *of_datasets[:most]]:
        line = Text()
        if problem.dataset:
            line.append(f"{problem.dataset} ", "bold")
        line.append(problem.what, _SEVERITY_STYLES[problem.severity])
        line.append(f", {problem.figures}" if problem.figures else "")
        yield line
        details = _details(problem)
        if details.row_count:
            yield Padding(details, (0, 0, 0, 2))
    if (others := len(of_datasets) - most) > 0:
        have = "datasets have problems; they are" if others > 1 else "dataset has a problem; it is"
        yield Text(f"and {others} more {have} at the top of the table", "yellow")


def _details(problem: Problem) -> Table:
    details = Table.grid(padding=(0, 1))
    details.add_column(style="dim", no_wrap=True)
    details.add_column(overflow="fold")
    for label, words in (
        ("since", [problem.since]),
        ("why", [*problem.reasons, *problem.blocked_by]),
        ("do", [problem.todo]),
        ("next", [problem.next]),
    ):
        for number, text in enumerate(filter(None, words)):
            details.add_row("" if number else label, Text(text))
    return details


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
        progress = dataset.progress
        if progress is None:
            continue
        rows, expected = progress.rows, progress.expected_rows
        bar = ProgressBar(total=expected or None, completed=min(rows, expected or rows), pulse=not expected)
        share = f"  {min(99, 100 * rows // expected)} %" if expected else ""
        of = f" of about {expected:,}" if expected else ""
        grid.add_row(Text(f"reading {name}", "cyan"), *([bar] if bars else []), f"{rows:,}{of} rows{share}")
    return grid


class _Column(NamedTuple):
    title: str
    cell: Callable[[Dataset], str | Text]
    right: bool = False
    least_width: int = 0
    """The least useful width of a column that may be truncated; 0 if it must not be."""


def _table(shown: Mapping[str, Dataset], found: Collection[Problem], width: int, height: int | None) -> Table:
    """Return a line for each dataset, those with problems first.

    Columns that do not fit are omitted.
    """
    with_problems = [problem.dataset for problem in found if problem.dataset is not None]
    names = list(dict.fromkeys([*with_problems, *shown]))
    if height is not None:
        del names[height:]
    is_fleet = any(dataset.fleet is not None for dataset in shown.values())
    columns = [column for column in _COLUMNS if is_fleet or column.title != _OF_A_FLEET]
    cells = {column: [column.cell(shown[name]) for name in names] for column in columns}
    widths = {column: max(map(_width, [column.title, *texts])) for column, texts in cells.items()}
    for column in columns:
        if column.least_width:
            others = sum(widths[other] + len(_GAP) for other in widths if other != column)
            widths[column] = min(widths[column], max(column.least_width, width - others))
    for column in _DROPPED_FIRST:
        if sum(widths.values()) + len(_GAP) * (len(widths) - 1) > width:
            widths.pop(column, None)
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


def _state(dataset: Dataset) -> Text:
    text = Text(dataset.state.replace("_", " "), _STATE_STYLES.get(dataset.state, "yellow"))
    for flag, is_set in (
        ("held", dataset.held is not None),
        ("pinned", dataset.pinned),
        ("failing", dataset.consecutive_failures > 0),
    ):
        if is_set:
            text.append(f", {flag}", "yellow")
    return text


def _next(dataset: Dataset) -> str:
    if dataset.progress is not None:
        return "reading"
    return "waits" if dataset.refreshing else next_attempt(dataset) or "–"


def _last(dataset: Dataset) -> Text:
    words = last_attempt(dataset)
    if not words:
        return Text("–")
    assert dataset.last_attempt is not None
    if dataset.last_attempt.outcome in ("failed", "held"):
        return Text(words, "yellow")
    return Text(f"{words}{_change(dataset)}")


def _change(dataset: Dataset) -> str:
    last, change = dataset.last_attempt, dataset.last_change
    if last is None or last.outcome != "published" or change is None:
        return ""
    signs = (("+", change.added), ("~", change.changed), ("-", change.removed))
    counts = " ".join(f"{sign}{count:,}" for sign, count in signs if count)
    # A full read of the same content does not publish: without counts, the columns differ or there are no rows.
    return f" ({counts or ('no row differs' if dataset.rows else 'no rows')})"


_OF_A_FLEET = "fleet"
_COLUMNS = (
    _Column("dataset", lambda dataset: Text(dataset.name)),
    _Column("state", _state),
    _Column("age", lambda dataset: "–" if dataset.age_s is None else duration(dataset.age_s), right=True),
    _Column("limit", lambda dataset: duration(dataset.max_age_s).replace(".00 s", " s"), right=True),
    _Column("rows", lambda dataset: f"{dataset.rows:,}", right=True),
    _Column("size", lambda dataset: size(dataset.bytes), right=True),
    _Column("gen.", lambda dataset: str(dataset.generation or "–"), right=True),
    _Column(_OF_A_FLEET, lambda dataset: fleet.cell(dataset.fleet)),
    _Column("next", _next),
    _Column("last attempt", _last, least_width=20),
)
_DROPPED_FIRST = tuple(
    column
    for title in ("last attempt", "size", "gen.", "limit", "rows", _OF_A_FLEET)
    for column in _COLUMNS
    if column.title == title
)
_GAP = "  "
