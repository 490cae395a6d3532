"""A gradient strategy of one's own: antithetic score-function gradients of a coin."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import genkit as gk


class AntitheticCoin(gk.vi.Strategy):
    """Calls the rest of the program with a draw and with its opposite, each weighed by its probability."""

    def __call__(self, key, law, k):
        value = jax.lax.stop_gradient(law.sample(key))
        log_p = law.log_prob(value)
        log_q = law.log_prob(1 - value)
        # Both outcomes, weighed by their probabilities: the value and the gradient are exact.
        return jnp.exp(log_p) * k(value) + jnp.exp(log_q) * k(1 - value)


def cost(p):
    """E[(b - 0.3)^2] = 0.49 p + 0.09 (1 - p)."""
    b = gk.vi.sample("b", dist.Bernoulli(p), grad=AntitheticCoin())
    return (b - 0.3) ** 2


value, slope = jax.value_and_grad(lambda p: gk.vi.E(cost)(p, key=jax.random.key(0)))(0.25)
assert jnp.allclose(value, 0.19) and jnp.allclose(slope, 0.4)
