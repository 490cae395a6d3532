"""The defects reported of other libraries, executed beside us against exact answers.

Two dependent coins and a normal observation: every gradient is known by summation. A peer's estimator is asked many
times; its mean is compared with the exact gradient in standard errors. Run it where Pyro is installed:
`python -m pytest tests/benchmarks/test_vi_peers.py -m benchmark -n 0 -s -o addopts=--import-mode=importlib`.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from vi_golden import T, g1_guide, g1_model

from genkit import vi


pytestmark = [pytest.mark.benchmark, pytest.mark.key_reuse, pytest.mark.filterwarnings("ignore")]
ELBO = np.array([-0.480279, -0.451320, -0.265749])
IW2 = np.array([-0.328574, -0.292226, -0.108152])
RENYI = np.array([-0.380071, -0.346689, -0.162612])  # order one half, two samples
EXACT = {"ELBO": ELBO, "two samples": IW2, "Renyi, two samples": RENYI}
OBJECTIVES = {
    "ELBO": vi.elbo,
    "two samples": lambda p, q: vi.iwelbo(p, q, 2),
    "Renyi, two samples": lambda p, q: vi.renyi(p, q, 0.5, 2),
}


def summarize(capsys, who, what, slopes, seconds):
    """Mean, spread, distance from the exact gradient in standard errors, and time."""
    slopes = np.asarray(slopes, np.float64)
    error = np.maximum(slopes.std(0) / np.sqrt(len(slopes)), 1e-6)
    z = np.abs((slopes.mean(0) - EXACT[what]) / error).max()
    with capsys.disabled():
        mean, spread = np.round(slopes.mean(0), 3), np.round(slopes.std(0), 2)
        print(f"\n{what:20} {who:32} mean {mean}, sd {spread}, |z| {z:6.1f}, {1e6 * seconds:8.1f} us each", end="")
    return z


def by_jax(slope, num=20_000):
    """Draws of a JAX gradient, and the processor time of one compiled call."""
    draws = jax.jit(jax.vmap(slope))(jax.random.split(jax.random.key(0), num))
    one = jax.jit(slope).lower(jax.random.key(1)).compile()
    times = []
    for i in range(200):
        key = jax.random.key(i)
        begin = time.process_time()
        jax.block_until_ready(one(key))
        times.append(time.process_time() - begin)
    return draws, float(np.median(times))


@pytest.mark.parametrize("what", EXACT)
@pytest.mark.parametrize("strategy", ["default", "Score"])
def test_genkit_is_right(what, strategy, capsys):
    grad = None if strategy == "default" else vi.Score()

    def slope(key):
        fn = lambda t: OBJECTIVES[what](vi.program(g1_model)(), vi.program(g1_guide(grad, grad))(t))
        return jax.grad(lambda t: vi.E(fn)(t, key=key))(jnp.array(T))

    assert summarize(capsys, f"genkit, {strategy}", what, *by_jax(slope)) < 5


NUMPYRO = [
    ("ELBO", "Trace_ELBO", Trace_ELBO(), False),
    ("ELBO", "TraceGraph_ELBO", TraceGraph_ELBO(), True),
    ("two samples", "RenyiELBO", RenyiELBO(alpha=0.0, num_particles=2), False),
    ("Renyi, two samples", "RenyiELBO", RenyiELBO(alpha=0.5, num_particles=2), False),
]


@pytest.mark.parametrize(("what", "name", "loss", "right"), NUMPYRO)
def test_numpyro(what, name, loss, right, capsys):
    def slope(key):
        fn = lambda t: -loss.loss(key, {}, g1_model, lambda: g1_guide()(t))
        return jax.grad(fn)(jnp.array(T))

    z = summarize(capsys, f"numpyro {name}", what, *by_jax(slope))
    assert (z < 5) == right, "numpyro has changed: renew the table in docs/guide/vi-peers.md"


PYRO = [
    ("ELBO", "Trace_ELBO", {}, False, True),
    ("ELBO", "TraceGraph_ELBO", {}, False, True),
    ("ELBO", "TraceEnum_ELBO", {"max_plate_nesting": 0}, True, True),
    ("two samples", "RenyiELBO", {"alpha": 0, "num_particles": 2}, False, False),
    ("Renyi, two samples", "RenyiELBO", {"alpha": 0.5, "num_particles": 2}, False, False),
]


@pytest.mark.parametrize(("what", "name", "options", "enumerated", "right"), PYRO)
def test_pyro(what, name, options, enumerated, right, capsys):
    torch, pyro = pytest.importorskip("torch"), pytest.importorskip("pyro")
    law = pyro.distributions
    torch.set_num_threads(1)  # scalars: more threads only cost
    infer = {"enumerate": "parallel"} if enumerated else {}

    def model():
        a = pyro.sample("a", law.Bernoulli(0.3))
        b = pyro.sample("b", law.Bernoulli(0.2 + 0.5 * a))
        pyro.sample("y", law.Normal(a + 2 * b, 1.0), obs=torch.tensor(0.7))

    def guide():
        t = pyro.param("t", torch.tensor(T))
        a = pyro.sample("a", law.Bernoulli(logits=t[0]), infer=infer)
        pyro.sample("b", law.Bernoulli(logits=t[1] + t[2] * a), infer=infer)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss, slopes, times = getattr(pyro.infer, name)(**options), [], []
    for _ in range(50 if enumerated else 3000):
        begin = time.process_time()
        loss.loss_and_grads(model, guide)
        times.append(time.process_time() - begin)
        leaf = pyro.param("t").unconstrained()
        slopes.append(np.zeros(3) if leaf.grad is None else -leaf.grad.numpy().copy())
        leaf.grad = None
    z = summarize(capsys, f"pyro {name}", what, slopes, float(np.median(times)))
    assert (z < 5) == right, "pyro has changed: renew the table in docs/guide/vi-peers.md"
