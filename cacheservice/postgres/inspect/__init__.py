"""What PostgreSQL says of the declared queries before the service runs: `cacheservice check --db`. It blocks: for the
command line, never for the service.

Each dataset is looked at in a transaction of its own, read only and with the settings of a real refresh, so that what
is found here is what a refresh finds. No query is run whole: the columns come from a result without rows, the figures
from the planner, and what the planner does not know from a sample with a statement timeout.
"""

from __future__ import annotations

from cacheservice.postgres.inspect.findings import Column, Finding, Inspection, Key, Node, Server, Size
from cacheservice.postgres.inspect.session import Inspector, inspecting
from cacheservice.postgres.inspect.watching import inspect_text

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
