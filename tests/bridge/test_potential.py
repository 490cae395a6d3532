"""The identities of a mixture potential, for every covariance family, in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
from bridge.helpers import FAMILIES, dense_log_v, random_potential

import genkit as gk
from genkit.bridge._scales import Points, full_from_dense


pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(params=FAMILIES)
def potential(request):
    return random_potential(request.param)


@pytest.fixture
def x():
    return jr.normal(jr.key(9), (3,))


@jax.jit
def dense_gaps(scale, t, v):
    """The methods of a family less the same by dense algebra."""
    dense, eye = scale.dense(3), jnp.eye(3)
    system = (1 - t) * eye + t * dense
    solve = lambda right: jnp.linalg.solve(system, right[..., None])[..., 0]
    return {
        "apply": scale.apply(v) - jnp.einsum("kde,ke->kd", dense, v),
        "resolvent": scale.resolvent(t, v) - solve(v),
        "pull": scale.pull(t, v[0], v) - solve(v + (dense - eye) @ v[0]),
        "logdet": scale.logdet_resolvent(t, 3) + jnp.linalg.slogdet(system)[1],
    }


def test_scale_methods_agree_with_dense_algebra(potential):
    v = jr.normal(jr.key(3), (3, 3))
    for t in (0.0, 0.4, 1.0):
        for name, gap in dense_gaps(potential.scale, t, v).items():
            np.testing.assert_allclose(gap, 0.0, rtol=0, atol=1e-11, err_msg=f"{name} at {t}")


@jax.jit
def identities(potential, x, t):
    """Both sides of every identity of a potential at (x, t); one compilation per family."""
    epsilon, scale = potential.epsilon, potential.scale.dense(3)
    z, eye = x - potential.center, jnp.eye(3)
    quadratic = jnp.einsum("d,kde,e->k", z, scale, z) + 2 * potential.shifts @ z
    log_c = jax.nn.logsumexp(potential.log_weights + quadratic / (2 * epsilon))
    phi = lambda x, t: jnp.exp(potential.log_value(x, t) - potential.log_value(jnp.zeros(3), 0.5))
    rate = jax.grad(phi, 1)(x, t)
    covs = epsilon * t * ((1 - t) * eye + t * scale)
    growing = dist.MultivariateNormal(t * potential.shifts, covs).log_prob(z)
    logits, means = potential.endpoint(x, t)
    y = x + 0.3
    return {
        "log_v": (
            potential.log_value(x, 1.0) - 1.5 * jnp.log(2 * jnp.pi * epsilon),
            dense_log_v(potential, x) + z @ z / (2 * epsilon),
        ),
        "log_c": (potential.log_value(x, 0.0), log_c - z @ z / (2 * epsilon)),
        "heat": (rate, -0.5 * epsilon * jnp.trace(jax.hessian(phi)(x, t))),
        "drift": (potential.drift(x, t), epsilon * jax.grad(lambda x: potential.log_value(x, t))(x)),
        "weights": (potential.weights(x, t), jax.nn.softmax(potential.log_weights + growing)),
        "endpoint": (potential.drift(x, t), (jax.nn.softmax(logits) @ means - x) / (1 - t)),
        "plan": (
            potential.coupling(x).log_prob(y),
            potential.log_v(y) + x @ y / epsilon - potential.log_c(x),
        ),
        "tilt": (potential.log_c(x), potential.log_value(x, 0.0) + jnp.sum(x * x) / (2 * epsilon)),
    }


def test_value_at_the_ends_is_log_c_and_log_v(potential, x):
    sides = identities(potential, x, 0.3)
    np.testing.assert_allclose(*sides["log_v"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(*sides["log_c"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.95])
def test_backward_heat_equation(potential, x, t):
    rate, diffusion = identities(potential, x, t)["heat"]
    assert abs(rate - diffusion) < 1e-10 * max(1.0, abs(rate))


@pytest.mark.parametrize("t", [0.0, 0.6, 1.0])
def test_drift_is_the_gradient(potential, x, t):
    np.testing.assert_allclose(*identities(potential, x, t)["drift"], rtol=1e-10, atol=1e-10)


def test_weights_are_the_responsibilities_of_the_growing_mixture(potential, x):
    np.testing.assert_allclose(*identities(potential, x, 0.35)["weights"], rtol=1e-10, atol=1e-12)


def test_endpoint_posterior_gives_the_drift_and_the_plan(potential, x):
    sides = identities(potential, x, 0.7)
    np.testing.assert_allclose(*sides["endpoint"], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(*sides["plan"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(*sides["tilt"], rtol=0, atol=1e-10)


def test_constant_drift_and_point_end_members():
    shift = gk.bridge.light(jnp.zeros(1), jnp.array([[0.3, -2.0]]), jnp.ones((1, 2)), 0.4)
    xs, ts = jr.normal(jr.key(0), (7, 2)), jnp.linspace(0.0, 1.0, 7)
    drift = jax.jit(lambda potential, x, t: potential.drift(x, t))
    constant = drift(shift.potential, xs, ts)
    np.testing.assert_allclose(constant, np.broadcast_to([0.3, -2.0], (7, 2)), atol=1e-14)
    points = jr.normal(jr.key(1), (4, 2))
    zero = gk.bridge.MixturePotential(jnp.zeros(4), points, Points(jnp.zeros(4)), 0.4, jnp.zeros(2))
    tiny = gk.bridge.light(jnp.zeros(4), points, jnp.full((4, 2), 1e-13), 0.4)
    np.testing.assert_allclose(drift(zero, xs[:6], ts[:6]), drift(tiny.potential, xs[:6], ts[:6]), rtol=1e-8)
    end = jax.jit(lambda p: gk.bridge.Bridge(p).sample(xs[0], jnp.array([1.0]), key=jr.key(5))[0])(zero)
    assert float(jnp.abs(points - end).sum(-1).min()) < 1e-12


def test_shifted_and_axes():
    potential = random_potential("full")
    xs, ts = jr.normal(jr.key(2), (5, 3)), jnp.linspace(0.0, 1.0, 5)
    np.testing.assert_allclose(potential.shifted(2.0).log_value(xs, ts), potential.log_value(xs, ts) + 2.0, atol=1e-12)
    drift = jax.jit(lambda x, t: potential.drift(x, t))
    looped = jnp.stack([drift(x, t) for x, t in zip(xs, ts, strict=True)])
    np.testing.assert_allclose(drift(xs, ts), looped, rtol=1e-12)
    assert potential.weights(xs, 0.5).shape == (5, 3)


def test_householder_basis_is_orthogonal_and_reaches_any_matrix():
    a = jr.normal(jr.key(0), (4, 6, 6))
    matrices = a @ a.mT + 0.1 * jnp.eye(6)
    family = full_from_dense(matrices)
    np.testing.assert_allclose(family.dense(6), matrices, rtol=0, atol=1e-12)
    np.testing.assert_allclose(family.basis @ family.basis.mT, jnp.broadcast_to(jnp.eye(6), (4, 6, 6)), atol=1e-13)
    np.testing.assert_allclose(full_from_dense(jnp.eye(3)[None]).dense(3), jnp.eye(3)[None], atol=1e-15)


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
