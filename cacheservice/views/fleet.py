"""Words for the part of a process in a fleet: a cell and a line for `status`, sentences for `why`, problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from cacheservice.views.facts import Dataset, Fleet
from cacheservice.views.units import duration, plural

_STRETCHED = "at three times its interval"


def cell(fleet: Fleet | None) -> str:
    """Return the role in the line of a dataset; empty without a fleet."""
    if fleet is None:
        return ""
    if fleet.role != "replica":
        return fleet.role
    behind = f", {plural(fleet.lag_generations, 'generation')} behind" if fleet.lag_generations else ""
    return f"replica{behind}" if fleet.leader in (None, fleet.process) else f"follows {fleet.leader}{behind}"


def line(datasets: Iterable[Dataset]) -> list[str]:
    """Return one line about the roles of this process in the fleet; no line without a fleet."""
    fleets = [dataset.fleet for dataset in datasets if dataset.fleet is not None]
    if not fleets:
        return []
    roles = Counter(fleet.role for fleet in fleets)
    counted = f"leads {roles['leader']} and follows {roles['replica']} of {plural(len(fleets), 'dataset')}"
    alone = f", refreshes {roles['alone']} alone" if roles["alone"] else ""
    return [f"fleet: {fleets[0].process} {counted}{alone}"]


def problems(fleets: Collection[Fleet]) -> Iterator[str]:
    """Yield what is wrong with the fleet, each problem once; datasets usually share it."""
    for begin, found in (
        ("the Valkey cannot be used", [fleet.valkey_problem for fleet in fleets]),
        ("results cannot be published", [fleet.publish_problem for fleet in fleets]),
        ("this process cannot win a lead", [fleet.lead_problem for fleet in fleets]),
    ):
        different = list(dict.fromkeys(filter(None, found)))
        if different:
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            yield f"{begin}: {different[0]}{more}"


def sentences(name: str, fleet: Fleet | None) -> Iterator[str]:
    """Yield sentences about a dataset: which process leads it, why this one is alone, and what to do."""
    if fleet is None:
        return
    epoch = "" if fleet.epoch is None else f", epoch {fleet.epoch}"
    silent = duration(fleet.leader_silent_s)
    if fleet.role == "leader":
        yield (
            f"This process, {fleet.process}, leads it{epoch}: it refreshes {name}, and publishes the results for the "
            "fleet."
        )
    elif fleet.role == "alone":
        last = f"The last known leader is {fleet.leader}{epoch}. " if fleet.leader else ""
        yield (
            f"This process, {fleet.process}, refreshes it alone and for itself only, {_STRETCHED}, because no new "
            f"results of a leader have come for {silent}. {last}It follows a leader again as soon as its results come."
        )
    elif fleet.leader is None:
        yield f"No leader is known; this process, {fleet.process}, has waited for results for {silent}."
    elif fleet.leader == fleet.process:
        yield f"This process, {fleet.process}, led it{epoch}, and has lost the lead; the next leader is not known yet."
    else:
        yield (
            f"{fleet.leader} leads it{epoch}; this process, {fleet.process}, serves the results, the last ones as of "
            f"{silent} ago. Send commands such as pin to {fleet.leader}."
        )
    if fleet.lag_generations:
        yield f"The leader has published {plural(fleet.lag_generations, 'generation')} that this process lacks."
    yield from _problems(fleet)


def _problems(fleet: Fleet) -> Iterator[str]:
    if fleet.valkey_problem is not None:
        yield (
            f"The Valkey cannot be used: {fleet.valkey_problem}. Readers get what this process has. What to do: check "
            "that the Valkey of cluster.valkey_url runs, and that this process can reach it."
        )
    if fleet.publish_problem is not None:
        yield (
            f"Its results cannot be published: {fleet.publish_problem}. Other processes keep what they have. What to "
            "do: check the memory, the disk and the role of the Valkey (INFO memory, persistence, replication)."
        )
    if fleet.lead_problem is not None:
        yield f"This process cannot win a lead: {fleet.lead_problem}."
