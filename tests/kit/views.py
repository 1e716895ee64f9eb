"""What an operator sees of a cache: its facts, rendered."""

from __future__ import annotations

from typing import Any

from cacheservice.cache.cache import Cache
from cacheservice.cache.dataset import Dataset
from cacheservice.views import collect, table
from cacheservice.views import json as as_json
from cacheservice.views.why import sentences


def why(dataset: Dataset, cache: Cache) -> str:
    """Return the reply to `why`."""
    return "\n".join(sentences(collect.details(dataset, cache), collect.database(cache), collect.rejection(cache)))


def status_table(cache: Cache) -> str:
    """Return the reply to `status`."""
    facts = collect.everything(cache)
    return table.status_table(facts.service, facts.database, facts.datasets.values())


def show(dataset: Dataset, cache: Cache) -> str:
    """Return the reply to `show`."""
    return table.show(collect.details(dataset, cache))


def database_object(cache: Cache) -> dict[str, Any]:
    """Return the database's part of `json`."""
    return as_json.database(collect.database(cache))
