"""Renders the metrics in each of their formats.

prometheus-client renders the metrics of the service, some hundred series. It takes 5 µs for each sample, because it
sorts and escapes the labels each time; for 500 datasets with 49 series each this blocked the reactor for 140 ms
(measured). So this module renders the metrics of datasets and keeps the lines of a dataset until its numbers change;
then a scrape only joins them. `collect` passes the same values to prometheus-client, and a test compares its rendering
with this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    Metric,
)
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from twisted.internet.defer import Deferred

from cacheservice.base.interfaces import Clock
from cacheservice.base.timers import pause
from cacheservice.cache.cache import Cache
from cacheservice.cache.counts import Histogram
from cacheservice.cache.dataset import Dataset
from cacheservice.cache.events import AttemptEnded, Ended, Event
from cacheservice.ops.capture_metrics import CAPTURE_GROUPS
from cacheservice.ops.dataset_metrics import GROUPS, Sample
from cacheservice.ops.fleet_metrics import FLEET_GROUPS
from cacheservice.ops.service_metrics import ServedPort, ServiceMetrics, Superseded

_A_TURN = 100
"""The most datasets rendered in one turn of the reactor: 2 ms."""
_NOT_RENDERED = object()
_GROUPS = (*GROUPS, *CAPTURE_GROUPS, *FLEET_GROUPS)
_FAMILIES = [(family, group.optional) for group in _GROUPS for family in group.families]
# The first family is the age, which changes all the time.
_OF_CHANGES = _GROUPS[1:]
_STAMPS = [group.stamp for group in _OF_CHANGES]


class _Lines:
    """The rendered lines of one dataset.

    `families` has the lines by family, `_stamps` the stamps by group with which they were rendered.
    """

    __slots__ = ("_stamps", "_templates", "families")

    def __init__(self, dataset: str) -> None:
        self.families = [b""] * len(_FAMILIES)
        self._templates = [family.template(dataset) for family, _ in _FAMILIES]
        self._stamps: list[object] = [_NOT_RENDERED] * len(_STAMPS)

    def render(self, dataset: Dataset) -> bool:
        """Render changed lines; return whether anything but the age has changed."""
        age_s = dataset.age_s()
        self.families[0] = b"" if age_s is None else self._templates[0] % round(age_s, 3)
        stamps = [stamp(dataset) for stamp in _STAMPS]
        if stamps == self._stamps:
            return False
        place = 1
        for group, current, before in zip(_OF_CHANGES, stamps, self._stamps, strict=True):
            if current == before:
                place += len(group.families)
                continue
            for values in group.values(dataset, current):
                self.families[place] = self._templates[place] % values if values else b""
                place += 1
        self._stamps = stamps
        return True


class Metrics:
    """All metrics of the service.

    :param lateness: of the reactor's ticks, in seconds; see `StallWatch`.
    :param clock: `IReactorTime`.
    :param superseded: returns the bytes of each generation that only replies in progress keep in memory.
    """

    def __init__(
        self,
        cache: Cache,
        lateness: Histogram,
        clock: Clock,
        superseded: Superseded = dict,
    ) -> None:
        self._cache = cache
        self._ports: dict[str, ServedPort] = {}
        self._clock = clock
        # A registry of its own; the library's global one is shared by the whole process.
        self._of_service = CollectorRegistry()
        self._of_service.register(ServiceMetrics(cache, lateness, self._ports, superseded))
        ProcessCollector(registry=self._of_service)
        self._lines: dict[str, _Lines] = {}
        cache.events.subscribe(lambda event: self._lines.pop(event.dataset, None), Ended)
        self._prepare: Callable[[], Deferred[None]] | None = None
        # Lines are rendered when an attempt ends, so that refreshes do not make the next scrape slower.
        cache.events.subscribe(self._attempt_ended, AttemptEnded)

    def add_port(self, name: str, port: ServedPort) -> None:
        """Have the metrics include the clients of a port."""
        self._ports[name] = port

    def prepare_by(self, prepare: Callable[[], Deferred[None]]) -> None:
        """Call `prepare` before the metrics are rendered, and wait for it: it brings the counters up to date."""
        self._prepare = prepare

    def _attempt_ended(self, event: Event) -> None:
        dataset = self._cache.datasets.get(event.dataset)
        if dataset is not None:
            self._render(dataset)

    async def exposition(self, *, openmetrics: bool) -> bytes:
        """Return all metrics in the Prometheus text format 0.0.4 or OpenMetrics 1.0.0.

        It takes several turns of the reactor, none of them long.
        """
        if self._prepare is not None:
            await self._prepare()
        of_service = generate_openmetrics(self._of_service) if openmetrics else generate_latest(self._of_service)
        await self._render_all()
        # One copy, because the result may be megabytes, and each copy costs as much as the rest.
        parts: list[bytes] = []
        for (family, optional), column in zip(_FAMILIES, self._columns(), strict=True):
            if optional and not any(column):
                continue
            parts.append(family.openmetrics_head if openmetrics else family.text_head)
            parts += column
        parts.append(of_service)
        return b"".join(parts)

    async def monitor_lines(self) -> str:
        """Return key<TAB>value lines with the same keys and values."""
        if self._prepare is not None:
            await self._prepare()
        of_service = [line.rpartition(" ") for line in generate_latest(self._of_service).decode().splitlines()]
        await self._render_all()
        of_datasets = b"".join(chain.from_iterable(self._columns())).decode()
        lines = [f"{key}\t{value.removesuffix('.0')}" for key, _, value in of_service if not key.startswith("#")]
        # No label of a dataset contains a space.
        return "\n".join([*lines, of_datasets.replace(" ", "\t").removesuffix("\n")])

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """Yield all samples, each with its kind; may be consumed over many turns."""
        for metric in self._of_service.collect():
            yield from ((metric.type, Sample(*sample[:3])) for sample in metric.samples)
        for dataset in list(self._cache.datasets.values()):
            for group in _GROUPS:
                for family, values in zip(group.families, group.values(dataset, group.stamp(dataset)), strict=True):
                    yield from ((family.kind, sample) for sample in family.samples(dataset.name, values))

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics for prometheus-client, as one of its collectors."""
        for group in _GROUPS:
            of_datasets = {
                dataset.name: list(group.values(dataset, group.stamp(dataset)))
                for dataset in self._cache.datasets.values()
            }
            for number, family in enumerate(group.families):
                if group.optional and not any(values[number] for values in of_datasets.values()):
                    continue
                yield family.metric(
                    sample for name, values in of_datasets.items() for sample in family.samples(name, values[number])
                )
        yield from self._of_service.collect()

    async def _render_all(self) -> None:
        # A new turn after the work so far: with 10,000 clients, the process's descriptors alone take 8 ms.
        made = _A_TURN
        for dataset in list(self._cache.datasets.values()):
            if made >= _A_TURN:
                await pause(self._clock)
                made = 0
            made += self._render(dataset)

    def _render(self, dataset: Dataset) -> bool:
        if dataset.removed:
            return False
        lines = self._lines.get(dataset.name)
        if lines is None:
            lines = self._lines[dataset.name] = _Lines(dataset.name)
        return lines.render(dataset)

    def _columns(self) -> Iterator[tuple[bytes, ...]]:
        """Yield for each family the lines of all datasets, which must be contiguous."""
        datasets = self._cache.datasets
        for name in datasets.keys() - self._lines.keys():
            self._render(datasets[name])  # it was added while others were rendered
        return zip(*(self._lines[name].families for name in datasets), strict=True)
