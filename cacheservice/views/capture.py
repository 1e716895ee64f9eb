"""Words for change capture from the write-ahead log: a part of the head line, a problem, and sentences for `why`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from cacheservice.views.facts import Capture, Dataset
from cacheservice.views.units import duration


def is_streaming(capture: Capture | None) -> bool:
    """Return whether changes are read from the log now."""
    return capture is not None and capture.state == "streaming"


def problem(capture: Capture | None, datasets: Collection[Dataset]) -> str | None:
    """Return why nothing is streamed; None if that is not a problem.

    If logical decoding is impossible and triggers record the changes of all watched datasets, nobody has set it up:
    the ordinary case of a service with triggers.
    """
    if capture is None or is_streaming(capture) or _is_not_set_up(capture, datasets):
        return None
    return capture.problem


def in_short(capture: Capture | None, datasets: Collection[Dataset]) -> str:
    """Return the part of the head line; empty if there is nothing to see."""
    if capture is None or _is_not_set_up(capture, datasets):
        return ""
    if is_streaming(capture):
        return "capturing from the log"
    return f"NOT capturing from the log{f': {capture.problem}' if capture.problem else ' yet'}"


def sentences(dataset: Dataset, capture: Capture | None, without_deltas_because: str | None) -> Iterator[str]:
    """Yield sentences about a dataset with `watch`: how changes of its tables are found, and why not from the log.

    :param without_deltas_because: why the last read could not be a delta, which is a sentence of its own.
    """
    now = None if capture is None or is_streaming(capture) else capture.problem
    if dataset.capture == "triggers":
        why = now or dataset.not_logical
        reason = "" if why is None or capture is None else f", not read from the write-ahead log: {why}"
        yield f"Changes of its tables are recorded by triggers{reason}."
        return
    if dataset.capture == "logical" and capture is not None and is_streaming(capture):
        behind = f"slot {capture.slot}, {duration(capture.lag_s)} behind"
        yield f"Changes of its tables are read from the write-ahead log ({behind})."
    elif dataset.capture == "logical":
        yield "Changes of its tables were read from the write-ahead log until the last refresh."
    if now is not None and now not in (without_deltas_because or ""):
        yield (
            f"The write-ahead log cannot be read now: {now}. Until it can, a refresh reads all rows, or those that "
            "triggers have recorded."
        )


def _is_not_set_up(capture: Capture, datasets: Collection[Dataset]) -> bool:
    """Return whether triggers do what logical decoding cannot; `starting` is each new look whether it can."""
    ways = {dataset.capture for dataset in datasets if dataset.capture is not None}
    return capture.state in ("impossible", "starting") and ways <= {"triggers"}
