"""Measures: the contract of `sample` and `log_density`, with exact and with estimated densities."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
import stats
from jaxtyping import Array, Float, Key
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

import genkit as gk
from genkit.inference import DistributionMeasure, as_measure


LAWS = {
    "scalar": dist.Normal(1.0, 2.0),
    "batch": dist.Normal(jnp.arange(3.0), jnp.array([1.0, 2.0, 3.0])),
    "matrix of laws": dist.Gamma(2.0 * jnp.ones((2, 3)), 1.0),
    "event": dist.MultivariateNormal(jnp.zeros(2), jnp.array([[2.0, 0.5], [0.5, 1.0]])),
    "batch and event": dist.MultivariateNormal(jnp.zeros((4, 2)), jnp.eye(2)),
    "discrete": dist.Categorical(logits=jnp.array([0.0, 1.0, -1.0])),
    "batch of discrete": dist.Bernoulli(jnp.array([0.2, 0.8])),
    "transformed": dist.LogNormal(0.0, 0.5),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-2.0, 2.0]), jnp.ones(2))
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_log_density_is_the_joint_log_probability(name):
    law = LAWS[name]
    measure = as_measure(law)
    value, log_density = measure.sample(key=jr.key(3))
    assert value.shape == law.batch_shape + law.event_shape
    assert log_density.shape == ()
    np.testing.assert_array_equal(value, law.sample(jr.key(3)))
    np.testing.assert_allclose(log_density, np.sum(law.log_prob(value)), rtol=1e-6)
    np.testing.assert_array_equal(log_density, measure.log_density(value))
    np.testing.assert_array_equal(log_density, measure.log_density(value, key=jr.key(4)))


def test_closed_forms(x64):
    x = np.array([0.3, -1.2, 2.0])
    measure = as_measure(dist.Normal(jnp.arange(3.0), jnp.array([1.0, 2.0, 3.0])))
    exact = norm.logpdf(x, np.arange(3), [1, 2, 3]).sum()
    np.testing.assert_allclose(measure.log_density(jnp.asarray(x)), exact, rtol=1e-13)

    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    measure = as_measure(dist.MultivariateNormal(jnp.array([1.0, -1.0]), jnp.asarray(cov)))
    exact = multivariate_normal([1.0, -1.0], cov).logpdf([0.5, 0.5])
    np.testing.assert_allclose(measure.log_density(jnp.array([0.5, 0.5])), exact, rtol=1e-13)


def test_draws_follow_the_law():
    measure = as_measure(dist.Normal(jnp.array([0.0, 5.0]), jnp.array([1.0, 0.5])))
    draws, log_densities = jax.vmap(lambda key: measure.sample(key=key))(jr.split(jr.key(0), 40_000))
    stats.assert_mean(draws, np.array([0.0, 5.0]), sd=np.array([1.0, 0.5]), detects=0.05)
    stats.assert_distribution((draws - jnp.array([0.0, 5.0])) / jnp.array([1.0, 0.5]), norm.cdf, detects=0.05)
    entropy = np.sum(norm.entropy(scale=[1.0, 0.5]))
    stats.assert_mean(-log_densities, entropy, detects=0.05)


def test_jit_vmap_and_grad_pass_through():
    measure = as_measure(dist.Normal(1.0, 2.0))
    eager = measure.sample(key=jr.key(0))
    jitted = eqx.filter_jit(lambda m, key: m.sample(key=key))(measure, jr.key(0))
    np.testing.assert_allclose(jitted, eager, rtol=1e-6)

    def log_density(loc, x):
        return as_measure(dist.Normal(loc, 2.0)).log_density(x)

    np.testing.assert_allclose(jax.grad(log_density)(1.0, 3.0), (3.0 - 1.0) / 4.0, rtol=1e-6)
    batched = jax.vmap(measure.log_density)(jnp.arange(4.0))
    np.testing.assert_allclose(batched, norm.logpdf(np.arange(4), 1, 2), rtol=1e-6)


def test_parameters_are_leaves(compilations):
    # Other parameters of the same law must not compile again.
    draw = eqx.filter_jit(lambda m, key: m.sample(key=key))
    first, second = (as_measure(dist.Normal(jnp.float32(loc), jnp.float32(1.0))) for loc in (0.0, 7.0))
    key, same_key = jr.key(0), jr.key(0)
    value, _ = draw(first, key)
    with compilations() as count:
        shifted, _ = draw(second, same_key)
    assert count() == 0
    np.testing.assert_allclose(shifted, value + 7.0, rtol=1e-6)


def test_half_precision_is_kept():
    measure = as_measure(dist.Normal(jnp.bfloat16(0.0), jnp.bfloat16(1.0)))
    assert measure.log_density(jnp.bfloat16(0.5)).dtype == jnp.bfloat16


class TwoStage(gk.Measure):
    """x ~ N(z, 1) with z ~ N(0, 3): its density is only estimated, by one draw of z."""

    def sample(self, *, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        # The reciprocal of the joint density over the posterior of z: unbiased for 1 / p(x).
        key_z, key_x, key_posterior = jr.split(key, 3)
        x = jnp.sqrt(3.0) * jr.normal(key_z) + jr.normal(key_x)
        z = self.posterior(x).sample(key_posterior)
        proposal = dist.Normal(0.75 * x, 1.0)  # wider than the posterior, on purpose
        joint = dist.Normal(0.0, jnp.sqrt(3.0)).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        return x, joint - proposal.log_prob(z)

    def log_density(self, value: Float[Array, ""], *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        assert key is not None
        proposal = dist.Normal(0.75 * value, 1.0)
        z = proposal.sample(key)
        joint = dist.Normal(0.0, jnp.sqrt(3.0)).log_prob(z) + dist.Normal(z, 1.0).log_prob(value)
        return joint - proposal.log_prob(z)

    def posterior(self, x: Float[Array, ""]) -> dist.Normal:
        return dist.Normal(0.75 * x, jnp.sqrt(0.75))


def test_an_estimated_density_keeps_the_contract(x64):
    # E[exp(log_density)] = p(value), and E[exp(-log_density) | value] = 1 / p(value), averaged over values in a window
    # by its equivalent E[1{a < x < b} exp(-w)] = b - a.
    measure = TwoStage()
    assert as_measure(measure) is measure
    n = 200_000
    weights = jax.vmap(lambda key: measure.log_density(jnp.array(1.3), key=key))(jr.split(jr.key(0), n))
    stats.assert_mean(jnp.exp(weights), norm.pdf(1.3, scale=2.0), detects=0.01)

    values, w = jax.vmap(lambda key: measure.sample(key=key))(jr.split(jr.key(1), n))
    stats.assert_distribution(values, norm(scale=2.0).cdf, detects=0.02)
    stats.assert_mean(jnp.where((values > 0.5) & (values < 1.5), jnp.exp(-w), 0.0), 1.0, detects=0.05)
    # The naive reading, w as the exact log-density, is off by a gap that Jensen's inequality signs.
    assert logsumexp(weights, b=1 / n) > np.mean(weights)


def test_the_contract_check_sees_a_wrong_density(x64):
    measure = TwoStage()
    weights = jax.vmap(lambda key: measure.log_density(jnp.array(1.3), key=key))(jr.split(jr.key(0), 200_000))
    with pytest.raises(AssertionError, match="mean"):
        stats.assert_mean(jnp.exp(weights + 0.05), norm.pdf(1.3, scale=2.0), detects=0.01)


def test_measures_are_abstract_and_refuse_other_things():
    with pytest.raises(TypeError, match="abstract"):
        gk.Measure()
    for thing in (3.0, jnp.ones(2), lambda: None, dist.Normal, "normal"):
        with pytest.raises(TypeError, match="`measure` must be a genkit Measure or a numpyro distribution; got"):
            as_measure(thing)


def test_legacy_keys_are_refused():
    measure = DistributionMeasure(dist.Normal(0.0, 1.0))
    # The annotation refuses first where the suite checks types; the message is for those who run without.
    with pytest.raises(Exception, match="key"):
        measure.sample(key=jr.PRNGKey(0))
