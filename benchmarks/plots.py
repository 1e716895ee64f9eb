"""The pictures of the figures, as SVG; they need the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import percentile

_SIZE_INCHES = (7.0, 3.6)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cacheservice",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def visible(path: Path, by_reader: Mapping[str, Sequence[float]], most_s: Mapping[int, float]) -> None:
    """How long after their COMMIT changes were read.

    :param by_reader: seconds of each sample.
    :param most_s: the targets, by percentile.
    """
    figure, axes = _begun()
    shown_ms = 1.6 * max(percentile(each, 99) for each in by_reader.values()) * 1000
    bins = [shown_ms * number / 60 for number in range(61)]
    for name, values_s in by_reader.items():
        values_ms = [min(value * 1000, shown_ms) for value in values_s]
        p50, p99 = (percentile(values_s, share) * 1000 for share in (50, 99))
        label = f"a reader that {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        axes.hist(values_ms, bins, histtype="stepfilled", alpha=0.6, label=label)
    for share, most in most_s.items():
        if most * 1000 <= shown_ms:
            axes.axvline(most * 1000, color="0.4", linestyle="--", linewidth=1, label=f"target of p{share}")
    axes.set_xlim(left=0)
    axes.set_xlabel("ms from the return of COMMIT to a GET with the new value (the last bar: all above)")
    axes.set_ylabel("commits")
    axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=1)
    _written(figure, path)


def over_size(
    path: Path, deltas: Mapping[int, Sequence[float]], wholes: Mapping[int, Sequence[float]], keys: int
) -> None:
    """Seconds of refreshes by the number of rows that the table has."""
    figure, axes = _begun()
    for measured, name, place in ((wholes, "all rows read", (-6, 4)), (deltas, f"a delta of {keys} keys", (-6, 6))):
        sizes = sorted(measured)
        middles = [median(measured[size]) * 1000 for size in sizes]
        below = [middle - min(measured[size]) * 1000 for size, middle in zip(sizes, middles, strict=True)]
        above = [max(measured[size]) * 1000 - middle for size, middle in zip(sizes, middles, strict=True)]
        axes.errorbar(sizes, middles, yerr=[below, above], marker="o", capsize=3, label=name)
        for size, middle in zip(sizes, middles, strict=True):
            label = f"{middle:,.0f} ms"
            axes.annotate(label, (size, middle), place, textcoords="offset points", horizontalalignment="right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 2, sizes[-1] * 1.5)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("rows of the table")
    axes.set_ylabel("ms of a refresh, median and range")
    axes.legend(frameon=False)
    _written(figure, path)


def load(path: Path, real: Mapping[str, Sequence[int]], plain: Mapping[str, Sequence[int]]) -> None:
    """Events per second of a fleet at its servers, by name; `plain` is without jitter, backoff and deputy."""
    figure, first = _begun()
    first.remove()
    figure.set_size_inches(_SIZE_INCHES[0], 2 * _SIZE_INCHES[1])
    for axes, name in zip(figure.subplots(len(real), sharex=True), real, strict=True):
        axes.plot(plain[name], color="0.6", linewidth=1, label="without jitter, backoff and deputy")
        axes.plot(real[name], linewidth=1, label="the service")
        axes.set_title(f"{name} per second", loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, len(real[name]))
    axes.set_xlabel("seconds of the virtual time")
    axes.legend(frameon=False)
    _written(figure, path)


def _begun() -> tuple[Any, Any]:
    try:
        import matplotlib  # noqa: PLC0415  # an extra, for those who want pictures
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'cacheservice[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    matplotlib.rcParams.update(_STYLE)
    return pyplot.subplots(figsize=_SIZE_INCHES, layout="constrained")


def _written(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date in it the same figures make the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"written: {path}", flush=True)
