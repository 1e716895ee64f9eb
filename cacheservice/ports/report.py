"""Renders the replies of the status port from the cache alone.

They contain no DSN, password or rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

from tabulate import tabulate

from cacheservice import __version__
from cacheservice.cache.cache import Cache, ConnectionCap, DatabaseStatus, Rejection
from cacheservice.cache.dataset import Dataset, State
from cacheservice.cache.describe import describe, describe_attempt, describe_blocker, describe_dataset, in_short
from cacheservice.cache.history import Attempt
from cacheservice.config import ConfigFile


def ready_line(cache: Cache) -> str:
    """Return `ready`, or `notready` with the reasons.

    The reasons are `stopping`, `NAME:never_loaded` and `NAME:expired`.
    """
    if cache.is_ready:
        return "ready"
    reasons = ["stopping"] if cache.stopping else []
    return " ".join(["notready", *reasons, *(f"{name}:{state}" for name, state in cache.not_ready().items())])


def status_table(cache: Cache, only: Dataset | None = None) -> str:
    """Return a head line, then an aligned line for each dataset, or for `only`."""
    database = cache.database
    head = (
        f"cacheservice {__version__}: {_readiness(cache)}, "
        f"PostgreSQL {database.state}, up {duration(cache.now() - cache.started_at)}"
        f"{_file_words(cache.config_file)}{_cap_words(cache.connection_cap)}{_lag_words(database)}{_listening_words(database)}"
    )
    if cache.rejection is not None:
        head += f", configuration {_rejected(cache.rejection, cache)}"
    rows = [_status_row(dataset) for dataset in ([only] if only is not None else cache.datasets.values())]
    table = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=("left", "left", "left", "right"))
    return f"{head}\n{_without_trailing_blanks(table)}"


def _file_words(file: ConfigFile | None) -> str:
    if file is None or file.modified_at is None:
        return ""
    return f", configuration of {file.modified_at:%Y-%m-%d %H:%M:%S} UTC"


def _cap_words(cap: ConnectionCap | None) -> str:
    if cap is None:
        return ""
    return f", {capped(cap)}"


def capped(cap: ConnectionCap) -> str:
    """Describe why fewer clients may connect than configured."""
    return f"clients capped at {cap.limit:,} of {cap.configured:,} by the limit of {cap.open_files:,} open files"


def _readiness(cache: Cache) -> str:
    return "stopping" if cache.stopping else "ready" if cache.is_ready else "not ready"


def _lag_words(database: DatabaseStatus) -> str:
    if database.server is None or not database.server.in_recovery:
        return ""
    lag = database.lag
    if not lag.problem:
        return ", a standby"
    return f", a standby {behind(lag.seconds, known=lag.known)}: {lag.problem}"


def behind(lag_s: float, *, known: bool) -> str:
    """Describe how far a standby may be behind its primary."""
    return f"{'' if known else 'perhaps '}up to {duration(lag_s)} behind"


def _listening_words(database: DatabaseStatus) -> str:
    if not database.listening_wanted:
        return ""
    if database.listening:
        return ", listening"
    return f", NOT listening: {database.listening_problem}" if database.listening_problem else ", NOT listening yet"


def _rejected(rejection: Rejection, cache: Cache) -> str:
    return f"rejected {duration(cache.now() - rejection.at)} ago: {in_short(rejection.problems)}"


def _status_row(dataset: Dataset) -> list[str]:
    settings, age_s = dataset.settings, dataset.age_s()
    limit = duration(settings.max_age_s)
    return [
        dataset.name,
        ", ".join([str(dataset.state()), *(["held"] if dataset.held else []), *(["pinned"] if dataset.pinned else [])]),
        f"age {duration(age_s)} of {limit}" if age_s is not None else f"no age yet, limit {limit}",
        f"{dataset.snapshot.rows.count:,} rows" if dataset.snapshot else "no rows",
        f"generation {dataset.snapshot.generation if dataset.snapshot else 0}",
        _now_and_next(dataset),
        _last(dataset),
    ]


def _now_and_next(dataset: Dataset) -> str:
    if (progress := dataset.refresh.progress) is not None:
        of = f" of {progress.expected:,}" if progress.expected else ""
        return f"reading, {progress.rows.count:,}{of} rows"
    if (behind_s := dataset.behind_s()) is not None:
        return f"waits for postgres.max_load, {duration(behind_s)} behind its interval"
    if dataset.refresh.is_running:
        return "waiting for a connection"
    next_in_s = dataset.next_refresh_in_s()
    return "not planned" if next_in_s is None else f"next in {duration(next_in_s)}"


def _last(dataset: Dataset) -> str:
    uncertain = dataset.snapshot.age_uncertain if dataset.snapshot else None
    words = [
        _last_attempt(dataset),
        f"age uncertain: {uncertain}" if uncertain else "",
        f"not saved: {dataset.save_problem}" if dataset.save_problem else "",
    ]
    return ", ".join(filter(None, words))


def _last_attempt(dataset: Dataset) -> str:
    if not dataset.attempts:
        return ""
    attempt = dataset.attempts[-1]
    if attempt.outcome == "failed":
        return f"failed {times(dataset.consecutive_failures)}: {attempt.error}"
    if attempt.outcome == "held":
        return f"held: the result {attempt.error}"
    return f"{attempt.outcome} in {duration(attempt.took_s)}"


def json_line(cache: Cache) -> str:
    """Return the whole status as one line of JSON."""
    return json.dumps(describe(cache), ensure_ascii=False, separators=(",", ":"))


def show(dataset: Dataset) -> str:
    """Return `field: value` lines, including the last attempts, newest first."""
    fields = describe_dataset(dataset)
    del fields["last_attempt"]
    settings = dataset.settings
    fields |= {
        "missed_ticks": dataset.counts.missed_ticks,
        "required": settings.required,
        "key": ":".join(settings.key),
        "retry_initial_s": settings.retry_initial_s,
        "retry_max_s": settings.retry_max_s,
        "jitter": settings.jitter,
        "min_rows": settings.min_rows,
        "max_shrink": settings.max_shrink,
        "on_column_removed": settings.on_column_removed,
        "notify": settings.notify,
        "probe": settings.probe,
        "watch": ", ".join(f"{watch.table} by {':'.join(watch.key)}" for watch in settings.watch),
        "max_delta": settings.max_delta,
        "full_interval_s": settings.full_interval_s,
        "delta_differences": dataset.counts.differences,
        "max_rows": settings.max_rows,
        "max_bytes": settings.max_bytes,
    }
    lines = [f"dataset: {dataset.name}", *(f"{name}: {_value(value)}" for name, value in fields.items())]
    lines += [f"attempt: {_attempt_line(attempt)}" for attempt in reversed(dataset.attempts)]
    return "\n".join(lines)


def _value(value: object) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else json.dumps(value)


def _attempt_line(attempt: Attempt) -> str:
    fields = describe_attempt(attempt)
    words = f"{fields['started_at']} {attempt.trigger} {attempt.outcome} in {duration(attempt.took_s)}"
    if attempt.rows is not None:
        words += f", {attempt.rows:,} rows"
    if attempt.how:
        words += f", read {attempt.how}"
    if attempt.id:
        words += f", id {attempt.id}"
    return f"{words}: {attempt.error}" if attempt.error else words


def why(dataset: Dataset, cache: Cache) -> str:
    """Return sentences about the state, its cause, any blockers and the next step."""
    sentences = [*_state_sentences(dataset), *_lag_sentences(dataset), *_failure_sentences(dataset, cache)]
    if dataset.settings.notify or dataset.settings.watch:
        sentences += filter(None, [listening_sentence(cache, cache.now(), dataset)])
    if dataset.settings.watch:
        sentences += _watch_sentences(dataset, cache)
    if dataset.counts.differences:
        sentences.append(
            f"Since the start, checks have found and mended {dataset.counts.differences:,} differing rows of which no "
            "trigger told: the log names keys of them (delta_differences); see that all tables of the query are "
            "watched."
        )
    sentences += _next_sentences(dataset)
    if cache.rejection is not None:
        sentences.append(f"The newest configuration is not in effect. It was {_rejected(cache.rejection, cache)}.")
    return "\n".join(sentences)


def _watch_sentences(dataset: Dataset, cache: Cache) -> Iterator[str]:
    if (without := dataset.refresh.without_deltas) is not None:
        yield (
            f"It wants deltas, and has read all rows for {duration(dataset.without_deltas_s() or 0.0)}, "
            f"because {without.because}."
        )
    if (problem := cache.database.prune_problem) is not None:
        yield f"Old recorded changes are not deleted, so that the database fills with them: {problem}."


def listening_sentence(cache: Cache, now: float, dataset: Dataset | None = None) -> str | None:
    """Describe whether notifications arrive; None if no dataset waits for them.

    :param dataset: a dataset whose deltas may be off, so that some of its changes cause no notification.
    :param now: on the monotonic clock, in seconds.
    """
    database = cache.database
    if not database.listening_wanted:
        return None
    if database.listening and database.listening_proven_at is not None:
        ago = duration(now - database.listening_proven_at)
        if dataset is not None and dataset.refresh.without_deltas is not None:
            return f"Listening, proven {ago} ago, but some changes may be seen on its interval only."
        return f"PostgreSQL tells of changes at once: listening, proven {ago} ago."
    if database.listening_problem is None:
        return "Listening has not begun yet; it is refreshed on its interval meanwhile."
    return f"Listening is broken: {database.listening_problem}; it is refreshed on its interval meanwhile."


def _state_sentences(dataset: Dataset) -> Iterator[str]:
    settings, age_s, state = dataset.settings, dataset.age_s(), dataset.state()
    limit = f"the limit is {duration(settings.max_age_s)}"
    if age_s is None:
        yield f"{dataset.name} has never been loaded, so readers get nothing from it yet."
        return
    assert dataset.snapshot is not None
    age = f"it is {duration(age_s)} old, {limit}"
    if state is State.FRESH:
        yield f"{dataset.name} is fresh: {age}."
    elif state is State.STALE:
        yield (
            f"{dataset.name} is stale: {age}; it should be refreshed every {duration(settings.interval_s)}. "
            "Readers get the last good snapshot."
        )
    else:
        served = "Readers get the last good snapshot" if settings.on_expired == "serve" else "Readers get an error"
        yield f"{dataset.name} is expired: {age}. {served}."
    yield (
        f"Generation {dataset.snapshot.generation} with {dataset.snapshot.rows.count:,} rows is served, "
        f"as of {dataset.snapshot.as_of.isoformat(timespec='seconds')} by the database's clock."
    )
    if dataset.snapshot.age_uncertain is not None:
        yield f"Its age is uncertain until the next refresh: {dataset.snapshot.age_uncertain}."
    if dataset.redefined:
        yield "It is the result of the query and key before the last reload, until those of now have been read."
    if (change := dataset.snapshot.change) is not None:
        yield f"Its publish added {change.added:,}, changed {change.changed:,} and removed {change.removed:,} rows."
    if (settings.watch or settings.notify or settings.probe) and dataset.attempts and dataset.attempts[-1].how:
        yield f"The last attempt read {dataset.attempts[-1].how}."


def _lag_sentences(dataset: Dataset) -> Iterator[str]:
    snapshot = dataset.snapshot
    if snapshot is not None and snapshot.lag.problem:
        lag = snapshot.lag
        words = behind(lag.seconds, known=lag.known)
        yield f"It was read from a standby that is {words}, which its age includes: {lag.problem}."


def _failure_sentences(dataset: Dataset, cache: Cache) -> Iterator[str]:
    last = dataset.attempts[-1] if dataset.attempts else None
    if last is not None and last.outcome == "failed":
        ago = duration((cache.now() - dataset.last_ended_at) if dataset.last_ended_at is not None else 0.0)
        yield f"The last attempt failed {ago} ago, after {duration(last.took_s)}: {last.error}."
        if dataset.consecutive_failures > 1:
            yield f"It has failed {times(dataset.consecutive_failures)} in a row."
        for blocker in last.blockers:
            yield f"It was blocked: {describe_blocker(blocker)}."
        if last.advice:
            yield f"What to do: {last.advice}."
    if dataset.held is not None:
        ago = duration((datetime.now(UTC) - dataset.held.since).total_seconds())
        yield f"The newest result is held back, for {ago} now: it {dataset.held.reason}."
        if last is not None and last.outcome == "held":
            yield f"What to do: {last.advice}."
    if dataset.pinned:
        candidate = dataset.candidate
        newest = f"; a result with {candidate.rows.count:,} rows waits for 'unpin {dataset.name}'" if candidate else ""
        yield f"It is pinned by an operator: nothing newer is served{newest}."
    if dataset.snapshot is not None and dataset.snapshot.rolled_back_to is not None:
        yield f"It was rolled back to what was saved as generation {dataset.snapshot.rolled_back_to}."
    if dataset.save_problem is not None:
        yield f"It could not be saved: {dataset.save_problem}. A restart would begin with what was saved before."
    if dataset.accepts_next:
        yield "The next result is published whatever the gates say, because an operator accepted it."
    if dataset.counts.missed_ticks:
        skipped = times(dataset.counts.missed_ticks).capitalize()
        yield f"{skipped} a start was skipped, because a refresh was still running."


def _next_sentences(dataset: Dataset) -> Iterator[str]:
    if (progress := dataset.refresh.progress) is not None:
        of = f" of about {progress.expected:,}" if progress.expected is not None else ""
        yield f"A refresh is running now and has read {progress.rows.count:,}{of} rows."
    elif (behind_s := dataset.behind_s()) is not None:
        yield (
            f"A refresh has been due for {duration(behind_s)} and waits, because refreshes have used what "
            f"postgres.max_load allows: its {duration(dataset.settings.interval_s)} interval is stretched by as much."
        )
    elif dataset.refresh.is_running:
        yield "A refresh is due now and waits for one of the postgres.max_connections connections."
    if dataset.refresh.put_off_s:
        yield f"Its last refresh began {duration(dataset.refresh.put_off_s)} late, put off by postgres.max_load."
    next_in_s = dataset.next_refresh_in_s()
    if next_in_s is not None:
        yield f"The next attempt starts in {duration(next_in_s)}."


def times(count: int) -> str:
    """Return a count in words, such as "3 times"."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def duration(value_s: float) -> str:
    """Format seconds for a person: 0.12 s, 47 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    value_s = max(0.0, value_s)
    if value_s < 10:
        return f"{value_s:.2f} s"
    whole = round(value_s)
    for limit, size, unit, smaller, smaller_unit in (
        (120, 1, "s", 0, ""),
        (7200, 60, "min", 1, "s"),
        (172800, 3600, "h", 60, "min"),
    ):
        if whole < limit:
            return _two_units(whole, size, unit, smaller, smaller_unit)
    return _two_units(whole, 86400, "d", 3600, "h")


def _two_units(whole: int, size: int, unit: str, smaller: int, smaller_unit: str) -> str:
    rest = whole % size // smaller if smaller else 0
    return f"{whole // size} {unit} {rest} {smaller_unit}" if rest else f"{whole // size} {unit}"


def _without_trailing_blanks(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())
