"""A known log evidence between bounds from below and from above, each from a run of its own, to their known optima."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import stats
from vi_golden import T, g1_guide, g1_model

import genkit as gk
from genkit import vi


# numpyro's own initialization uses keys twice
pytestmark = pytest.mark.key_reuse

PRECISION = np.array([[1.5, 0.5], [0.5, 1.5]])  # of the posterior; its eigenvalues are 1 and 2
COVARIANCE = np.linalg.inv(PRECISION)
MEAN = COVARIANCE @ np.array([0.5, 0.5])
EVIDENCE = -0.5 * math.log(2 * math.pi * 4) - 1 / 8  # y ~ N(0, 4) at 1


def model(y):
    x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.sum(x), math.sqrt(2.0)), obs=y)


def posterior():
    numpyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))


def square_bound(p, q):
    """E w^2, unbiased: the exponential of twice the chi bound, to be minimized."""
    return -vi.f_divergence(p, q, gk.divergence.from_f(lambda r: r**2 - 1))


def forward_bound(p, q):
    """E_posterior [log p - log q]: log evidence plus the forward divergence."""
    return -vi.forward_kl(vi.program(posterior)(), q)


def weights(q, num):
    """Log-weights of draws of a guide."""
    p = vi.program(model)(1.0)

    def one(key):
        value, log_q = q.sample(key=key)
        return p.log_density(value) - log_q

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), num)), np.float64)


def forward_weights(q, num):
    """Log-weights of draws of the posterior."""
    p, draws = vi.program(model)(1.0), np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, num)
    log_w = lambda x: p.log_density({"x": x}) - q.log_density({"x": x})
    return np.asarray(jax.jit(jax.vmap(log_w))(jnp.asarray(draws, jnp.float32)), np.float64)


def chi(log_w):
    return 0.5 * np.log(np.mean(np.exp(2 * log_w)))


def five(log_w):
    return np.log(np.mean(np.exp(log_w.reshape(-1, 5)), 1))


def optimum_of_squares():
    """The best independent normals under the chi bound: a quadratic in their common precision."""
    delta = (18 - math.sqrt(68)) / 8
    return EVIDENCE + 0.5 * (math.log(2) - math.log(delta) - 0.5 * math.log((2 - delta) * (4 - delta)))


LOWER = EVIDENCE - 0.5 * math.log(1.5**2 / 2)
UPPER = EVIDENCE + 0.5 * math.log(np.prod(np.diag(COVARIANCE)) / np.linalg.det(COVARIANCE))
NUM = 200_000


def fitted(objective):
    wide = vi.mean_field(model, 1.0, init_scale=1.0)  # the squared weights of a narrow guide have no variance
    method = vi.Fit(wide, objective, num_steps=1500, num_samples=4000, num_particles=32)
    return gk.infer(gk.Problem(model, (1.0,)), method, key=jax.random.key(0))


@pytest.mark.slow
def test_known_evidence_lies_between_separate_runs():
    lower = fitted(vi.elbo)
    log_w = weights(lower.guide, NUM)
    error = stats.z_score(1) * log_w.std() / math.sqrt(NUM)
    assert LOWER - error - 0.004 < log_w.mean() < LOWER + error
    assert lower.evidence is not None
    assert lower.evidence[0] - 0.05 < EVIDENCE < lower.evidence[1] + 0.05

    tighter = five(weights(fitted(functools.partial(vi.iwelbo, num_particles=5)).guide, NUM))
    error = stats.z_score(1) * tighter.std() / math.sqrt(tighter.size)
    assert tighter.mean() - error > LOWER + 0.02
    assert tighter.mean() + error < EVIDENCE

    above = weights(fitted(square_bound).guide, NUM)
    squares = np.exp(2 * (above - EVIDENCE))
    error = stats.z_score(1) * squares.std() / squares.mean() / math.sqrt(NUM) / 2
    assert chi(above) - error > EVIDENCE
    assert abs(chi(above) - optimum_of_squares()) < error + 0.004

    forward = forward_weights(fitted(forward_bound).guide, NUM)
    error = stats.z_score(1) * forward.std() / math.sqrt(NUM)
    assert forward.mean() - error > EVIDENCE
    assert abs(forward.mean() - UPPER) < error + 0.004


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_bounds_of_one_guide_in_their_order():
    """The two coins of the golden table, every bound by enumeration."""
    p, q = vi.program(g1_model)(), vi.program(g1_guide())(jnp.array(T))
    exact = lambda fn: float(vi.exact(fn)())
    evidence = -1.430758869508
    below = [exact(lambda: vi.elbo(p, q)), *(exact(lambda k=k: vi.iwelbo(p, q, k)) for k in (2, 3))]
    square = gk.divergence.from_f(lambda r: r**2 - 1)
    above = 0.5 * math.log(1 + exact(lambda: vi.f_divergence(p, q, square)))
    assert below == sorted(below)
    assert below[-1] < evidence < above
