"""Speed of simulation against a hand-written scan, diffrax and torchsde; compile time apart, medians.

Run by hand, one line per cell: `python -m pytest tests/benchmarks/test_sde.py -m benchmark -s -n 0 -o addopts=`
(the suite's own options would add run-time type checks). All in float32. Ours takes the midpoint step, two drift calls;
diffrax and torchsde take Euler's, one.
"""

import functools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from timing import medians, timed

import genkit.noise as gn
import genkit.sde as gs


WIDTHS = {"small network": 32, "network": 200}
pytestmark = [pytest.mark.benchmark, pytest.mark.key_reuse]  # diffrax consumes its keys twice


def compare(functions, x0, budget=2.0):
    """Compile time and median time of each program, in seconds: 3 runs to 200 within `budget` seconds a program."""
    calls = {name: functools.partial(function, x0) for name, function in functions.items()}
    first = {name: timed(call) for name, call in calls.items()}
    times = medians(calls, 200, budget)
    return {name: (first[name] - times[name], times[name]) for name in calls}


def drift_of(kind) -> Any:
    if kind == "scalar":
        return lambda t, x: -x
    return eqx.nn.MLP(1, 1, WIDTHS[kind], 2, activation=jnp.tanh, key=jr.key(0)).__call__


def as_drift(kind):
    function = drift_of(kind)
    return function if kind == "scalar" else lambda t, x: function(x)


def ours(drift, lift, hurst, steps, start):
    sde = gs.FractionalSDE(drift, gs.Constant(0.5), lift, hurst, 1.0, x0=start)
    return lambda key: gs.simulate(sde, np.array([1.0]), max_step=1 / steps, key=key).x[-1]


def by_hand(drift, steps, start):
    """The same step with its noise drawn beforehand, as one would write it for this problem alone."""
    h = 1.0 / steps

    def run(key):
        noise = 0.5 * h**0.5 * jr.normal(key, (steps, 1))

        def body(x, dw):
            middle = x + h / 2 * drift(0.0, x + dw / 4) + dw / 2
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
@pytest.mark.parametrize("kind", ["scalar", "small network", "network"])
def test_against_a_scan_and_diffrax(kind, batch, steps, gradient):
    ratio, gain = scan_and_diffrax(kind, batch, steps, gradient)
    assert ratio <= 1.2
    # Other cells are reported: there most of the time is the network's, which we call twice a step and diffrax once.
    if kind == "scalar":
        assert gain >= 10
    elif kind == "small network" and batch == 256 and not gradient:
        assert gain >= 7


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="1.2: two calls of a 200-wide network are all it takes")
def test_a_wide_network_against_diffrax():
    """Seven times faster: out of reach, as the hand-written scan, too, spends its time in the network."""
    _, gain = scan_and_diffrax("network", 256, 100, False)
    assert gain >= 7


def scan_and_diffrax(kind, batch, steps, gradient):
    """Our time over that of the scan by hand, and diffrax's over ours."""
    drift = as_drift(kind)
    makers = {
        "ours K=0": lambda x0: ours(drift, gn.brownian(), 0.5, steps, x0),
        "by hand": lambda x0: by_hand(drift, steps, x0),
        "diffrax": lambda x0: diffrax_euler(drift, steps, x0),
    }
    functions = {name: batched(maker, gradient, batch) for name, maker in makers.items()}
    result = compare(functions, jnp.array([0.3]))
    ratio, gain = (result[n][1] / result["ours K=0"][1] for n in ("by hand", "diffrax"))
    line = " ".join(f"{n} {t * 1e3:.2f} ms (compile {c:.1f} s)" for n, (c, t) in result.items())
    print(
        f"\n{kind} batch {batch} steps {steps} grad {gradient}: {line}; scan ratio {1 / ratio:.2f}, diffrax {gain:.1f}x"
    )
    return 1 / ratio, gain


def torchsde_euler(kind, batch, steps, gradient):
    """The same problem in torchsde: Euler with a fixed step, diagonal noise; its fastest settings known to us."""
    torch, torchsde = pytest.importorskip("torch"), pytest.importorskip("torchsde")

    class Theirs(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self):
            super().__init__()
            sizes, act = ((1, 200), (200, 200), (200, 1)), torch.nn.Tanh
            first, second, third = (torch.nn.Linear(*size) for size in sizes)
            self.net = torch.nn.Sequential(first, act(), second, act(), third)
            for parameter in self.net.parameters():
                parameter.requires_grad_(False)  # the gradient asked for is that in the start

        def f(self, t, y):
            return -y if kind == "scalar" else self.net(y)

        def g(self, t, y):
            return torch.full_like(y, 0.5)

    model, ends = Theirs(), torch.tensor([0.0, 1.0])

    def run(x0):
        start = torch.full((1,), 0.3, requires_grad=gradient)
        with torch.set_grad_enabled(gradient):
            out = torchsde.sdeint(model, start.expand(batch, 1), ends, dt=1 / steps, method="euler")[-1].mean()
        if gradient:
            out.backward()
        return x0

    return torch, run


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("batch", [32, 1024])
@pytest.mark.parametrize("kind", ["scalar", "network"])
def test_against_torchsde(kind, batch, steps, gradient):
    """At its better thread count; at least five times faster with the scalar drift, network cells reported."""
    torch, theirs = torchsde_euler(kind, batch, steps, gradient)
    mine = batched(lambda x0: ours(as_drift(kind), gn.brownian(), 0.5, steps, x0), gradient, batch)
    result = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        result[threads] = compare({"ours": mine, "torchsde": theirs}, jnp.array([0.3]), budget=1.0)
    own = min(r["ours"][1] for r in result.values())
    best, threads = min((r["torchsde"][1], n) for n, r in result.items())
    print(
        f"\n{kind} batch {batch} steps {steps} grad {gradient}: ours {own * 1e3:.2f} ms, torchsde {best * 1e3:.2f} ms "
        f"({threads} threads), {best / own:.1f}x"
    )
    if kind == "scalar":
        assert best / own >= 5


@pytest.mark.parametrize("kind", ["scalar", "network"])
def test_cost_of_fractional_noise(kind):
    batch, steps, drift = 256, 500, as_drift(kind)
    functions = {}
    for terms in (0, 1, 5, 8):
        lift = gn.ma_fbm(terms, 0.05, 1e3) if terms else gn.brownian()
        maker = functools.partial(ours, drift, lift, 0.7 if terms else 0.5, steps)
        functions[terms] = batched(maker, False, batch)
    times = {k: t for k, (_, t) in compare(functions, jnp.array([0.3])).items()}
    print(f"\n{kind}, batch {batch}, {steps} steps:", {k: f"{1e3 * t:.2f} ms" for k, t in times.items()})
    assert times[0] < times[8]
