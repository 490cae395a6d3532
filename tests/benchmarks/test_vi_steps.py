"""Gradient steps of programs against hand-written JAX and numpyro's SVI losses: the same estimator on every side."""

import math
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO

from genkit import vi


pytestmark = [pytest.mark.benchmark, pytest.mark.key_reuse]  # timings repeat one key
PARTICLES = 64


def cone():
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    y = numpyro.sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    numpyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=5.0)


def cone_guide(t):
    numpyro.sample("x", dist.Normal(t[0], jnp.exp(t[2])))
    numpyro.sample("y", dist.Normal(t[1], jnp.exp(t[3])))


def log_normal(x, loc, log_scale):
    return -0.5 * ((x - loc) * jnp.exp(-log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


def hand_elbo(t, key):
    key_x, key_y = jr.split(key)
    x = t[0] + jnp.exp(t[2]) * jr.normal(key_x)
    y = t[1] + jnp.exp(t[3]) * jr.normal(key_y)
    r = x**2 + y**2
    log_p = log_normal(x, 0.0, math.log(10.0)) + log_normal(y, 0.0, math.log(10.0))
    log_p = log_p + log_normal(5.0, r, jnp.log(0.1 + r / 100))
    return log_p - log_normal(x, t[0], t[2]) - log_normal(y, t[1], t[3])


def ours(t, key):
    return vi.E(lambda: vi.elbo(vi.program(cone)(), vi.program(cone_guide)(t)))(key=key)


def by_numpyro(t, key):
    def guide():
        cone_guide(numpyro.param("t", t))

    return -Trace_ELBO().loss(key, {"t": t}, cone, guide)


def measure(fns, rounds=40, inner=200):
    """Median time of one step of each, in alternation, inside one compiled loop of `inner` steps."""
    t = jnp.array([2.0, 0.1, -2.0, -1.0])

    def loop(fn):
        def mean(t, key):
            return jnp.mean(jax.vmap(lambda k: fn(t, k))(jr.split(key, PARTICLES)))

        def step(t, i):
            return t + 1e-6 * jax.grad(mean)(t, jr.fold_in(jr.key(0), i)), None

        return jax.jit(lambda t: jax.lax.scan(step, t, jnp.arange(inner))[0])

    compiled, compile_times = [], []
    for fn in fns:
        begin = time.perf_counter()
        compiled.append(loop(fn).lower(t).compile())
        compile_times.append(time.perf_counter() - begin)
    times = [[] for _ in fns]
    for _ in range(rounds):
        for run, seen in zip(compiled, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run(t))
            seen.append((time.perf_counter() - begin) / inner)
    return [float(np.min(seen)) for seen in times], compile_times


def test_cone_elbo_step(capsys):
    (mine, hand, peer), compile_times = measure([ours, hand_elbo, by_numpyro])
    with capsys.disabled():
        print(f"\ncone ELBO, {PARTICLES} particles: genkit {mine * 1e6:.1f} us, by hand {hand * 1e6:.1f} us "
              f"(ratio {mine / hand:.3f}), numpyro {peer * 1e6:.1f} us (ratio {mine / peer:.3f}); "
              f"compile {compile_times[0]:.2f} / {compile_times[1]:.2f} / {compile_times[2]:.2f} s")  # fmt: skip
    assert mine <= 1.10 * hand
    assert mine <= 1.05 * peer
