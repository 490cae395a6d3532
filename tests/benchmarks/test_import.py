"""Import time of genkit beside that of what it stands on. Run with `-m benchmark`."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


def seconds(modules: str) -> float:
    """Median import time over seven fresh interpreters, after one to fill the disk cache."""
    script = f"import time; start = time.perf_counter(); import {modules}; print(time.perf_counter() - start)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    times = [
        float(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment).stdout)
        for _ in range(8)
    ]
    return statistics.median(times[1:])


@pytest.mark.benchmark
def test_import_costs_little_more_than_its_foundations():
    ours, foundations = seconds("genkit"), seconds("jax, equinox, numpyro")
    print(f"import genkit {ours:.2f} s; jax, equinox, numpyro {foundations:.2f} s; ratio {ours / foundations:.2f}")
    assert ours <= 1.3 * foundations
