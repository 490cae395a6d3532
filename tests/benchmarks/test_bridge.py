"""Light bridges beside hand-written JAX and torch, Sinkhorn beside OTT and POT, exact paths beside Euler.

Run with `pytest tests/benchmarks/test_bridge.py -m benchmark -s -n 0 -o addopts=--import-mode=importlib` (without the
suite's own options, which check types at run time). The peers are optional. Times are medians of interleaved calls,
compilation apart.
"""

import functools
import time
import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from timing import medians

import genkit as gk


pytestmark = pytest.mark.benchmark
K, DIM, BATCH, EPSILON = 10, 50, 128, 0.1


@functools.cache
def generated_pair():
    """A pair of ten diagonal components in fifty dimensions, with 7,000 samples of each end."""
    key_means, key_values, key_sample = jr.split(jr.key(0), 3)
    means = jr.normal(key_means, (K, DIM))
    means = 4.0 * means / jnp.linalg.norm(means, axis=-1, keepdims=True)
    covs = jr.uniform(key_values, (K, DIM), minval=0.1, maxval=1.0)
    source = (jnp.ones(1), jnp.zeros((1, DIM)), jnp.ones((1, DIM)))
    pair = gk.bridge.mixture_pair(source, (jnp.full(K, 1.0 / K), means, covs), EPSILON)
    return pair, pair.sample(7000, key=key_sample)


def published_start(x1, key):
    """The published start as arrays: epsilon times log-weights, shifts at random targets, log-scales of one."""
    shifts = x1[jr.choice(key, x1.shape[0], (K,), replace=False)]
    return jnp.full(K, -EPSILON * jnp.log(K)), shifts, jnp.zeros((K, DIM))


@functools.partial(jax.jit, static_argnames="steps")
def by_hand(params, x0, x1, key, rate, *, steps):
    """The published recipe in plain JAX: matrix products, Adam, one scan."""
    optimizer = optax.adam(rate)

    def loss(params, a, b):
        raw, r, log_s = params
        log_a, s, inverse = raw / EPSILON, jnp.exp(log_s), jnp.exp(-log_s)
        log_c = jax.nn.logsumexp(log_a + (a**2 @ s.T + 2 * a @ r.T) / (2 * EPSILON), axis=1)
        quadratic = b**2 @ inverse.T - 2 * b @ (r * inverse).T + jnp.sum(r * r * inverse, 1)
        log_n = -quadratic / (2 * EPSILON) - 0.5 * log_s.sum(1) - 0.5 * DIM * jnp.log(2 * jnp.pi * EPSILON)
        return log_c.mean() - jax.nn.logsumexp(log_a + log_n, axis=1).mean()

    def step(carry, i):
        params, state = carry
        key_a, key_b = jr.split(jr.fold_in(key, i))
        a = x0[jr.randint(key_a, (BATCH,), 0, x0.shape[0])]
        b = x1[jr.randint(key_b, (BATCH,), 0, x1.shape[0])]
        value, gradient = jax.value_and_grad(loss)(params, a, b)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


def by_torch(params, x0, x1, rate, *, steps, fused):
    """The same recipe in torch; inputs and result are arrays."""
    import torch

    parts = [torch.tensor(np.asarray(part), requires_grad=True) for part in params]
    x0, x1 = torch.tensor(np.asarray(x0)), torch.tensor(np.asarray(x1))
    optimizer = torch.optim.Adam(parts, lr=rate, fused=fused)
    raw, r, log_s = parts
    constant = 0.5 * DIM * float(np.log(2 * np.pi * EPSILON))
    for _ in range(steps):
        a, b = x0[torch.randint(len(x0), (BATCH,))], x1[torch.randint(len(x1), (BATCH,))]
        log_a, s, inverse = raw / EPSILON, log_s.exp(), (-log_s).exp()
        log_c = torch.logsumexp(log_a + (a**2 @ s.T + 2 * a @ r.T) / (2 * EPSILON), 1)
        quadratic = b**2 @ inverse.T - 2 * b @ (r * inverse).T + (r * r * inverse).sum(1)
        log_n = -quadratic / (2 * EPSILON) - 0.5 * log_s.sum(1) - constant
        loss = log_c.mean() - torch.logsumexp(log_a + log_n, 1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return [part.detach().numpy() for part in parts]


def best_torch(params, x0, x1):
    """The quickest of torch's thread counts and Adams, by 300 steps each: (threads, fused)."""
    import torch

    seconds = {}
    for threads in (1, 2):
        for fused in (False, True):
            torch.set_num_threads(threads)
            by_torch(params, x0, x1, 1e-3, steps=50, fused=fused)
            began = time.perf_counter()
            by_torch(params, x0, x1, 1e-3, steps=300, fused=fused)
            seconds[threads, fused] = time.perf_counter() - began
    threads, fused = min(seconds, key=seconds.get)
    torch.set_num_threads(threads)
    return threads, fused


def test_fit_step_against_hand_written_jax():
    """K = 10, d = 50, batch 128, diagonal: microseconds per step, Adam included, from calls of two lengths."""
    short, long = 500, 2500
    _, (x0, x1) = generated_pair()
    params = published_start(x1, jr.key(3))

    def ours(steps, init, guard):
        fit = gk.bridge.fit_light(
            x0, x1, EPSILON, K, init=init, guard=guard, num_steps=steps, batch_size=BATCH, key=jr.key(2)
        )
        return fit.report.objective

    def hand(steps):
        return by_hand(params, x0, x1, jr.key(2), jnp.asarray(1e-3), steps=steps)

    runs = {}
    for steps in (short, long):
        runs["genkit", steps] = functools.partial(ours, steps, "published", None)
        runs["by hand", steps] = functools.partial(hand, steps)
        runs["genkit, anchored and guarded", steps] = functools.partial(ours, steps, "balanced", True)
    seconds = medians(runs, repeats=7)
    # The difference of two lengths is free of the start, the report and the compilation.
    per_step = {name: (seconds[name, long] - seconds[name, short]) / (long - short) for name, _ in runs}
    print({name: f"{1e6 * value:.0f} us/step" for name, value in per_step.items()})
    print(f"ratio {per_step['genkit'] / per_step['by hand']:.2f}")
    assert per_step["genkit"] < 1.1 * per_step["by hand"]


def test_fit_step_against_torch():
    pytest.importorskip("torch")
    steps, rate = 1000, 1e-3
    _, (x0, x1) = generated_pair()
    params = published_start(x1, jr.key(3))
    threads, fused = best_torch(params, x0, x1)
    fit = functools.partial(
        gk.bridge.fit_light, x0, x1, EPSILON, K, init="published", num_steps=steps, batch_size=BATCH, key=jr.key(2)
    )
    seconds = medians(
        {
            "genkit, the whole call": lambda: fit()[1].objective,
            "torch": lambda: by_torch(params, x0, x1, rate, steps=steps, fused=fused),
        },
        repeats=3,
    )
    print({name: f"{1e6 * value / steps:.0f} us/step" for name, value in seconds.items()}, threads, fused)
    assert seconds["genkit, the whole call"] < seconds["torch"]


def plan_kl_of(pair, params):
    raw, r, log_s = (jnp.asarray(part) for part in params)
    return _judge(pair, gk.bridge.light(raw / EPSILON, r, jnp.exp(log_s), EPSILON))


def _judge(pair, bridge):
    y0, y1 = pair.sample(4000, key=jr.key(99))
    return float(gk.bridge.plan_kl(pair.bridge, bridge, y0, y1))


def test_time_to_target():
    """Seconds to the divergence at which the published recipe ends after 10,000 steps."""
    pair, (x0, x1) = generated_pair()
    params, steps = published_start(x1, jr.key(3)), 10_000
    recipe = functools.partial(by_hand, params, x0, x1, jr.key(2), jnp.asarray(1e-3), steps=steps)
    target = plan_kl_of(pair, recipe())
    for ours in (100, 200, 400, 800, 1600, 3200):
        fit = functools.partial(
            gk.bridge.fit_light, x0, x1, EPSILON, K, num_steps=ours, batch_size=BATCH, key=jr.key(4)
        )
        reached = _judge(pair, fit()[0])
        if reached <= target:
            break
    seconds = medians({"genkit": lambda: fit()[1].objective, "by hand": recipe}, repeats=3)
    print(f"target KL {target:.3f}; genkit {reached:.3f} after {ours} steps", seconds)
    assert reached <= target
    assert seconds["genkit"] < 1.1 * seconds["by hand"]
    try:
        threads, fused = best_torch(params, x0, x1)
    except ImportError:
        return
    began = time.perf_counter()
    theirs = by_torch(params, x0, x1, 1e-3, steps=steps, fused=fused)
    spent = time.perf_counter() - began
    print(f"torch, {threads} thread(s): {spent:.2f} s to KL {plan_kl_of(pair, theirs):.3f}")
    assert seconds["genkit"] < spent


def test_exact_paths_against_euler_at_equal_error():
    """End points from one start: BW2-UVP of 10,000 draws, whose floor the exact sampler shows, and draws per second."""
    n, d, k = 10_000, 16, 10
    key_shifts, key = jr.split(jr.key(0))
    bridge = gk.bridge.light(jnp.zeros(k), 2.0 * jr.normal(key_shifts, (k, d)), jnp.full((k, d), 0.5), EPSILON)
    start = jnp.zeros(d)  # from here all ten components are as likely
    x0, keys = jnp.broadcast_to(start, (n, d)), jr.split(key, n)
    law = bridge.coupling(start)
    probs, means = law.mixing_distribution.probs, law.component_distribution.mean
    spread = (probs[:, None] * (means - law.mean)).T @ (means - law.mean)
    covariance = spread + 0.5 * EPSILON * jnp.eye(d)

    @jax.jit
    def draw(sampler, bridge, x0):
        return sampler.draw(bridge, keys, cond=None, x_init=x0, shape=(d,)).value

    def error(sampler):
        ends = draw(sampler, bridge, x0)
        total = jnp.trace(covariance)
        return float(gk.bridge.bw2_uvp(ends.mean(0), jnp.cov(ends.T), law.mean, covariance, total))

    samplers = {"exact": gk.bridge.ExactPaths()} | {n: gk.bridge.EulerPaths(n) for n in (10, 30, 100, 300)}
    errors = {name: error(sampler) for name, sampler in samplers.items()}
    equal = next((name for name in list(errors)[1:] if errors[name] <= 1.5 * errors["exact"]), 300)
    calls = {name: functools.partial(draw, samplers[name], bridge, x0) for name in ("exact", equal)}
    seconds = medians(calls, repeats=3)
    print({name: f"{value:.4f} %" for name, value in errors.items()})
    print({name: f"{n / value:.0f} draws/s" for name, value in seconds.items()})
    assert seconds["exact"] < seconds[equal] / 5


def matched(solve, target):
    """A solver's own threshold at which its plan's true marginal error is at most the target."""
    for threshold in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7):
        plan = np.asarray(solve(threshold)[1](), np.float64)
        error = np.abs(plan.sum(0) - 1 / plan.shape[1]).sum() + np.abs(plan.sum(1) - 1 / plan.shape[0]).sum()
        if error <= target:
            return threshold, error
    raise AssertionError(f"no threshold reaches a marginal error of {target}")


def ott_solver(x, y, epsilon):
    """OTT in the log domain, float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what OTT itself imports
        from ott.geometry import pointcloud
        from ott.solvers import linear

    @functools.partial(jax.jit, static_argnames="threshold")
    def run(x, y, threshold):
        cloud = pointcloud.PointCloud(x, y, epsilon=2 * epsilon)
        return linear.solve(cloud, threshold=threshold, max_iterations=10_000)

    def solve(threshold):
        result = run(x, y, threshold=threshold)
        return result.f, lambda: result.matrix

    return solve


def pot_solver(x, y, epsilon):
    """POT in the log domain, NumPy."""
    import ot

    weights, cost = np.full(len(x), 1 / len(x)), ot.dist(x, y)
    options = {"method": "sinkhorn_log", "numItermax": 10_000, "warn": False}

    def solve(threshold):
        plan = ot.sinkhorn(weights, weights, cost, 2 * epsilon, stopThr=threshold, **options)
        return plan, lambda: plan

    return solve


@pytest.mark.parametrize("epsilon", [0.1, 0.02])
def test_sinkhorn_against_ott_and_pot(epsilon):
    """Equal true marginal error (1e-3 in all), epsilon converted: their cost is |x-y|^2, so theirs is 2 epsilon."""
    x, y = np.asarray(jr.normal(jr.key(0), (1000, 2))), np.asarray(jr.normal(jr.key(1), (1000, 2))) + 1.0

    def ours(tol):
        plan = gk.bridge.sinkhorn(x, y, epsilon, tol=tol)
        return plan.potentials, lambda: plan.plan

    solvers = {"genkit": ours}
    for name, make in (("OTT", ott_solver), ("POT", pot_solver)):
        try:
            solvers[name] = make(x, y, epsilon)
        except ImportError:
            print(f"{name} is not installed")
    calls = {}
    for name, solve in solvers.items():
        threshold, error = matched(solve, 1e-3)
        calls[name] = lambda solve=solve, threshold=threshold: solve(threshold)[0]
        print(f"{name}: threshold {threshold}, marginal error {error:.1e}")
    seconds = medians(calls, repeats=3)
    print(f"epsilon {epsilon}", {name: f"{1e3 * value:.0f} ms" for name, value in seconds.items()})
    assert all(seconds["genkit"] <= 1.1 * value for value in seconds.values())
