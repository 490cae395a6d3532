"""The von Mises-Fisher distribution against closed forms, quadrature and its own draws."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

from genkit.distributions import VonMisesFisher
from genkit.distributions._von_mises_fisher import concentration_of


pytestmark = pytest.mark.usefixtures("x64")


# dimension, length of the mean; concentration, mean log-likelihood
@pytest.mark.parametrize(
    ("dim", "length", "concentration", "log_likelihood"),
    [
        (2048, 0.7, 2810.07771116376, 5587.75143064419),
        (3, 0.9, 9.99999958776895, -0.535291971354145),
        (8192, 0.35, 3267.37734264582, 25816.0743899464),
    ],
)
def test_most_likely_concentration(dim, length, concentration, log_likelihood):
    solve = jax.jit(lambda r: concentration_of(r, dim))
    found = solve(jnp.asarray(length))
    np.testing.assert_allclose(found, concentration, rtol=1e-12)
    pole = jnp.zeros(dim).at[0].set(1.0)
    np.testing.assert_allclose(VonMisesFisher(pole, found).log_prob(length * pole), log_likelihood, rtol=1e-12)
    slope = jax.jit(jax.grad(solve))(length)
    step = 1e-6
    ends = [solve(jnp.asarray(length + side)) for side in (step, -step)]
    difference = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_float32_in_many_dimensions():
    single = concentration_of(jnp.float32(0.7), 32768)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, concentration_of(jnp.asarray(0.7), 32768), rtol=1e-4)
    pole = jnp.zeros(32768, jnp.float32).at[0].set(1.0)
    gradient = jax.jit(jax.grad(lambda k: VonMisesFisher(pole, k).log_prob(pole)))
    assert all(jnp.isfinite(gradient(jnp.float32(k))) for k in (0.0, 1.0, 1e3, 1e5))


@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.0), (2, 3.0), (3, 4.0), (5, 0.7)])
def test_density_integrates_to_one(dim, kappa):
    pole = jnp.zeros(dim).at[0].set(1.0)
    other = jnp.zeros(dim).at[1].set(1.0)
    area = 2 * np.pi ** ((dim - 1) / 2) / scipy.special.gamma((dim - 1) / 2)
    angles = np.linspace(0, np.pi, 2001)
    points = np.cos(angles)[:, None] * pole + np.sin(angles)[:, None] * other
    density = (
        np.exp(jax.jit(lambda x: VonMisesFisher(pole, kappa).log_prob(x))(points)) * np.sin(angles) ** (dim - 2) * area
    )
    np.testing.assert_allclose(scipy.integrate.simpson(density, x=angles), 1.0, atol=1e-9)


@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.0), (2, 3.0), (3, 4.0), (64, 30.0)])
def test_draws_have_the_moments_and_their_gradients(dim, kappa):
    direction = jnp.arange(1.0, dim + 1) / jnp.linalg.norm(jnp.arange(1.0, dim + 1))
    count = 20_000

    @jax.jit
    def along(k):
        draws = VonMisesFisher(direction, k).sample(jr.key(0), (count,))
        return draws @ direction, draws

    (length, draws), (slope, _) = jax.jvp(along, (jnp.asarray(kappa),), (jnp.asarray(1.0),))
    model = VonMisesFisher(direction, kappa)
    np.testing.assert_allclose(jnp.linalg.norm(draws, axis=-1), 1.0, rtol=1e-9)
    mean = float(model.mean @ direction)
    variance = float(direction @ _covariance(model) @ direction)
    # 6 standard errors: 2e-9 for each case.
    assert abs(float(length.mean()) - mean) < 6 * np.sqrt(variance / count)
    # The derivative of the mean in the concentration is the variance.
    assert abs(float(slope.mean()) - variance) < 6 * float(slope.std()) / np.sqrt(count) + 1e-12
    assert np.all(np.abs(draws.mean(axis=0) - model.mean) < 6 * np.sqrt(model.variance / count))


def _covariance(model):
    """Covariance matrix, rebuilt from the two variances that the class states coordinate by coordinate."""
    pole = jnp.zeros(model.dim).at[0].set(1.0)
    aligned = VonMisesFisher(pole, model.concentration).variance
    outer = jnp.outer(model.direction, model.direction)
    return aligned[0] * outer + aligned[1] * (jnp.eye(model.dim) - outer)


def test_fit_finds_what_was_drawn_and_the_marginal_fit_is_not_biased_upwards():
    direction = jnp.zeros(50).at[3].set(1.0)
    many = VonMisesFisher(direction, 40.0).sample(jr.key(1), (4000,))
    found = VonMisesFisher.fit(many)
    assert found.direction @ direction > 0.99
    assert abs(found.concentration - 40.0) < 1.5  # 5 standard errors, 1 / sqrt(n A'(kappa)) = .12 and a bias of .5
    few = VonMisesFisher(direction, 10.0).sample(jr.key(2), (400, 10))

    @jax.jit
    @jax.vmap
    def concentrations(x):
        return VonMisesFisher.fit(x).concentration, VonMisesFisher.fit(x, marginal=True).concentration

    plain, marginal = concentrations(few)
    assert plain.mean() > 14
    assert abs(marginal.mean() - 10.0) < abs(plain.mean() - 10.0) / 2


def test_directions_without_a_common_one():
    uniform = VonMisesFisher.fit(jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -0.999]]), marginal=True)
    assert uniform.concentration == 0.0


@pytest.mark.parametrize("x", [jnp.ones(3), jnp.ones((0, 3)), jnp.ones((4, 1))])
def test_refusals(x):
    with pytest.raises(ValueError, match="`x` must be unit vectors"):
        VonMisesFisher.fit(x)
