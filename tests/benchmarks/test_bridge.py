"""Light bridges beside hand-written JAX, exact paths beside Euler, Sinkhorn beside OTT and POT where installed."""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import genkit as gk
from genkit.bridge._fit_light import run_adam, start_bridge
from genkit.bridge._objectives import LightObjective, UnpairedBatches


pytestmark = pytest.mark.benchmark


def best_of(fn, repeats=5):
    """Seconds of the fastest call, compilation apart."""
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def test_fit_step_against_hand_written_jax():
    """K = 10, d = 50, batch 128, diagonal: microseconds per step, Adam included."""
    k, d, batch, steps, epsilon = 10, 50, 128, 2000, jnp.asarray(0.1)
    key0, key1, key = jr.split(jr.key(0), 3)
    x0, x1 = jr.normal(key0, (7000, d)), 1.5 * jr.normal(key1, (7000, d)) + 1.0
    start = start_bridge(x0, x1, epsilon, k, scale="diag", init="balanced", rank=1, key=jr.key(1))
    data, rate = UnpairedBatches(x0, x1, batch), jnp.asarray(1e-3)

    def ours():
        args = (rate, jnp.asarray(1.0), epsilon)
        return run_adam(
            start, data, LightObjective(), args, (x0[:100], x1[:100]), key,
            num_steps=steps, guard=False, published=True,
        )[1]  # fmt: skip

    optimizer = optax.adam(1e-3)

    @jax.jit
    def by_hand(params, x0, x1, key):
        def loss(params, a, b):
            log_a, r, log_s = params
            s = jnp.exp(log_s)
            log_c = jax.nn.logsumexp(log_a + (a**2 @ s.T + 2 * a @ r.T) / (2 * epsilon), axis=1)
            inverse = jnp.exp(-log_s)
            quadratic = b**2 @ inverse.T - 2 * b @ (r * inverse).T + jnp.sum(r * r * inverse, 1)
            log_n = -quadratic / (2 * epsilon) - 0.5 * log_s.sum(1) - 0.5 * d * jnp.log(2 * jnp.pi * epsilon)
            return log_c.mean() - jax.nn.logsumexp(log_a + log_n, axis=1).mean()

        def step(carry, i):
            params, state = carry
            key_a, key_b = jr.split(jr.fold_in(key, i))
            a = x0[jr.randint(key_a, (batch,), 0, x0.shape[0])]
            b = x1[jr.randint(key_b, (batch,), 0, x1.shape[0])]
            value, gradient = jax.value_and_grad(loss)(params, a, b)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[1]

    params = (start.log_weights, start.shifts, start.scale.log_values)
    ratios = []
    for _ in range(3):  # interleaved, so that a busy machine disturbs both alike
        mine, hand = best_of(ours, 3), best_of(lambda: by_hand(params, x0, x1, key), 3)
        ratios.append(mine / hand)
        print(f"genkit {mine / steps * 1e6:.0f} us/step, by hand {hand / steps * 1e6:.0f} us/step, {ratios[-1]:.2f}")
    assert min(ratios) < 1.1


def test_exact_paths_against_euler_at_equal_error():
    """Draws per second of the end point: the exact sampler has no error, Euler needs steps for a small one."""
    key_potential, key = jr.split(jr.key(0))
    shifts = 2.0 * jr.normal(key_potential, (10, 16))
    bridge = gk.bridge.light(jnp.zeros(10), shifts, jnp.full((10, 16), 0.5), 0.1)
    x0 = jnp.zeros((2000, 16))
    exact = jax.jit(
        lambda b, x, key: gk.bridge.ExactPaths().draw(b, jr.split(key, 2000), cond=None, x_init=x, shape=(16,)).value
    )
    seconds = best_of(lambda: exact(bridge, x0, key))
    print(f"exact: {2000 / seconds:.0f} draws/s")
    variance = float(bridge.coupling(x0[0]).variance.sum())
    for steps in (10, 100, 500):
        euler = jax.jit(
            lambda b, x, key, steps=steps: (
                gk.bridge.EulerPaths(steps).draw(b, jr.split(key, 2000), cond=None, x_init=x, shape=(16,)).value
            )
        )
        slow = best_of(lambda euler=euler: euler(bridge, x0, key), 3)
        error = abs(float(jnp.var(euler(bridge, x0, key), 0).sum()) / variance - 1)
        print(f"Euler {steps}: {2000 / slow:.0f} draws/s, relative error of the variance {error:.3f}")
    assert seconds < slow / 5


def test_sinkhorn_against_ott_and_pot():
    """Equal marginal error, epsilon converted: their cost is |x-y|^2, so their regularization is 2 epsilon."""
    x, y = np.asarray(jr.normal(jr.key(0), (1000, 2))), np.asarray(jr.normal(jr.key(1), (1000, 2))) + 1.0
    epsilon = 0.1
    ours = best_of(lambda: gk.bridge.sinkhorn(x, y, epsilon, tol=1e-4).potentials, 3)
    print(f"genkit {ours * 1e3:.0f} ms")
    try:
        import ott
        from ott.geometry import pointcloud
        from ott.solvers import linear
    except ImportError:
        ott = None
    if ott is not None:
        solve = jax.jit(
            lambda x, y: (
                linear.solve(pointcloud.PointCloud(x, y, epsilon=2 * epsilon), threshold=1e-4, max_iterations=10_000).f
            )
        )
        print(f"OTT {best_of(lambda: solve(x, y), 3) * 1e3:.0f} ms")
    try:
        import ot
    except ImportError:
        ot = None
    if ot is not None:
        weights, cost = np.full(1000, 1e-3), ot.dist(x, y)
        start = time.perf_counter()
        ot.sinkhorn(weights, weights, cost, 2 * epsilon, method="sinkhorn_log", stopThr=1e-4, numItermax=10_000)
        print(f"POT {(time.perf_counter() - start) * 1e3:.0f} ms")
    assert bool(gk.bridge.sinkhorn(x, y, epsilon, tol=1e-4).converged)
