"""The identities of a mixture potential, for every covariance family, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from bridge.helpers import FAMILIES, dense_log_v, random_potential

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(params=FAMILIES)
def potential(request):
    return random_potential(request.param)


@pytest.fixture
def x():
    return jr.normal(jr.key(9), (3,))


def test_scale_methods_agree_with_dense_algebra():
    for kind in FAMILIES:
        potential = random_potential(kind)
        dense, eye = potential.scale.dense(3), jnp.eye(3)
        v = jr.normal(jr.key(3), (3, 3))
        np.testing.assert_allclose(potential.scale.apply(v), jnp.einsum("kde,ke->kd", dense, v), rtol=1e-11, atol=1e-11)
        for t in (0.0, 0.4, 1.0):
            system = (1 - t) * eye + t * dense
            expected = jnp.linalg.solve(system, v[..., None])[..., 0]
            np.testing.assert_allclose(potential.scale.resolvent(t, v), expected, rtol=1e-11, atol=1e-11)
            right = (v + (dense - eye) @ v[0])[..., None]
            pulled = potential.scale.pull(t, v[0], v)
            np.testing.assert_allclose(pulled, jnp.linalg.solve(system, right)[..., 0], rtol=1e-11, atol=1e-11)
            logdet = -jnp.linalg.slogdet(system)[1]
            np.testing.assert_allclose(potential.scale.logdet_resolvent(t, 3), logdet, rtol=1e-11, atol=1e-11)


def test_value_at_the_ends_is_log_c_and_log_v(potential, x):
    z = x - potential.center
    expected = dense_log_v(potential, x) + z @ z / (2 * potential.epsilon)
    value = potential.log_value(x, 1.0) - 1.5 * jnp.log(2 * jnp.pi * potential.epsilon)
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-10)
    quadratic = jnp.einsum("d,kde,e->k", z, potential.scale.dense(3), z) + 2 * potential.shifts @ z
    log_c = jax.nn.logsumexp(potential.log_weights + quadratic / (2 * potential.epsilon))
    expected = log_c - z @ z / (2 * potential.epsilon)
    np.testing.assert_allclose(potential.log_value(x, 0.0), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.95])
def test_backward_heat_equation(potential, x, t):
    phi = lambda x, t: jnp.exp(potential.log_value(x, t) - potential.log_value(jnp.zeros(3), 0.5))
    residual = jax.grad(phi, 1)(x, t) + 0.5 * potential.epsilon * jnp.trace(jax.hessian(phi)(x, t))
    assert abs(residual) < 1e-10 * max(1.0, abs(jax.grad(phi, 1)(x, t)))


@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_drift_is_the_gradient(potential, x, t):
    gradient = potential.epsilon * jax.grad(lambda x: potential.log_value(x, t))(x)
    np.testing.assert_allclose(potential.drift(x, t), gradient, rtol=1e-10, atol=1e-10)


def test_weights_are_the_responsibilities_of_the_growing_mixture(potential, x):
    import numpyro.distributions as dist

    t = 0.35
    covs = potential.epsilon * t * ((1 - t) * jnp.eye(3) + t * potential.scale.dense(3))
    logits = potential.log_weights + dist.MultivariateNormal(t * potential.shifts, covs).log_prob(x - potential.center)
    np.testing.assert_allclose(potential.weights(x, t), jax.nn.softmax(logits), rtol=1e-10, atol=1e-12)


def test_endpoint_posterior_gives_the_drift_and_the_plan(potential, x):
    t = 0.7
    logits, means = potential.endpoint(x, t)
    drift = (jax.nn.softmax(logits) @ means - x) / (1 - t)
    np.testing.assert_allclose(potential.drift(x, t), drift, rtol=1e-9, atol=1e-10)
    y = x + 0.3
    tilt = lambda y: jnp.sum(y * y) / (2 * potential.epsilon)
    np.testing.assert_allclose(
        potential.coupling(x).log_prob(y),
        potential.log_v(y) + x @ y / potential.epsilon - potential.log_c(x),
        rtol=0,
        atol=1e-10,
    )
    np.testing.assert_allclose(potential.log_c(x), potential.log_value(x, 0.0) + tilt(x), rtol=0, atol=1e-10)


def test_constant_drift_and_point_end_members():
    shift = gk.bridge.light(jnp.zeros(1), jnp.array([[0.3, -2.0]]), jnp.ones((1, 2)), 0.4)
    xs, ts = jr.normal(jr.key(0), (7, 2)), jnp.linspace(0.0, 1.0, 7)
    np.testing.assert_allclose(shift.drift(ts, xs), jnp.broadcast_to(jnp.array([0.3, -2.0]), (7, 2)), atol=1e-14)
    points = jr.normal(jr.key(1), (4, 2))
    zero = gk.bridge.MixturePotential(jnp.zeros(4), points, gk.bridge.Zero(jnp.zeros(4)), 0.4, jnp.zeros(2))
    tiny = gk.bridge.light(jnp.zeros(4), points, jnp.full(4, 1e-13), 0.4)
    np.testing.assert_allclose(zero.drift(xs[:6], ts[:6]), tiny.drift(ts[:6], xs[:6]), rtol=1e-8)
    key_path = jr.key(5)
    end = gk.bridge.Bridge(zero).sample(xs[0], jnp.array([1.0]), key=key_path)[0]
    assert float(jnp.abs(points - end).sum(-1).min()) < 1e-12


def test_shifted_and_axes():
    potential = random_potential("full")
    xs, ts = jr.normal(jr.key(2), (5, 3)), jnp.linspace(0.0, 1.0, 5)
    np.testing.assert_allclose(potential.shifted(2.0).log_value(xs, ts), potential.log_value(xs, ts) + 2.0, atol=1e-12)
    looped = jnp.stack([potential.drift(x, t) for x, t in zip(xs, ts, strict=True)])
    np.testing.assert_allclose(potential.drift(xs, ts), looped, rtol=1e-12)
    assert potential.weights(xs, 0.5).shape == (5, 3)


def test_householder_basis_is_orthogonal_and_reaches_any_matrix():
    a = jr.normal(jr.key(0), (4, 6, 6))
    matrices = a @ a.mT + 0.1 * jnp.eye(6)
    family = gk.bridge.eigen_from_dense(matrices)
    np.testing.assert_allclose(family.dense(6), matrices, rtol=0, atol=1e-12)
    np.testing.assert_allclose(family.basis @ family.basis.mT, jnp.broadcast_to(jnp.eye(6), (4, 6, 6)), atol=1e-13)
    np.testing.assert_allclose(gk.bridge.eigen_from_dense(jnp.eye(3)[None]).dense(3), jnp.eye(3)[None], atol=1e-15)


def states_along_paths(potential, start, ts, rng, n=100):
    """States of the bridge from `start` at the times `ts`, by NumPy from dense matrices."""
    dense = np.asarray(potential.scale.dense(potential.dim))
    z, r, epsilon = start - np.asarray(potential.center), np.asarray(potential.shifts), float(potential.epsilon)
    logits = np.asarray(potential.log_weights) + (np.einsum("d,kde,e->k", z, dense, z) + 2 * r @ z) / (2 * epsilon)
    weights = np.exp(logits - logits.max())
    k = rng.choice(len(r), n, p=weights / weights.sum())
    roots = np.linalg.cholesky(epsilon * dense)
    ends = start + r[k] + (dense @ z - z)[k] + np.einsum("nde,ne->nd", roots[k], rng.standard_normal((n, len(z))))
    t = ts[:, None]
    noise = np.sqrt(epsilon * t * (1 - t)) * rng.standard_normal((n, len(ts), len(z)))
    return (1 - t) * start + t * ends[:, None] + noise


@pytest.mark.parametrize("kind", FAMILIES)
def test_float32_drift_keeps_its_digits_near_the_end(kind):
    """Median relative error at most 1e-6 at every t up to .9999, small epsilon, many components, off center."""
    k, d = 10, 30
    exact = random_potential(kind, 4, k, d, 0.05)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32).astype(jnp.float64), exact)
    ts = np.array([0.0, 0.5, 0.99, 0.999, 0.9999, 1.0], np.float32)
    drift = jax.jit(lambda potential, x: potential.drift(x, ts.astype(x.dtype)))
    for offset in (0.0, 10.0):
        exact = eqx.tree_at(lambda p: p.center, exact, jnp.full(d, offset))
        x = states_along_paths(exact, np.full(d, offset), ts.astype(float), np.random.default_rng(1)).astype(np.float32)
        reference = np.asarray(drift(exact, jnp.asarray(x, jnp.float64)))
        single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), exact)
        error = np.linalg.norm(drift(single, jnp.asarray(x)) - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
        assert np.median(error, 0).max() < 1e-6, np.median(error, 0)
