"""Tables on a mixture of three Gaussians in the plane: paths beside those of the exact flow, and the law of draws."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


gd = gk.diffusion
SIGMA_MIN, SIGMA_MAX, ROWS = 0.02, 10.0, 200
pytestmark = pytest.mark.slow

# Root mean square distance to the exact flow, log-uniform grid from 10 to 0.02, at 12, 24, ... 192 evaluations, as
# tabulated for these methods; and the order of the median distance.
PATHS = {
    "ddim": (gd.ddim, 1, "1.8e-1 1.2e-1 5.3e-2 2.9e-2 2.3e-2", 1),
    "heun": (gd.heun, 2, "1.6e-1 4.6e-2 1.7e-2 2.6e-3 6.4e-4", 2),
    "dpmpp 2": (gd.dpmpp, 1, "7.1e-2 2.4e-2 8.6e-3 1.3e-3 3.2e-4", 2),
    "dpmpp 3": (lambda g: gd.dpmpp(g, 3), 1, "4.1e-2 7.9e-3 1.4e-3 2.8e-4 6.2e-5", 2),
    "unipc 2": (lambda g: gd.unipc(g, 2), 1, "4.5e-2 8.6e-3 1.3e-3 1.9e-4 2.4e-5", 3),
    "unipc 3": (gd.unipc, 1, "3.2e-2 6.2e-3 3.6e-4 2.1e-5 1.3e-6", 4),
}

# Energy distance of 2,048 draws to as many exact ones, Karras grid from 10 to 0.02, by number of steps, as tabulated.
LAWS = {
    "ddim": (gd.ddim, {5: 0.026, 10: 0.005, 50: 0.001}),
    "dpmpp 2": (gd.dpmpp, {5: 0.031, 10: 0.001}),
    "unipc 3": (gd.unipc, {5: 0.018, 10: 0.001}),
    "heun": (gd.heun, {5: 0.018, 10: 0.001}),
}


def mixture():
    covs = [[[0.09, 0.02], [0.02, 0.04]], [[0.04, -0.01], [-0.01, 0.09]], [[0.0625, 0.0], [0.0, 0.0625]]]
    means = [[-1.5, 0.0], [1.5, 0.5], [0.0, 1.5]]
    return gd.MixtureDenoiser(jnp.array([0.5, 0.3, 0.2]), jnp.array(means), jnp.array(covs))


def flow(table, x):
    return np.asarray(gk.sample(table, mixture(), len(x), key=jr.key(0), x_init=x).value)


def grid_of(steps):
    return gd.log_uniform(steps + 1, SIGMA_MIN, SIGMA_MAX, final=None)


@functools.cache
def exact():
    """Starts and ends of the exact flow: UniPC in 4,000 steps, which is off by less than 1e-8."""
    x = SIGMA_MAX * jr.normal(jr.key(0), (128, 2))
    return x, flow(gd.unipc(grid_of(4000)), x)


@pytest.mark.parametrize("name", PATHS)
def test_paths_converge_to_the_exact_flow(name, x64):
    make, evaluations, printed, order = PATHS[name]
    x, ends = exact()
    tables = [make(grid_of(n // evaluations)).pad(ROWS) for n in (12, 24, 48, 96, 192)]
    distances = np.array([np.linalg.norm(flow(table, x) - ends, axis=-1) for table in tables])
    # A few paths between two basins are most of the mean square; over draws of the starts it varies by a factor of 3.
    ratio = np.sqrt(np.mean(distances**2, 1) / 2) / np.array(printed.split(), float)
    assert ratio.max() < 1.5 and ratio.min() > 0.2
    # The median path is far from that and shows the order.
    middle = np.median(distances, 1)
    assert np.log2(middle[-2] / middle[-1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_law_of_the_mixture(name):
    make, printed = LAWS[name]
    law = mixture()
    reference = law.sample(2048, key=jr.key(1)) + SIGMA_MIN * jr.normal(jr.key(3), (2048, 2))
    # From the exact law at the first level: centered noise would miss the mean of the data, by a distance of 0.002.
    x = law.sample(2048, key=jr.key(4)) + SIGMA_MAX * jr.normal(jr.key(2), (2048, 2))
    distance = jax.jit(gk.divergence.energy_distance)
    # Two sets of exact draws are 0.0005 apart on average; of a dozen pairs the worst was 0.004.
    for steps, wanted in printed.items():
        table = make(gd.karras(steps + 1, SIGMA_MIN, SIGMA_MAX, final=None)).pad(60)
        assert float(distance(flow(table, x), reference)) < wanted + 0.004
