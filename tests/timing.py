"""Timings of two programs side by side, for benchmarks."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call, its result waited for."""
    began = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - began


def medians(calls: Mapping[str, Callable[[], Any]], repeats: int, budget: float = np.inf) -> dict[str, float]:
    """Median seconds of each call, in turns, so that a busy machine disturbs all alike.

    A quick call is made once more before each timing, lest it pays for caches that a slow one before it has emptied.
    After three rounds a call that has used up its `budget` of seconds is left out.
    """
    times = {name: [] for name in calls}
    for i in range(repeats):
        for name, call in calls.items():
            if i >= 3 and sum(times[name]) > budget:
                continue
            if not times[name] or times[name][-1] < 1.0:
                timed(call)
            times[name].append(timed(call))
    return {name: float(np.median(values)) for name, values in times.items()}


def compare(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Medians of interleaved runs and the median of their ratios, the order alternating, after two warm-ups."""
    for _ in range(2):
        timed(first), timed(second)
    pairs = []
    for i in range(repeats):
        if i % 2:
            b, a = timed(second), timed(first)
        else:
            a, b = timed(first), timed(second)
        pairs.append((a, b))
    a, b = np.array(pairs).T
    return float(np.median(a)), float(np.median(b)), float(np.median(a / b))
