"""Consistency functions against exact maps of the probability flow."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from distill.helpers import mixture
from scipy.optimize import brentq
from scipy.stats import norm

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")
PARTS = {"A": ([0.6, 0.4], [-2.0, 2.0], [0.6, 0.8]), "B": ([0.7, 0.3], [-1.0, 1.5], [0.7, 0.9])}
X = np.array([-4.0, -1.0, 0.0, 1.0, 4.0])
TABLE = {
    ("A", 4.0): [-2.2189, -1.5922, -1.2396, 0.7526, 2.1709],
    ("A", 1.0): [-3.0290, -1.4715, -0.4332, 1.3545, 3.2494],
    ("B", 4.0): [-1.4326, -0.7974, -0.5381, -0.2114, 1.4435],
    ("B", 1.0): [-2.7201, -0.9785, -0.3018, 0.8796, 3.1718],
}


def exact(name, sigma, x):
    """The monotone map of the flow in one dimension: quantile for quantile."""
    weights, means, stds = (np.asarray(v) for v in PARTS[name])
    level = float(np.sum(weights * norm.cdf(x, means, np.sqrt(stds**2 + sigma**2))))
    return brentq(lambda y: np.sum(weights * norm.cdf(y, means, stds)) - level, -12, 12, xtol=1e-13)


class Exact(eqx.Module):
    """The consistency function of a mixture, interpolated from a table over quantiles: a student that is done."""

    levels: jax.Array
    inputs: jax.Array
    starts: jax.Array

    def __call__(self, x, sigma, cond=None):
        row = jnp.argmin(jnp.abs(self.levels - sigma))
        return jnp.interp(x, self.inputs[row], self.starts)


class Affine(eqx.Module):
    """The consistency function of N(mean, std^2), parameters unknown."""

    mean: jax.Array
    log_std: jax.Array

    def __call__(self, x, sigma, cond=None):
        std = jnp.exp(self.log_std)
        return self.mean + std * (x - self.mean) / jnp.sqrt(std**2 + sigma**2)


@pytest.mark.parametrize(("name", "sigma"), TABLE)
def test_quantile_maps_are_the_table(name, sigma):
    np.testing.assert_allclose([exact(name, sigma, x) for x in X], TABLE[name, sigma], atol=6e-5)


def test_the_teachers_flow_is_the_quantile_map():
    grid = gk.diffusion.karras(200, 1e-3, 4.0)
    draws = gk.sample(gk.diffusion.heun(grid), mixture("A"), 5, x_init=jnp.asarray(X)[:, None], key=jr.key(0))
    np.testing.assert_allclose(draws.value[:, 0], TABLE["A", 4.0], atol=1e-3)


@pytest.mark.parametrize("teacher", [True, False])
def test_the_exact_function_has_no_residual(teacher):
    grid = gk.diffusion.karras(60, 0.02, 4.0, final=None)
    weights, means, stds = (np.asarray(v) for v in PARTS["B"])
    starts = np.linspace(-6, 6, 3001)
    below = np.array([np.sum(weights * norm.cdf(y, means, stds)) for y in starts])
    inputs = []
    for level in grid:
        points = np.linspace(-30, 30, 6001)
        cdf = np.sum(weights[:, None] * norm.cdf(points, means[:, None], np.sqrt(stds**2 + level**2)[:, None]), 0)
        keep = np.r_[True, np.diff(cdf) > 1e-15]
        inputs.append(np.interp(below, cdf[keep], points[keep]))
    student = Exact(jnp.asarray(grid), jnp.asarray(inputs), jnp.asarray(starts))
    objective = gk.distill.ConsistencyObjective(jnp.asarray(grid), "l2")
    model = gk.distill.Pair(student, None, mixture("B") if teacher else None)
    x0 = mixture("B").sample(4096, key=jr.key(0))
    _, aux = eqx.filter_jit(objective)(model, (x0, None), key=jr.key(1))
    # The exact map is constant along the teacher's flow; pairs that share their noise leave the flow's variance.
    assert (aux["residual"] < 1e-5) == teacher


@pytest.mark.parametrize("metric", ["huber", "l2"])
def test_distillation_finds_the_exact_map_of_a_gaussian(metric):
    teacher = gk.diffusion.GaussianDenoiser(jnp.array([0.7]), 0.5**2)
    made = gk.distill.consistency(
        teacher, Affine(jnp.zeros(1), jnp.zeros(1)), grid=gk.diffusion.karras(24, 0.01, 5.0), num_steps=500,
        optimizer=adam(500), metric=metric, key=jr.key(0), target_decay=0.5 if metric == "l2" else None,
    )  # fmt: skip
    np.testing.assert_allclose(made.student.mean, 0.7, atol=0.01)
    np.testing.assert_allclose(jnp.exp(made.student.log_std), 0.5, atol=0.01)


def adam(steps):
    return optax.adam(optax.cosine_decay_schedule(3e-2, steps))


def test_training_needs_no_teacher():
    data = gk.data.Generated(draw_gaussian, 512)
    made = gk.distill.consistency(
        None, Affine(jnp.zeros(1), jnp.zeros(1)), grid=gk.diffusion.karras(40, 0.01, 5.0), num_steps=500, data=data,
        optimizer=adam(500), metric="l2", ema=0.98, key=jr.key(0),
    )  # fmt: skip
    np.testing.assert_allclose(made.ema.mean, 0.7, atol=0.05)
    np.testing.assert_allclose(jnp.exp(made.ema.log_std), 0.5, atol=0.05)


def draw_gaussian(num, *, key):
    return 0.7 + 0.5 * jr.normal(key, (num, 1))


@pytest.mark.long
def test_a_network_learns_the_table():
    with jax.enable_x64(False):
        net = gk.nn.MLP((1,), width=64, depth=2, key=jr.key(0))
        student = gk.distill.ConsistencyModel(net, 1.4, 0.02)
        made = gk.distill.consistency(
            mixture("B"), student, grid=gk.diffusion.karras(40, 0.02, 5.0, final=None), num_steps=4000, batch_size=512,
            metric="l2", ema=0.998, key=jr.key(1),
        )  # fmt: skip
        error = max(
            float(jnp.max(jnp.abs(jax.vmap(lambda x, s=s: made.ema(x, s))(jnp.asarray(X[1:4, None], jnp.float32))[:, 0]
                                  - jnp.asarray(TABLE["B", s][1:4]))))
            for s in (4.0, 1.0)
        )  # fmt: skip
    assert error < 0.05, error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": [1.0, 2.0]}, "descend"),
        ({"grid": [2.0]}, "descend"),
        ({"student": lambda x, sigma, cond=None: 0.5 * x}, "identity"),
        ({"student": lambda x, sigma, cond=None: x[:1] * jnp.ones(3)}, "shape"),
        ({"teacher": None}, "data"),
        ({"metric": "lpips"}, "metric"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_wrong_input(options, words):
    arguments = {
        "teacher": gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0),
        "student": lambda x, sigma, cond=None: x,
        "grid": [2.0, 1.0, 0.0],
        "num_steps": 2,
        "key": jr.key(0),
    } | options
    with pytest.raises(ValueError, match=words):
        gk.distill.consistency(arguments.pop("teacher"), arguments.pop("student"), **arguments)
