"""How figures are printed: a value, its target, whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, quantiles

from tabulate import tabulate


def spread(values: Sequence[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    """The median, and the range in brackets."""
    return f"{show(median(values))} ({show(min(values))} to {show(max(values))})"


def print_figures(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Rows of (what, value, peer or reference, target)."""
    print(tabulate(rows, headers=["figure", "value", "against", "target"], disable_numparse=True), flush=True)


def limit(value: float, most: float, unit: str) -> str:
    """A target that is met from below."""
    return f"≤ {most:g}{unit}: {'met' if value <= most else 'MISSED'}"


def floor(value: float, least: float, unit: str = "") -> str:
    """A target that is met from above."""
    return f"≥ {least:g}{unit}: {'met' if value >= least else 'MISSED'}"


def mib(value_bytes: float) -> str:
    return f"{value_bytes / 2**20:.1f} MiB"


def percentile(values: Sequence[float], share: int) -> float:
    return quantiles(values, n=100, method="inclusive")[share - 1]


def ms(value_s: float) -> str:
    return f"{value_s * 1000:.1f} ms"
