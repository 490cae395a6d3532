"""Attend, infer, repeat: count accuracy and seconds per epoch of every strategy for the site that has no gradient.

Each cell of the table is a test of its own (`-k` picks some); the last test compares, from cells that ran or anew.
"""

import importlib.util
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import genkit as gk


pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1800)]
EPOCH, EPOCHS, SHOWN = 64, 16, (1, 2, 4, 8, 16)
STRATEGIES = {
    "Enum": (gk.vi.Enum(), 1, {}),
    "MVD": (gk.vi.MVD(), 1, {}),
    "RLOO(2)": (gk.vi.RLOO(2), 1, {}),
    "Score": (gk.vi.Score(), 1, {}),
    "Score, all costs": (gk.vi.Score(), 1, {"rao_blackwell": False}),
    "IWELBO2, Score": (gk.vi.Score(), 2, {}),
    "IWELBO2, Enum": (gk.vi.Enum(), 2, {}),
}


def load_air():
    path = Path(__file__).parents[2] / "models" / "air.py"
    spec = importlib.util.spec_from_file_location("air", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def learn(air, strategy, num_particles, options, folder):
    """Accuracy after each epoch, and the median seconds of an epoch."""
    data = gk.data.Batches(air.pictures(jax.random.key(0), 4096)[0], batch_size=64)
    phase = gk.Phase(air.bound(strategy, num_particles, **options), optax.adam(1e-3))
    recipe = gk.Recipe(air.AIR, data, phase, EPOCH * EPOCHS, log_every=EPOCH)
    images, counts = air.pictures(jax.random.key(9), 1000)
    accuracy, seconds = [], []
    for epoch in range(1, EPOCHS + 1):
        begin = time.perf_counter()
        fitted = gk.fit(recipe, key=jax.random.key(1), num_steps=EPOCH * epoch, run=folder, resume=True, progress=False)
        seconds.append(time.perf_counter() - begin)
        accuracy.append(float(air.count_accuracy(fitted.model, images, counts, jax.random.key(2))))
    return accuracy, float(np.median(seconds))


SEEN = {}


def cell(name, folder):
    """Accuracy by epoch of a strategy, learned once per session."""
    if name not in SEEN:
        strategy, num_particles, options = STRATEGIES[name]
        SEEN[name] = learn(load_air(), strategy, num_particles, options, folder / "run")
    return SEEN[name]


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_learns_to_count(name, tmp_path, capsys):
    accuracy, seconds = cell(name, tmp_path)
    with capsys.disabled():
        shown = "  ".join(f"{accuracy[e - 1]:.3f}" for e in SHOWN)
        print(f"\n{name:24} {shown}   {seconds:.2f} s per epoch")
    assert accuracy[-1] > (0.97 if "Enum" in name or name == "MVD" else 0.9)


def test_exact_strategies_are_well_above_plain_scores(tmp_path):
    fourth = {name: cell(name, tmp_path / name)[0][3] for name in ("Enum", "MVD", "Score", "Score, all costs")}
    assert min(fourth["Enum"], fourth["MVD"]) > fourth["Score"] + 0.1
    assert min(fourth["Enum"], fourth["MVD"]) > fourth["Score, all costs"] + 0.1
