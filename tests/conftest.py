"""What every test runs under: typed keys used once, warnings as errors, no display, no network."""

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


# Before JAX is imported: where a compilation cache is named, small programs are worth keeping too.
if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest


# Python 3.11 is served by ArviZ 0.x and by the last JAX that supports it; neither gets fixes any more. Each line says
# who warns. From 3.12 on nothing is exempt.
EXCEPTIONS_ON_3_11 = [
    "ignore:\\s*ArviZ is undergoing a major refactor:FutureWarning",  # arviz 0.23 at its first import of a day
    "ignore::matplotlib.MatplotlibDeprecationWarning:arviz",  # arviz 0.23's plots under matplotlib 3.11
]

COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
compilations_so_far = 0


def _listen(event: str, duration: float, **kwargs: object) -> None:
    global compilations_so_far
    compilations_so_far += event == COMPILATION_EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def pytest_configure(config: pytest.Config) -> None:
    """Make the exceptions to "warnings are errors" that hold on Python 3.11 alone."""
    if sys.version_info < (3, 12):
        for line in EXCEPTIONS_ON_3_11:
            config.addinivalue_line("filterwarnings", line)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite on two workers, and a named part of it in one process (a worker costs seconds to start)."""
    whole = {str(config.rootpath / path) for path in config.getini("testpaths")}
    named = {os.path.abspath(arg) for arg in config.args}
    return min(2, os.cpu_count() or 1) if named == whole else 0


@pytest.fixture(autouse=True)
def _key_reuse_check(request: pytest.FixtureRequest) -> Iterator[None]:
    """No key may be consumed twice; `@pytest.mark.key_reuse` opts out (say why in a comment).

    Benchmarks run without: the check is made at every compiled call, and its time would count as ours.
    """
    with jax.debug_key_reuse(not {"key_reuse", "benchmark"} & set(request.keywords)):
        yield


# Linux gives a process 65,530 memory mappings, and every compiled program takes several.
MAPPINGS = Path("/proc/self/maps")
MANY_MAPPINGS = 20_000
tests_so_far = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs() -> Iterator[None]:
    """Forget all compiled programs when they take up many mappings; the cache on disk has them, where there is one."""
    yield
    if next(tests_so_far) % 25 == 0 and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compilations() -> Callable[[], AbstractContextManager[Callable[[], int]]]:
    """Count XLA compilations: `with compilations() as count: ...; assert count() == 0`."""

    @contextmanager
    def counting() -> Iterator[Callable[[], int]]:
        start = compilations_so_far
        yield lambda: compilations_so_far - start

    return counting
