"""The definition files of this submodule keep what their docstrings promise."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk
from genkit.io import load_definition


ROOT = Path(__file__).resolve().parents[2]


def zoo(name):
    definition = load_definition(ROOT / f"{name}.py")
    assert definition.doc.count("Expect:") == 1
    return definition.value


@pytest.mark.long
def test_bridge_moons_with_both_samplers():
    fitted = gk.fit(zoo("models/bridge_moons"), key=jr.key(0))
    fresh = gk.data.two_moons(2000, key=jr.key(1))
    for sampler in (zoo("samplers/bridge_exact"), zoo("samplers/bridge_sde")):
        draws = gk.sample(sampler, fitted.model, 2000, key=jr.key(2))
        assert draws.value.shape == (2000, 2)
        assert float(gk.divergence.energy_distance(draws.value, fresh)) < 0.01


@pytest.mark.long
def test_bridge_digits_beats_one_gaussian_on_held_out_digits():
    path = ROOT / "models" / "bridge_digits.py"
    space = runpy.run_path(str(path))  # for its helpers as well: encode and decode
    fitted = gk.fit(space["recipe"], key=jr.key(0))
    digits = gk.data.digits()
    train, test = (
        [jnp.asarray(space["encode"](x[y == label])) for label in (3, 8)]
        for x, y in ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test))
    )
    single = gk.bridge.gaussian(*(part for x in train for part in (x.mean(0), jnp.cov(x.T))), 0.1)
    objective = jax.jit(lambda b: b.objective(*test))
    assert float(objective(fitted.model)) < float(objective(single)) - 1.0
    draws = gk.sample(zoo("samplers/bridge_exact"), fitted.model, 20, key=jr.key(1), trajectory=True)
    pictures = space["decode"](draws.trajectory[:, -1])
    assert pictures.shape == (20, 1, 8, 8) and np.isfinite(pictures).all()
