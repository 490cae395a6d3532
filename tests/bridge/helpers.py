"""Potentials, pairs and oracles the bridge tests share."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


FAMILIES = ("iso", "diag", "full", "lowrank")
# For tests that compile much: a vector and a matrix family by default, the other two with the slow tests.
FEW_FAMILIES = ("diag", "lowrank", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("iso", "full")))


def random_scale(kind, key, k=3, d=3):
    """A scale family with eigenvalues on both sides of one."""
    key_values, key_rest = jr.split(key)
    if kind == "iso":
        return gk.bridge.Iso(jr.uniform(key_values, (k,), minval=-1.5, maxval=1.0))
    values = jr.uniform(key_values, (k, d), minval=-1.5, maxval=1.0)
    if kind == "diag":
        return gk.bridge.Diag(values)
    if kind == "full":
        return gk.bridge.Full(values, jr.normal(key_rest, (k, d, d)))
    return gk.bridge.LowRank(values, 0.7 * jr.normal(key_rest, (k, d, 2)))


def random_potential(kind, seed=0, k=3, d=3, epsilon=0.7):
    """A potential of the named family, off center."""
    key_scale, key_weights, key_shifts, key_center = jr.split(jr.key(seed), 4)
    return gk.bridge.MixturePotential(
        jr.normal(key_weights, (k,)),
        jr.normal(key_shifts, (k, d)),
        random_scale(kind, key_scale, k, d),
        epsilon,
        jr.normal(key_center, (d,)),
    )


def dense_log_v(potential, y):
    """log of v, term by term from dense covariances, in the coordinates of the potential."""
    import numpyro.distributions as dist

    law = dist.MultivariateNormal(potential.shifts, potential.epsilon * potential.scale.dense(potential.dim))
    return jax.nn.logsumexp(potential.log_weights + law.log_prob(y - potential.center))


def table_covariances(d):
    """The Gaussian pair of the reference table: AR(1) correlations, the second with growing variances."""
    gap = np.abs(np.arange(d)[:, None] - np.arange(d))
    v = np.linspace(0.5, 2.0, d)
    return 0.5**gap, (-0.3) ** gap * np.sqrt(v[:, None] * v)


def pair_1d(epsilon=0.5):
    """The one-dimensional mixture pair of the reference table, Z = .14156886641978 at epsilon = .5."""
    source = (jnp.array([0.6, 0.4]), jnp.array([[-1.0], [2.0]]), jnp.array([[0.8], [0.5]]) ** 2)
    target = (jnp.array([0.3, 0.5, 0.2]), jnp.array([[-2.0], [0.5], [3.0]]), jnp.array([[0.4], [0.9], [0.6]]) ** 2)
    return gk.bridge.mixture_pair(source, target, epsilon)


def rotated_pair(d, epsilon, *, key, components=5, radius=4.0, low=0.1, source_components=1):
    """A pair with rotated covariances: hatphi standard normal (or a mixture), phi with eigenvalues in [low, 1]."""
    key_means, key_values, key_rotation, key_source = jr.split(key, 4)
    means = jr.normal(key_means, (components, d))
    means = radius * means / jnp.linalg.norm(means, axis=-1, keepdims=True)
    values = jr.uniform(key_values, (components, d), minval=low, maxval=1.0)
    basis = jnp.linalg.qr(jr.normal(key_rotation, (components, d, d)))[0]
    covs = (basis * values[:, None, :]) @ basis.mT
    near = 0.5 * jr.normal(key_source, (source_components, d)) * (source_components > 1)
    source = (jnp.full(source_components, 1.0 / source_components), near, jnp.ones((source_components, d)))
    return gk.bridge.mixture_pair(
        source, (jnp.full(components, 1.0 / components), means, 0.5 * (covs + covs.mT)), epsilon
    )
