"""What guidance costs beyond its evaluations, and what skipping saves on the clock; run with `-m benchmark`."""

import re
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import genkit as gk


pytestmark = pytest.mark.benchmark
gd, gg = gk.diffusion, gk.guidance
DIM = 64


class Network(eqx.Module):
    """A perceptron heavy enough that its evaluations decide; prefers the mean of its label."""

    layers: tuple

    def __init__(self, width, depth):
        sizes = [DIM, *[width] * depth, DIM]
        keys = jr.split(jr.key(0), len(sizes) - 1)
        self.layers = tuple(eqx.nn.Linear(i, o, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True))

    def __call__(self, x, sigma, cond=None):
        label = jnp.asarray(-1 if cond is None else cond)
        mean = jnp.where(label < 0, 0.0, jnp.sin(jnp.arange(DIM) * (1.0 + label)))
        h = x / jnp.sqrt(1 + sigma**2)
        for layer in self.layers[:-1]:
            h = jax.nn.silu(layer(h))
        exact = mean + (x - mean) * 0.25 / (0.25 + sigma**2)
        return exact + 1e-3 * self.layers[-1](h)


def median_times(*runs, repeats=7):
    """Interleaved medians after one warm-up each."""
    for run in runs:
        jax.block_until_ready(run())
    times = [[] for _ in runs]
    for _ in range(repeats):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def sampler_run(network, table, guidance, n, plan="dynamic"):
    sampler = gk.Sampler(table, guidance, plan=plan)
    cond = jnp.arange(n) % 4
    return lambda: gk.sample(sampler, network, n, cond=cond, shape=(DIM,), key=jr.key(1)).value


def test_a_guided_step_costs_its_passes():
    # Passes of 20 ms or more: two passes of the bare network in a scan against one guided step, both compiled.
    n, network = 256, Network(1536, 4)
    table = gd.ddim(gd.karras(6, 0.01, 10.0))
    cond = jnp.arange(n) % 4

    @eqx.filter_jit
    def passes(network, x):
        def two(x, sigma):
            given = jax.vmap(lambda y, c: network(y, sigma, c))(x, cond)
            null = jax.vmap(lambda y: network(y, sigma))(x)
            return 0.5 * given + 0.5 * null, None

        return jax.lax.scan(two, x, jnp.asarray(table.sigma, x.dtype))[0]

    x = jr.normal(jr.key(0), (n, DIM))
    rows = [("passes alone", lambda: passes(network, x))]
    for name, guidance in {
        "cfg": gg.cfg(3.0),
        "apg": gg.apg(3.0, norm_rms=0.3, momentum=-0.5),
        "sum": gg.cfg(2.0) + gg.apg(2.0) >> gg.Rescale(0.5),
    }.items():
        rows.append((name, sampler_run(network, table, guidance, n)))
    times = median_times(*(run for _, run in rows))
    for (name, _), elapsed in zip(rows, times, strict=True):
        print(f"{name:14s} {1e3 * elapsed / 12:6.2f} ms per pass, {elapsed / times[0]:.3f} of the passes")
    assert times[0] / 12 > 0.02, "the passes are too light to judge by"
    assert max(times[1:]) <= 1.05 * times[0]


def test_calls_in_the_compiled_program():
    # One product per layer and distinct evaluation: equal slots of a sum are merged, nothing is evaluated twice.
    network, n = Network(96, 2), 8
    table = gd.ddim(gd.karras(6, 0.01, 10.0))
    guidance = gg.cfg(2.0) + gg.apg(2.0) + gg.negative(1.5, 2) + gg.perpneg(1.2, 2)
    call = {"cond": jnp.arange(n) % 4, "x_init": None, "shape": (DIM,)}
    keys = jr.split(jr.key(0), n)
    text = str(jax.make_jaxpr(lambda: gk.Sampler(table, guidance).draw(network, keys, **call).value)())
    assert len(re.findall(r"dot_general", text)) == 3 * 3


def test_adaptive_guidance_saves_time():
    n, network = 128, Network(1024, 4)
    table = gd.ddim(gd.karras(32, 0.002, 80.0))
    guided = gk.sample(table, network, n, cond=jnp.arange(n) % 4, shape=(DIM,), key=jr.key(1), guidance=gg.cfg(3.0))
    gated = gk.Sampler(table, gg.adaptive(gg.cfg(3.0), 0.99), plan="compact")
    draws = gk.sample(gated, network, n, cond=jnp.arange(n) % 4, shape=(DIM,), key=jr.key(1))
    saved = 1 - float(draws.nfe.sum()) / float(guided.nfe.sum())
    runs = [sampler_run(network, table, gg.cfg(3.0), n)]
    runs.append(sampler_run(network, table, gg.adaptive(gg.cfg(3.0), 0.99), n, "compact"))
    full, short = median_times(*runs)
    gain = 1 - short / full
    print(f"{1e3 * full / 64:.1f} ms per pass; evaluations saved {saved:.3f}, time saved {gain:.3f}")
    assert full / 64 > 0.005 and saved > 0.1
    assert gain >= 0.8 * saved
