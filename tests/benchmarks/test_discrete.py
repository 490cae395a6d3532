"""Gradients of densities with discrete sites summed out, beside the sum written by hand.

Run it without the run-time checks of types that the suite adds:
`python -m pytest tests/benchmarks/test_discrete.py -m benchmark -n 0 -s -o addopts=--import-mode=importlib`.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density
from timing import compare

from genkit import vi


pytestmark = pytest.mark.benchmark
CALLS = 100  # gradients in one compiled call, so that calling costs nothing


def hidden_markov(steps, states):
    """A chain of `steps` with levels scaled by a parameter: through `marginalize`, and by the forward recursion."""
    y = np.random.default_rng(0).normal(size=steps)
    transitions = np.full((states, states), 0.1 / states) + 0.9 * np.eye(states)
    levels = jnp.linspace(-2.0, 2.0, states)
    log_transitions = jnp.log(transitions / transitions.sum(1, keepdims=True))

    def model(y, scale):
        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(jnp.asarray(transitions)[z]))
            numpyro.sample("y", dist.Normal(scale * levels[z], 1.0), obs=y)
            return z, None

        scan(step, 0, y)

    def by_hand(scale):
        costs = dist.Normal(scale * levels, 1.0).log_prob(y[:, None])

        def forward(message, cost):
            return logsumexp(message[:, None] + log_transitions, 0) + cost, None

        message, _ = jax.lax.scan(forward, log_transitions[0] + costs[0], costs[1:])
        return logsumexp(message)

    marginal = vi.marginalize(model)
    return lambda scale: log_density(marginal, (y, scale), {}, {})[0], by_hand


def mixture(rows, states):
    """Rows of a mixture with means scaled by a parameter."""
    y = np.random.default_rng(0).normal(size=rows)
    means = jnp.arange(float(states))

    def model(y, scale):
        with numpyro.plate("n", rows):
            z = numpyro.sample("z", dist.Categorical(jnp.ones(states) / states))
            numpyro.sample("y", dist.Normal(scale * means[z], 1.0), obs=y)

    def by_hand(scale):
        return jnp.sum(logsumexp(dist.Normal(scale * means, 1.0).log_prob(y[:, None]) - jnp.log(states), 1))

    marginal = vi.marginalize(model)
    return lambda scale: log_density(marginal, (y, scale), {}, {})[0], by_hand


def descents(density):
    """Many gradients one after the other, and the seconds that they take to compile."""

    def run(scale):
        return jax.lax.fori_loop(0, CALLS, lambda _, s: s + 1e-9 * jax.grad(density)(s), scale)

    scale = jnp.asarray(1.1)
    began = time.perf_counter()
    compiled = jax.jit(run).lower(scale).compile()
    return (lambda: compiled(scale)), time.perf_counter() - began


CASES = {
    "chain of 60 steps, 2 states": (hidden_markov, 60, 2),
    "chain of 500 steps, 2 states": (hidden_markov, 500, 2),
    "chain of 1000 steps, 2 states": (hidden_markov, 1000, 2),
    "chain of 500 steps, 5 states": (hidden_markov, 500, 5),
    "chain of 500 steps, 20 states": (hidden_markov, 500, 20),
    "mixture of 400 rows, 3 groups": (mixture, 400, 3),
    "mixture of 40000 rows, 3 groups": (mixture, 40_000, 3),
    "mixture of 40000 rows, 12 groups": (mixture, 40_000, 12),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_beside_the_sum_by_hand(name):
    make, *sizes = CASES[name]
    ours, by_hand = make(*sizes)
    np.testing.assert_allclose(ours(1.1), by_hand(1.1), rtol=1e-4)
    first, compiled = descents(ours)
    second, compiled_by_hand = descents(by_hand)
    seconds, _, ratio = compare(first, second, 15)
    print(f"\n{name}: {seconds / CALLS * 1e6:.1f} us, {ratio:.2f} of by hand; ", end="")
    print(f"compiled in {compiled:.2f} s, by hand {compiled_by_hand:.2f} s")
