"""Sampling against a hand-written `lax.scan` of the same sampler, same weights, same noise; compile time apart.

Run with `pytest -o addopts="--import-mode=importlib" tests/benchmarks/test_sampling.py -m benchmark -s`: without the
suite's own options, whose run-time type checks would count as ours.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from timing import compare, timed

import genkit as gk


pytestmark = pytest.mark.benchmark
STEPS = 50
GRID = gk.diffusion.karras(STEPS, 0.002, 80.0)


class Net(eqx.Module):
    """An MLP with EDM's preconditioning at unit data variance."""

    mlp: eqx.nn.MLP
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, dim, width, depth, *, key):
        self.mlp = eqx.nn.MLP(dim + 1, dim, width, depth, key=key)
        self.shape = (dim,)

    def __call__(self, x, sigma, cond=None):
        norm = jnp.sqrt(1 + sigma**2)
        return x / norm**2 + sigma / norm * self.mlp(jnp.append(x / norm, jnp.log(sigma) / 4))


def start(net, key, num_samples):
    keys = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(num_samples))
    return jax.vmap(lambda k: jr.normal(jr.fold_in(k, 0), net.shape))(keys)


@eqx.filter_jit
def hand_ddim(net, key, num_samples, grid):
    def step(x, levels):
        s, t = levels
        d = jax.vmap(lambda y: net(y, s))(x)
        return d + t / s * (x - d), None

    return jax.lax.scan(step, grid[0] * start(net, key, num_samples), (grid[:-1], grid[1:]))[0]


@eqx.filter_jit
def hand_dpmpp(net, key, num_samples, grid):
    h = jnp.log(grid[:-2] / grid[1:-1])
    r = jnp.append(jnp.ones(1), h[:-1] / h[1:])

    def step(carry, levels):
        x, before, first = carry
        s, t, h, r = levels
        d = jax.vmap(lambda y: net(y, s))(x)
        mixed = jnp.where(first, d, d + (d - before) / (2 * r))
        return (t / s * x - jnp.expm1(-h) * mixed, d, False), None

    x = grid[0] * start(net, key, num_samples)
    (x, _, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x), True), (grid[:-2], grid[1:-1], h, r))
    return jax.vmap(lambda y: net(y, grid[-2]))(x)


SAMPLERS = {"ddim": (gk.diffusion.ddim, hand_ddim), "dpmpp": (gk.diffusion.dpmpp, hand_dpmpp)}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("dim", "width", "depth", "batch", "repeats"),
    [(2, 128, 2, 64, 150), (64, 512, 3, 256, 150)],
    ids=["2-128-128-2 at 64", "64-512-512-512-64 at 256"],
)
def test_sampling_against_a_hand_written_scan(name, dim, width, depth, batch, repeats):
    make, hand = SAMPLERS[name]
    net, key, table = Net(dim, width, depth, key=jr.key(0)), jr.key(1), make(GRID)
    grid = jnp.asarray(GRID, jnp.float32)
    ours = lambda: gk.sample(table, net, batch, key=key).value
    theirs = lambda: hand(net, key, batch, grid)
    compile_ours, compile_theirs = timed(ours), timed(theirs)
    np.testing.assert_allclose(ours(), theirs(), rtol=2e-3, atol=2e-3)
    a, b, ratio = compare(ours, theirs, repeats)
    print(
        f"\n{name}, {dim}-{width} x {depth} at batch {batch}: ours {a / STEPS * 1e6:.1f} us per row, by hand "
        f"{b / STEPS * 1e6:.1f}, ratio {ratio:.3f}; first call {compile_ours:.2f} s against {compile_theirs:.2f} s"
    )
    if b / STEPS >= 1e-3:
        assert ratio <= 1.05
    else:
        assert (a - b) / STEPS < 50e-6


def test_another_sampler_or_grid_costs_no_compilation(compilations):
    net, key = Net(2, 128, 2, key=jr.key(0)), jr.key(1)
    first = timed(lambda: gk.sample(gk.diffusion.ddim(GRID), net, 64, key=key).value)
    tables = gk.diffusion.unipc(GRID), gk.diffusion.ancestral(GRID), gk.diffusion.dpmpp(GRID * 0.5, 3)
    with compilations() as count:
        switch = [timed(lambda t=table: gk.sample(t, net, 64, key=key).value) for table in tables]
    assert count() == 0
    print(f"\nfirst call {first:.2f} s; then another sampler or grid {np.median(switch) * 1e3:.1f} ms")
