"""Explains the state of one dataset in sentences: `why` on the status port, over HTTP and in the dashboard."""

from __future__ import annotations

from collections.abc import Iterator

from cacheservice.views import capture, fleet
from cacheservice.views.facts import Database, Dataset, Details, Rejection
from cacheservice.views.units import duration, lag, plural, rejected, times


def sentences(details: Details, database: Database, rejection: Rejection | None = None) -> list[str]:
    """Return sentences about the state, its cause, any blockers and the next step."""
    dataset, settings = details.dataset, details.settings
    sentences = [*_state(details), *_standby(dataset), *fleet.sentences(dataset.name, dataset.fleet)]
    sentences += [*_failure(details), *_operators(details)]
    sentences += filter(None, [_arrival(details, database)])
    if settings.watch:
        sentences += capture.sentences(dataset, database.capture, details.without_deltas_because)
        sentences += _deltas(details, database)
    if details.differences:
        are = "row that differs" if details.differences == 1 else "rows that differ"
        sentences.append(
            f"Since the start, full reads have found and corrected {details.differences:,} {are} without a recorded "
            "change. The log names some of the keys (delta_differences). Check that all tables of the query are "
            "watched."
        )
    sentences += _next(details)
    if rejection is not None:
        sentences.append(f"The newest configuration is not in effect. It was {rejected(rejection)}.")
    return sentences


def _arrival(details: Details, database: Database) -> str | None:
    """Describe how the service learns of changes; None if that is the stream from the write-ahead log alone."""
    settings, from_log = details.settings, details.dataset.capture == "logical"
    if from_log and capture.is_streaming(database.capture):
        return of_applications(database) if settings.notify else None
    if not (settings.notify or settings.watch):
        return None
    return listening(database, deltas_work=details.without_deltas_because is None and not from_log)


def of_applications(database: Database) -> str | None:
    """Describe whether notifications arrive besides the stream of changes; None if no dataset waits for them."""
    if not database.listening_wanted:
        return None
    if database.listening and database.listening_proven_s is not None:
        tested = f"tested {duration(database.listening_proven_s)} ago"
        return f"Notifications of applications arrive as well: the service is listening, {tested}."
    if database.listening_problem is None:
        return "The service is not listening to notifications of applications yet."
    return f"Notifications of applications do not arrive: {database.listening_problem}."


def listening(database: Database, *, deltas_work: bool = True) -> str | None:
    """Describe whether notifications arrive; None if no dataset waits for them.

    :param deltas_work: if not, some changes cause no notification.
    """
    if not database.listening_wanted:
        return None
    if database.listening and database.listening_proven_s is not None:
        tested = f"tested {duration(database.listening_proven_s)} ago"
        if not deltas_work:
            return f"The service is listening, {tested}, but it may see some changes only at the next interval."
        return f"Changes arrive as notifications: the service is listening, {tested}."
    if database.listening_problem is None:
        return "The service is not listening yet; until then, the dataset is refreshed at its interval."
    return (
        f"Notifications do not arrive: {database.listening_problem}. Until they do, the dataset is refreshed at its "
        "interval."
    )


def _state(details: Details) -> Iterator[str]:
    dataset, settings = details.dataset, details.settings
    if dataset.age_s is None or dataset.as_of is None:
        yield f"{dataset.name} has never been loaded, so readers get nothing from it yet."
        return
    age = f"it is {duration(dataset.age_s)} old, the limit is {duration(dataset.max_age_s)}"
    served = "Readers get the last good snapshot."
    if dataset.state == "fresh":
        yield f"{dataset.name} is fresh: {age}."
    elif dataset.state == "stale":
        yield f"{dataset.name} is stale: {age}; its interval is {duration(dataset.interval_s)}. {served}"
    else:
        refused = settings.on_expired == "refuse"
        yield f"{dataset.name} is expired: {age}. {'Readers get an error.' if refused else served}"
    yield (
        f"Generation {dataset.generation} with {plural(dataset.rows, 'row')} is served, "
        f"as of {dataset.as_of.isoformat(timespec='seconds')} by the database's clock."
    )
    if dataset.age_uncertain is not None:
        yield f"Its age is uncertain until the next refresh: {dataset.age_uncertain}."
    if details.redefined:
        yield "It is the result of the query and key before the last reload; the new ones have not been read yet."
    if (change := dataset.last_change) is not None:
        yield f"Its publish added {change.added:,}, changed {change.changed:,} and removed {change.removed:,} rows."
    how = details.attempts[-1].how if details.attempts else ""
    if (settings.watch or settings.notify or settings.probe) and how:
        yield f"The last attempt read {how}."


def _standby(dataset: Dataset) -> Iterator[str]:
    if dataset.standby is not None:
        behind, problem = lag(dataset.standby), dataset.standby.problem
        yield f"It was read from a standby that is {behind}, which its age includes: {problem}."


def _failure(details: Details) -> Iterator[str]:
    dataset = details.dataset
    last = dataset.last_attempt
    if last is not None and last.outcome == "failed":
        ago = duration(details.last_ended_s or 0.0)
        yield f"The last attempt failed {ago} ago, after {duration(last.took_s)}: {last.error}."
        if dataset.consecutive_failures > 1:
            yield f"It has failed {times(dataset.consecutive_failures)} in a row."
        for blocker in dataset.blocked_by:
            yield f"It was blocked: {blocker}."
        if dataset.advice:
            yield f"What to do: {dataset.advice}."
    if dataset.held is not None:
        yield f"The newest result has been held for {duration(details.held_for_s)}: it {dataset.held.reason}."
        if dataset.advice and last is not None and last.outcome == "held":
            yield f"What to do: {dataset.advice}."
    if dataset.save_problem is not None:
        yield f"It could not be saved: {dataset.save_problem}. A restart would begin with the snapshot saved before."
    if details.missed_ticks:
        were = "refresh was" if details.missed_ticks == 1 else "refreshes were"
        yield f"{details.missed_ticks:,} scheduled {were} skipped, because the previous one was still running."


def _operators(details: Details) -> Iterator[str]:
    """Yield what operators have commanded."""
    name, rows = details.dataset.name, details.candidate_rows
    if details.dataset.pinned:
        newest = "" if rows is None else f"; a result with {plural(rows, 'row')} waits for 'unpin {name}'"
        yield f"It is pinned by an operator: nothing newer is served{newest}."
    if details.rolled_back_to is not None:
        yield f"It was rolled back to the saved generation {details.rolled_back_to}."
    if details.accepts_next:
        yield "The next result is published even if a gate refuses it, because an operator accepted it."


def _deltas(details: Details, database: Database) -> Iterator[str]:
    if details.without_deltas_because is not None:
        whole_for = duration(details.dataset.without_deltas_s or 0.0)
        yield f"Deltas do not work: all rows have been read for {whole_for}, because {details.without_deltas_because}."
    if database.prune_problem is not None:
        yield f"Old recorded changes are not deleted and pile up in the database: {database.prune_problem}."


def _next(details: Details) -> Iterator[str]:
    dataset = details.dataset
    if (progress := dataset.progress) is not None:
        of = "" if progress.expected_rows is None else f" of about {progress.expected_rows:,}"
        yield f"A refresh is running now and has read {progress.rows:,}{of} rows."
    elif dataset.behind_s is not None:
        yield (
            f"A refresh has been due for {duration(dataset.behind_s)} and waits, because refreshes have used the time "
            f"that postgres.max_load allows; the interval of {duration(dataset.interval_s)} is stretched by as much."
        )
    elif dataset.refreshing:
        yield "A refresh is due now and waits for one of the postgres.max_connections connections."
    if details.last_put_off_s:
        yield f"Its last refresh began {duration(details.last_put_off_s)} late, delayed by postgres.max_load."
    if dataset.next_refresh_in_s is not None:
        yield f"The next attempt starts in {duration(dataset.next_refresh_in_s)}."
