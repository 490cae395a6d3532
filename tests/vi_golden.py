"""The discrete reference model of the golden tables (G1), in float64."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from genkit import vi


T = (0.2, -0.3, 0.5)


def g1_model():
    a = numpyro.sample("a", dist.Bernoulli(0.3))
    b = numpyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
    numpyro.sample("y", dist.Normal(a + 2 * b, 1.0), obs=0.7)


def g1_guide(grad_a=None, grad_b=None):
    def guide(t):
        a = vi.sample("a", dist.Bernoulli(logits=t[0]), grad=grad_a)
        vi.sample("b", dist.Bernoulli(logits=t[1] + t[2] * a), grad=grad_b)

    return guide


def g1_exact(objective, grad_a=None, grad_b=None):
    """Value and gradient of the expected estimator on G1."""

    def fn(t):
        p, q = vi.program(g1_model)(), vi.program(g1_guide(grad_a, grad_b))(t)
        return vi.exact(lambda: objective(p, q))()

    return jax.jit(jax.value_and_grad(fn))(jnp.array(T))
