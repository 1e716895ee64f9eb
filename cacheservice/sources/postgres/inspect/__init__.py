"""`cacheservice check --db`: inspects the declared queries.

It runs before the service does, and blocks, so it is for the command line and never for the service. Each dataset is
inspected in a transaction of its own, read only and with the settings of a real refresh, so that a refresh finds the
same. No query is run as a whole: the columns come from a result without rows, the figures from the planner, and the
rest from a sample with a statement timeout.
"""

from __future__ import annotations

from cacheservice.sources.postgres.inspect.findings import Column, Finding, Inspection, Key, Node, Server, Size
from cacheservice.sources.postgres.inspect.session import Inspector, inspecting
from cacheservice.sources.postgres.inspect.watching import inspect_text

__all__ = [
    "Column",
    "Finding",
    "Inspection",
    "Inspector",
    "Key",
    "Node",
    "Server",
    "Size",
    "inspect_text",
    "inspecting",
]
