"""Contract cases of covariance families, potentials, bridges, plans, objectives and samplers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from contract import Case
from jax import Array

import genkit as gk
from genkit.bridge._scales import Points


b = gk.bridge


def points():
    return jnp.array([[0.3, -0.2], [-1.0, 0.5], [0.7, 0.9]])


def potential(scale):
    return b.MixturePotential(jnp.array([0.0, 0.5]), jnp.array([[1.0, -0.5], [0.2, 0.4]]), scale, 0.6, jnp.ones(2))


def values():
    return jnp.array([[0.3, -0.7], [-0.2, 0.1]])


def scales(family):
    return lambda: potential(family())


def both(p):
    t = jnp.array([0.0, 0.4, 0.9])
    return p.log_value(points(), t), p.drift(points(), t)


def gaussian():
    return b.gaussian(jnp.zeros(2), jnp.array([1.0, 0.5]), jnp.ones(2), jnp.array([0.3, 1.5]), 0.7)


def densities(bridge):
    xs = points()
    return bridge.path_log_prob(jnp.array([0.0, 0.5, 1.0]), xs), bridge.score(0.3, xs), bridge.coupling(xs).mean


def pair():
    one = (jnp.ones(1), jnp.zeros((1, 2)), jnp.array([[[1.0, 0.3], [0.3, 0.5]]]))
    return b.mixture_pair(one, one, 0.5)


def report():
    return b.FitReport(jnp.ones(3), jnp.full((2, 2), 0.5), jnp.asarray(2.0), jnp.asarray(0.1), jnp.asarray(0))


def fitted():
    fit = gk.fit(gk.Recipe(lambda key: gaussian(), batches, gk.Phase(no_loss, optax.set_to_zero()), 1), key=jr.key(0))
    return b.FittedBridge.extend(fit, report=report())


def no_loss(model, batch, *, key):
    return jnp.sum(model.potential.log_value(batch, 0.5)), {}


batches = jax.tree_util.Partial(lambda key: jnp.ones((1, 2)))


def discrete():
    return b.sinkhorn(points(), points()[:2] + 0.5, 0.5)


def matrix(plan):
    return plan.plan, plan.cost


def objective(value):
    return value(gaussian(), (points(), points() + 1.0), key=jr.key(0))[0]


def batch(data):
    return data(jr.key(0))


class Pull(eqx.Module):
    """A field for one point."""

    rate: Array

    def __call__(self, t, x):
        return -self.rate * (1.0 + t) * x


def network():
    return b.NeuralBridge(Pull(jnp.asarray(0.5)), Pull(jnp.asarray(1.5)), 0.5)


def draws(sampler):
    return sampler.draw(gaussian(), jr.split(jr.key(1), 3), cond=None, x_init=points(), shape=(2,)).value


CASES = [
    Case("Iso", scales(lambda: b.Iso(jnp.array([0.3, -0.4]))), both, eager=False),
    Case("Diag", scales(lambda: b.Diag(values())), both, eager=False),
    Case("Full", scales(lambda: b.Full(values(), 1.0 + jnp.arange(8.0).reshape(2, 2, 2))), both, eager=False),
    Case("LowRank", scales(lambda: b.LowRank(values(), jnp.ones((2, 2, 1)))), both, eager=False, rtol=1e-4),
    Case("Points", scales(lambda: Points(jnp.zeros(2))), both, eager=False),
    Case("Brownian", lambda: b.Brownian(0.5), lambda r: r.log_kernel(0.1, points(), 0.6, 2.0 * points())),
    Case("Bridge", gaussian, densities, eager=False, rtol=1e-4),
    Case("MixturePair", pair, lambda p: p.log_plan(points(), points()), eager=False, rtol=1e-4),
    Case("FittedBridge", fitted),
    Case("FitReport", report),
    Case("DiscretePlan", discrete, matrix, eager=False, rtol=1e-4),
    Case("LightObjective", b.LightObjective, objective, eager=False, grad=False, vmap=False),
    Case("MatchingObjective", b.MatchingObjective, objective, eager=False, grad=False, vmap=False),
    Case("UnpairedBatches", lambda: b.UnpairedBatches(points(), points(), 2), batch),
    Case("NeuralBridge", network, lambda m: m.drift(0.3, points()), eager=False, rtol=1e-4),
    Case("ExactPaths", b.ExactPaths, draws, eager=False, grad=False, vmap=False),
    Case("EulerPaths", lambda: b.EulerPaths(4), draws, eager=False, grad=False, vmap=False),
]
