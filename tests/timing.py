"""Timings of two programs side by side, for benchmarks."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def timed(fn: Callable[[], Any]) -> float:
    """Seconds of one call, its result waited for."""
    began = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - began


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
