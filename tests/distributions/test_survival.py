"""Survival distributions: closed values, limits, cured fractions, censoring."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate

from genkit.distributions import APGW, censored


pytestmark = pytest.mark.usefixtures("x64")

# scale, time scale, shape, kappa; time; log-density, log-survival
VALUES = [
    ((1.0, 0.5, 1.5, 0.0), 3.0, -2.1705265263, -1.0427885040),
    ((1.2, 0.4, 1.3, -0.4), 5.0, -3.4078349743, -0.8621906781),
    ((0.2, 0.3, 1.0, jnp.inf), 4.0, -2.0774341013, -0.4640233845),
    ((0.5, 0.2, 0.6, 3.0), 6.0, -3.1221722213, -0.7278337918),
]


@pytest.mark.parametrize(("parameters", "time", "log_density", "log_survival"), VALUES)
def test_closed_values(parameters, time, log_density, log_survival):
    duration = APGW(*parameters)
    np.testing.assert_allclose(duration.log_prob(time), log_density, atol=1e-10)
    np.testing.assert_allclose(duration.log_survival(time), log_survival, atol=1e-10)
    np.testing.assert_allclose(duration.icdf(duration.cdf(time)), time, rtol=1e-12)
    density = jax.jit(lambda t: jnp.exp(duration.log_prob(t)))
    mass = scipy.integrate.quad(lambda t: float(density(t)), 0, time, limit=200)[0]
    np.testing.assert_allclose(mass, duration.cdf(time), atol=1e-8)


def test_quantiles_and_the_cured():
    np.testing.assert_allclose(APGW(1.0, 0.5, 1.5, 0.0).icdf(0.3), 1.13687349, atol=1e-8)
    defective = APGW(1.2, 0.4, 1.3, -0.4)
    np.testing.assert_allclose(defective.icdf(0.3), 1.33440168, atol=1e-8)
    np.testing.assert_allclose(defective.cure_fraction, 0.16529889, atol=1e-8)
    np.testing.assert_allclose(defective.log_prob(jnp.inf), jnp.log(defective.cure_fraction))
    assert defective.icdf(0.84) == jnp.inf
    assert APGW(1.0, 1.0, 1.0, 2.0).log_prob(jnp.inf) == -jnp.inf
    draws = defective.sample(jr.key(0), (40_000,))
    # 5.3 standard errors of a proportion: 1e-7 for each of the two sides.
    standard_error = np.sqrt(0.16529889 * 0.83470111 / 40_000)
    assert abs(float(jnp.isinf(draws).mean()) - 0.16529889) < 5.3 * standard_error


@pytest.mark.parametrize("kappa", [-1e-5, -1e-12, 0.0, 1e-12, 1e-5])
def test_small_kappa_keeps_its_digits(kappa):
    duration = APGW(1.0, 0.5, 1.5, kappa)
    u = 2.0**1.5
    # First-order expansion in kappa about Burr's log(1 + u); second-order terms are below 1e-9.
    burr = np.log1p(u)
    slope = burr - u / (1 + u) + burr**2 / 2
    np.testing.assert_allclose(duration.cumulative_hazard(4.0), burr + kappa * slope, atol=1e-9)
    gradient = jax.grad(lambda k: APGW(1.0, 0.5, 1.5, k).cumulative_hazard(4.0))(kappa)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4)


def test_special_members():
    t = jnp.array([0.3, 1.0, 2.5])
    np.testing.assert_allclose(APGW(1.0, 0.5, 1.7, 1.0).log_prob(t), dist.Weibull(2.0, 1.7).log_prob(t), rtol=1e-12)
    np.testing.assert_allclose(APGW(0.7, 1.0, 1.0, 1.0).log_prob(t), dist.Exponential(0.7).log_prob(t), rtol=1e-12)


def test_far_tails_do_not_pass_through_one_minus_the_distribution_function():
    # numpyro's right-censored distribution answers -15.94 with gradient zero in float32.
    with jax.enable_x64(False):
        value, slope = jax.value_and_grad(lambda s: censored(dist.Weibull(s, 1.0), upper=30.0).log_prob(30.0))(1.0)
    assert value == -30.0
    assert slope == 30.0
    np.testing.assert_allclose(censored(dist.Normal(0.0, 1.0), upper=40.0).log_prob(40.0), -804.6084420137539)
    # Q(2.5, 900) by its asymptotic series, whose third term is below 1e-8.
    series = 1.5 * np.log(900) - 900 - float(jax.scipy.special.gammaln(2.5)) + np.log1p(1.5 / 900 + 0.75 / 900**2)
    np.testing.assert_allclose(censored(dist.Gamma(2.5, 1.0), upper=900.0).log_prob(900.0), series, rtol=1e-10)


def test_both_bounds_and_exact_values():
    normal = censored(dist.Normal(0.5, 2.0), lower=-1.0, upper=jnp.array([2.0, 3.0]))
    values = jnp.array([2.0, 1.0])
    expected = [np.log(1 - float(dist.Normal(0.5, 2.0).cdf(2.0))), float(dist.Normal(0.5, 2.0).log_prob(1.0))]
    np.testing.assert_allclose(normal.log_prob(values), expected, rtol=1e-12)
    np.testing.assert_allclose(normal.log_prob(-1.0), np.log(float(dist.Normal(0.5, 2.0).cdf(-1.0))), rtol=1e-12)
    draws = normal.sample(jr.key(0), (1000,))
    assert draws.min() == -1.0
    assert jnp.array_equal(draws.max(axis=0), jnp.array([2.0, 3.0]))


def test_counts_at_the_bound_include_it():
    counts = censored(dist.Poisson(3.0), upper=2)
    expected = np.log([np.exp(-3), 3 * np.exp(-3), 1 - 4 * np.exp(-3)])
    np.testing.assert_allclose(counts.log_prob(jnp.arange(3)), expected, rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(counts.log_prob(jnp.arange(3))).sum(), 1.0)


def test_gradients_of_censored_data_are_finite():
    def loss(rate):
        times = jnp.array([0.5, 2.0, 3.0])
        left = jnp.array([jnp.inf, 2.0, jnp.inf])
        return censored(dist.Gamma(2.0, rate), upper=left).log_prob(times).sum()

    step = 1e-5
    difference = (loss(1.3 + step) - loss(1.3 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(1.3), difference, rtol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match="`distribution` must be a numpyro distribution of empty event shape"):
        censored(dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), upper=1.0)
    with pytest.raises(ValueError, match="`lower` must be at most `upper`"):
        censored(dist.Normal(0.0, 1.0), lower=2.0, upper=1.0)
