"""Speed of simulation against a hand-written scan and against diffrax; compile time apart, medians.

Run by hand: `pytest tests/benchmarks/test_sde.py -m benchmark -s -n0 -p no:jaxtyping`; prints one line per cell.
"""

import functools
import statistics
import time
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit.noise as gn
import genkit.sde as gs


pytestmark = [pytest.mark.benchmark, pytest.mark.key_reuse]  # diffrax consumes its keys twice


def compare(functions, x0, repeats):
    """Compile time and median time of each program, in seconds; runs interleaved, so that a busy machine hits all."""
    compiled, times = {}, {name: [] for name in functions}
    for name, function in functions.items():
        start = time.perf_counter()
        jax.block_until_ready(function(x0))
        compiled[name] = time.perf_counter() - start
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(x0))
            times[name].append(time.perf_counter() - start)
    return {name: (compiled[name] - min(t), statistics.median(t)) for name, t in times.items()}


def drift_of(kind) -> Any:
    if kind == "scalar":
        return lambda t, x: -x
    return eqx.nn.MLP(1, 1, 200, 2, activation=jnp.tanh, key=jr.key(0)).__call__


def as_drift(kind):
    function = drift_of(kind)
    return function if kind == "scalar" else lambda t, x: function(x)


def ours(drift, lift, hurst, steps, start):
    sde = gs.FractionalSDE(drift, gs.Constant(0.5), lift, hurst, 1.0, x0=start)
    return lambda key: gs.simulate(sde, np.array([1.0]), max_step=1 / steps, key=key).x[-1]


def by_hand(drift, steps, start):
    """The same midpoint step with its noise drawn beforehand, as one would write it for this problem alone."""
    h = 1.0 / steps

    def run(key):
        noise = 0.5 * h**0.5 * jr.normal(key, (steps, 1))

        def body(x, dw):
            middle = x + h / 2 * drift(0.0, x) + dw / 2
            return x + h * drift(0.0, middle) + dw, None

        return jax.lax.scan(body, start, noise)[0]

    return run


def diffrax_euler(drift, steps, start):
    def run(key):
        tree = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5 / steps, (1,), key)
        control = diffrax.ControlTerm(lambda t, y, args: 0.5 * jnp.eye(1), tree)
        terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: drift(t, y)), control)
        out = diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, 1.0 / steps, start, max_steps=steps + 8)
        assert out.ys is not None
        return out.ys[-1]

    return run


def batched(maker, gradient, batch):
    keys = jr.split(jr.key(0), batch)
    forward = lambda x0: jax.vmap(maker(x0))(keys).mean()
    return jax.jit(jax.value_and_grad(forward)) if gradient else jax.jit(forward)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("batch", [32, 256, 1024])
@pytest.mark.parametrize("kind", ["scalar", "network"])
def test_against_a_scan_and_diffrax(kind, batch, steps, gradient):
    drift = as_drift(kind)
    makers = {
        "ours K=0": lambda x0: ours(drift, gn.brownian(), 0.5, steps, x0),
        "by hand": lambda x0: by_hand(drift, steps, x0),
        "diffrax": lambda x0: diffrax_euler(drift, steps, x0),
    }
    functions = {name: batched(maker, gradient, batch) for name, maker in makers.items()}
    result = compare(functions, jnp.array([0.3]), repeats=9 if kind == "scalar" else 3)
    ratio, gain = (result[n][1] / result["ours K=0"][1] for n in ("by hand", "diffrax"))
    line = " ".join(f"{n} {t * 1e3:.2f} ms (compile {c:.1f} s)" for n, (c, t) in result.items())
    print(
        f"\n{kind} batch {batch} steps {steps} grad {gradient}: {line}; scan ratio {1 / ratio:.2f}, diffrax {gain:.1f}x"
    )
    assert 1 / ratio <= 1.2
    if kind == "scalar":
        assert gain >= 10
    elif batch == 256:
        assert gain >= 7


@pytest.mark.parametrize("threads", [1, 2])
def test_against_torchsde(threads):
    """Scalar drift, Euler with a fixed step, forward."""
    torch, torchsde = pytest.importorskip("torch"), pytest.importorskip("torchsde")
    batch, steps = 1024, 1000
    torch.set_num_threads(threads)

    class Theirs(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, t, y):
            return -y

        def g(self, t, y):
            return torch.full_like(y, 0.5)

    start, ends = torch.full((batch, 1), 0.3), torch.tensor([0.0, 1.0])

    def theirs(x0):
        with torch.no_grad():
            torchsde.sdeint(Theirs(), start, ends, dt=1 / steps, method="euler")
        return x0

    mine = batched(lambda x0: ours(as_drift("scalar"), gn.brownian(), 0.5, steps, x0), False, batch)
    result = compare({"ours": mine, "torchsde": theirs}, jnp.array([0.3]), repeats=5)
    gain = result["torchsde"][1] / result["ours"][1]
    print(f"\n{threads} threads: ours {1e3 * result['ours'][1]:.2f} ms, torchsde {gain:.1f}x")
    assert gain >= 5


@pytest.mark.parametrize("kind", ["scalar", "network"])
def test_cost_of_fractional_noise(kind):
    batch, steps, drift = 256, 500, as_drift(kind)
    functions = {}
    for terms in (0, 1, 5, 8):
        lift = gn.ma_fbm(terms, 0.05, 1e3) if terms else gn.brownian()
        maker = functools.partial(ours, drift, lift, 0.7 if terms else 0.5, steps)
        functions[terms] = batched(maker, False, batch)
    times = {k: t for k, (_, t) in compare(functions, jnp.array([0.3]), repeats=5).items()}
    print(f"\n{kind}, batch {batch}, {steps} steps:", {k: f"{1e3 * t:.2f} ms" for k, t in times.items()})
    assert times[0] < times[8]
