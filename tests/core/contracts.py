"""Contract cases of training, sampling, inference and storage."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
import optax
from contract import Case

import genkit as gk
from genkit.inference import as_measure


def loss(model, batch, *, key):
    return jnp.mean((model - batch) ** 2), {}


def build(key):
    return jnp.zeros(())


def linear(x, sigma, cond=None):
    return x / (1 + sigma**2)


def eight_schools(y):
    return numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


optimizer = optax.adam(1e-2)
batches = jax.tree_util.Partial(lambda key: jr.normal(key, (8,)))


def recipe():
    return gk.Recipe(build=build, data=batches, phases=gk.Phase(loss, optimizer), num_steps=3, ema=0.9)


@functools.cache
def fitted():
    return gk.fit(recipe(), key=jr.key(0))


def draw(sampler):
    return gk.sample(sampler, linear, 3, shape=(2,), key=jr.key(0)).value


def grid():
    return gk.diffusion.karras(4, 0.1, 2.0)


CASES = [
    Case("Posterior", lambda: gk.Posterior({"x": jnp.zeros(3)}, jnp.zeros(3), ("draw",), log_q=jnp.ones(3))),
    Case("DistributionMeasure", lambda: as_measure(dist.Normal(jnp.zeros(2), 1.0)), lambda m: m.sample(key=jr.key(0))),
    Case(
        "Context",
        lambda: gk.sampling.Context.alone(jnp.zeros(2), jnp.asarray(1.0), key=jr.key(0)),
        lambda c: c.at(sigma=2 * c.sigma).sigma,
        zero_grad=True,
    ),
    Case("Phase", lambda: gk.Phase(loss, optimizer)),
    Case("Recipe", recipe),
    Case("Problem", lambda: gk.Problem(eight_schools, (jnp.zeros(3),))),
    Case("TracedProblem", lambda: gk.inference.TracedProblem(gk.Problem(eight_schools, (jnp.zeros(3),)))),
    Case("Fitted", fitted),
    Case("Draws", lambda: gk.sample(gk.diffusion.ddim(grid()), linear, 3, shape=(2,), key=jr.key(0))),
    Case("Table", lambda: gk.diffusion.heun(grid()), draw),
    Case("Table, stochastic", lambda: gk.diffusion.ddim(grid(), eta=1.0), draw),
    Case("Sampler", lambda: gk.Sampler(gk.diffusion.dpmpp(grid())), draw),
]
