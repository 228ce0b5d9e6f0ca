"""Counters and histograms for one thread: no lock, no label lookups, nothing formatted until asked.

prometheus_client's own take a lock for each increment; these are plain numbers, which a collector
turns into its families when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

# From a millisecond to minutes, seconds.
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
)
# Doubling, for numbers of things.
COUNTS = tuple(float(2**power) for power in range(18))

# By the values of labels, which are tuples of texts.
Labels = Mapping[Any, float]


class Histogram:
    """Observations by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Note a value that occurred so often."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, labels: Mapping[str, str] | None = None) -> Metric:
        """All buckets as they stand."""
        named = labels or {}
        family = HistogramMetricFamily(name, text, labels=list(named))
        bounds = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]  # type: ignore[no-untyped-call]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric(list(named.values()), buckets, self._sum)
        return family


def counter(name: str, text: str, values: float | Labels, labels: Sequence[str] = ()) -> Metric:
    """A number that only grows, or several by their labels' values."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in _items(values):
        family.add_metric(key, value)
    return family


def gauge(name: str, text: str, values: float | Labels, labels: Sequence[str] = ()) -> Metric:
    """A number that comes and goes, or several by their labels' values."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in _items(values):
        family.add_metric(key, value)
    return family


def relabelled(metric: Metric, name: str, labels: Mapping[str, str]) -> Metric:
    """The same figures under another name, with labels added."""
    made = Metric(name, metric.documentation, metric.type)
    for sample in metric.samples:
        suffix = sample.name.removeprefix(metric.name)
        made.add_sample(name + suffix, {**labels, **sample.labels}, sample.value)
    return made


def _items(values: float | Labels) -> Iterable[tuple[tuple[str, ...], float]]:
    return values.items() if isinstance(values, Mapping) else [((), values)]


class Limited(dict[tuple[str, ...], float]):
    """Counts by labels, at most `most` of them: what comes later is counted as `other`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def add(self, key: tuple[str, ...], amount: float = 1.0) -> None:
        """Count, under the key if there is room for it."""
        if key not in self and len(self) >= self._most:
            key = ("other",) * len(key)
        self[key] = self.get(key, 0.0) + amount
