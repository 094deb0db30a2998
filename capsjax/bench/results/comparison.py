"""Compares two files of rows: ratios with their intervals."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy import special

from capsjax.bench.results.rows import Row

# Times have one value per repetition; counts do not vary.
TIMES = ("trace", "lower", "compile", "load", "run")
COUNTS = (
    "instructions",
    "fusions",
    "flops",
    "bytes",
    "temporaries",
    "cycles",
    "kernels",
    "estimate",
)


class Ratio(NamedTuple):
    """The ratio of new to old for one measure of a cell.

    Attributes:
      cell: key of the cell.
      measure: name of the measure, such as ``"compile"``.
      old: median of the old values, in seconds or a count.
      new: median of the new values.
      ratio: ratio of geometric means for times; of the values for counts.
      low: lower end of the 95 % interval; None with fewer than two repetitions.
      high: upper end of the interval.
    """

    cell: str
    measure: str
    old: float
    new: float
    ratio: float
    low: float | None
    high: float | None

    def is_worse(self, threshold: float) -> bool:
        """Whether even the lower end of the interval is above the threshold."""
        return self.low is not None and self.low > threshold


class Comparison(NamedTuple):
    """The comparison of two files.

    Attributes:
      ratios: ratios of all cells and measures that both files have.
      broken: cells that fail only in the new file.
      only_old: cells that only the old file has.
      only_new: cells that only the new file has.
    """

    ratios: tuple[Ratio, ...]
    broken: tuple[str, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]

    def worse(self, threshold: float) -> list[Ratio]:
        """Returns the ratios that are above a threshold."""
        return [ratio for ratio in self.ratios if ratio.is_worse(threshold)]


def compare_rows(
    old: Iterable[Row], new: Iterable[Row], *, measures: Sequence[str] = (*TIMES, *COUNTS)
) -> Comparison:
    """Compares cells, paired by workload, parameters and target, and by XLA flags if needed.

    Args:
      old: rows of one run.
      new: rows of another run of the same cells.
      measures: measures to compare.

    Example:
      >>> from capsjax.bench import Row, compare_rows
      >>> def row(*seconds):
      ...   return Row(cell="squash @ cpu", workload="squash", parameters={}, target="cpu",
      ...              stages={"compile": seconds})
      >>> comparison = compare_rows([row(1.0, 1.01, 0.99)], [row(2.0, 2.01, 1.99)])
      >>> [(r.measure, round(r.ratio, 2)) for r in comparison.worse(1.5)]
      [('compile', 2.0)]
    """
    before, after = list(old), list(new)
    with_flags = any(
        count > 1 for rows in (before, after) for count in Counter(map(_bare, rows)).values()
    )
    key = _flagged if with_flags else _bare
    olds, news = {key(row): row for row in before}, {key(row): row for row in after}
    ratios, broken = [], []
    for name in olds.keys() & news.keys():
        a, b = olds[name], news[name]
        if a.status == "ok" and b.status != "ok":
            broken.append(name)
        if a.status == b.status == "ok":
            ratios += [ratio for m in measures if (ratio := _ratio(name, m, a, b)) is not None]
    order = {key(row): number for number, row in enumerate(after)}
    ratios.sort(key=lambda ratio: order[ratio.cell])
    return Comparison(
        tuple(ratios),
        tuple(sorted(broken)),
        tuple(name for name in olds if name not in news),
        tuple(name for name in news if name not in olds),
    )


def values(row: Row, measure: str) -> Sequence[float]:
    """Returns the values of a measure, one per repetition; empty if it was not measured."""
    if measure == "run":
        return row.run.medians if row.run else ()
    if measure in TIMES:
        return row.stages.get(measure, ())
    count = row.counts[measure]
    return () if count is None else (count,)


def _ratio(cell: str, measure: str, a: Row, b: Row) -> Ratio | None:
    old, new = values(a, measure), values(b, measure)
    if not old or not new:
        return None
    medians = statistics.median(old), statistics.median(new)
    if measure in COUNTS:
        ratio = 1.0 if old == new else (math.inf if not old[0] else new[0] / old[0])
        return Ratio(cell, measure, *medians, ratio, ratio, ratio)
    if min(*old, *new) <= 0:
        return None
    ratio, low, high = _interval(old, new)
    return Ratio(cell, measure, *medians, ratio, low, high)


def _interval(
    old: Sequence[float], new: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Returns the ratio of geometric means and its 95 % Welch interval, from the logarithms."""
    a, b = [math.log(x) for x in old], [math.log(x) for x in new]
    difference = statistics.mean(b) - statistics.mean(a)
    if min(len(a), len(b)) < 2:
        return math.exp(difference), None, None
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    error = math.sqrt(sum(parts))
    if not error:
        return math.exp(difference), math.exp(difference), math.exp(difference)
    freedom = error**4 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    margin = float(special.stdtrit(freedom, 0.975)) * error
    return math.exp(difference), math.exp(difference - margin), math.exp(difference + margin)


def _bare(row: Row) -> str:
    return row.cell.removesuffix("".join(f" {flag}" for flag in row.xla_flags))


def _flagged(row: Row) -> str:
    return row.cell
