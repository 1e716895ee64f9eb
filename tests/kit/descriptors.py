"""What this process has open."""

from __future__ import annotations

import os


def open_files() -> list[str]:
    """Return the targets of all descriptors, without the one that lists them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sorted(found)
