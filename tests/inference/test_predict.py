"""Predictions for new inputs, forecasts, and draws of the prior, against closed forms."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import genkit as gk


pytestmark = pytest.mark.key_reuse  # numpyro's handlers split one key several times
COUNT = 20_000


def posterior_of(model, samples, **facts):
    return gk.Posterior(samples, None, ("draw",), model=model, **facts)


def close(values, mean, sd):
    """Mean and standard deviation within five of their standard errors (of a normal variable)."""
    n = len(values)
    assert np.all(np.abs(values.mean(0) - mean) < 5.0 * sd / np.sqrt(n))
    assert np.all(np.abs(values.std(0) / sd - 1.0) < 5.0 / np.sqrt(2 * n))


def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    numpyro.deterministic("mean", slope * x)
    numpyro.sample("y", dist.Normal(slope * x, 0.3), obs=y)


def test_a_regression_is_predicted_at_new_inputs():
    slopes = 1.5 + 0.2 * np.asarray(jr.normal(jr.key(0), (COUNT,)))
    x = np.array([1.0, -2.0, 4.0])
    found = posterior_of(line, {"slope": slopes}).predict(x, key=jr.key(1), batch_size=3000)
    assert set(found) == {"y", "mean"}
    np.testing.assert_allclose(found["mean"], slopes[:, None] * x, rtol=1e-6)
    close(found["y"] - slopes[:, None] * x, 0.0, 0.3)


def schools(sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    with numpyro.plate("school", len(sigma)):
        effect = numpyro.sample("effect", dist.Normal(mu, 2.0))
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)


def test_new_members_of_a_plate_come_from_the_model():
    mu = 3.0 + 0.5 * np.asarray(jr.normal(jr.key(0), (COUNT,)))
    effects = np.asarray(jr.normal(jr.key(1), (COUNT, 2)))
    posterior = posterior_of(schools, {"mu": mu, "effect": effects})
    found = posterior.predict(np.array([1.0, 1.0, 0.5]), key=jr.key(2))
    np.testing.assert_allclose(found["effect"][:, :2], effects, rtol=1e-6)
    close(found["effect"][:, 2], 3.0, np.sqrt(4.0 + 0.25))
    close(found["y"][:, 2], 3.0, np.sqrt(4.0 + 0.25 + 0.25))
    close(found["y"][:, 0] - effects[:, 0], 0.0, 1.0)
    with pytest.raises(ValueError, match="'effect'.*smaller"):
        posterior.predict(np.ones(1), key=jr.key(2))


def walk(loop):
    def model(length, y=None):
        phi = numpyro.sample("phi", dist.Uniform(0.0, 1.0))

        def step(x, _):
            x = numpyro.sample("x", dist.Normal(phi * x, 0.4))
            return x, None

        loop(step, 1.0, None, length)

    return model


@pytest.mark.parametrize("loop", [scan, gk.vi.scan])
def test_a_loop_goes_on_from_its_last_state(loop):
    known = np.broadcast_to(np.array([0.7, -0.2, 2.0]), (COUNT, 3))
    posterior = posterior_of(walk(loop), {"phi": np.full(COUNT, 0.8), "x": known})
    found = posterior.predict(6, key=jr.key(0))["x"]
    np.testing.assert_allclose(found[:, :3], known, rtol=1e-6)
    steps = np.arange(1, 4)
    close(found[:, 3:], 2.0 * 0.8**steps, 0.4 * np.sqrt(np.cumsum(0.64 ** (steps - 1))))


def test_new_rows_of_a_mixture():
    def mixture(n, y=None):
        w = numpyro.sample("w", dist.Beta(2.0, 3.0))
        with numpyro.plate("n", n):
            z = numpyro.sample("z", dist.Bernoulli(w))
            numpyro.sample("y", dist.Normal(3.0 * z, 0.5), obs=y)

    y = np.array([0.1, 2.9, 3.2, -0.4])
    method = gk.mcmc.NUTS(200, 1000, num_chains=2)
    posterior = gk.infer(gk.Problem(mixture, (4, y)), method, key=jr.key(0))
    found = posterior.predict(5, key=jr.key(1))
    np.testing.assert_array_equal(found["z"][..., :4], posterior.samples["z"])
    # Two of four are ones, so w ~ Beta(4, 5) up to the labels' doubts, which are small.
    assert abs(found["z"][..., 4].mean() - 4 / 9) < 0.06
    data = posterior.to_arviz(prior=gk.Problem(mixture, (4, y)).prior(10, key=jr.key(2)), predictions=found)
    groups = set(data.children) if hasattr(data, "children") else set(data.groups())
    assert {"prior", "prior_predictive", "predictions"} <= groups
    assert data["predictions"]["y"].shape == (2, 1000, 5)


def test_the_prior_draws_what_is_observed():
    draws = gk.Problem(line, (np.array([1.0, 2.0]), np.array([5.0, 5.0]))).prior(COUNT, key=jr.key(0))
    close(draws["y"][:, 1], 0.0, np.sqrt(16.0 + 0.09))
    np.testing.assert_allclose(draws["mean"], draws["slope"][:, None] * np.array([1.0, 2.0]), rtol=1e-6)

    def chain(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 2.0), obs=y)
            return x, None

        scan(step, 0.0, y)

    draws = gk.Problem(chain, (np.zeros(3),)).prior(COUNT, key=jr.key(0))
    close(draws["y"], 0.0, np.sqrt(np.array([5.0, 6.0, 7.0])))


def test_draws_of_equal_weight():
    """Weights of an exponential tilt: the mean of draws moves from 0 to where the density has it."""
    x = np.asarray(jr.normal(jr.key(0), (COUNT,)), np.float64)
    log_q = -0.5 * x**2
    posterior = posterior_of(line, {"slope": x}, log_q=log_q)
    posterior = gk.Posterior({"slope": x}, -0.5 * (x - 0.5) ** 2, ("draw",), log_q=log_q)
    found = posterior.resample(COUNT, key=jr.key(1))
    assert found.log_q is None and abs(found.samples["slope"].mean() - 0.5) < 0.05
    chains = gk.Posterior({"x": np.arange(6.0).reshape(2, 3)}, None, ("chain", "draw"))
    assert set(chains.resample(50, key=jr.key(0)).samples["x"]) <= set(range(6))


def test_what_cannot_be_predicted_is_told():
    posterior = posterior_of(line, {"slope": np.ones(3)})
    with pytest.raises(ValueError, match="must know its model"):
        gk.Posterior({"slope": np.ones(3)}, None, ("draw",)).predict(np.ones(2), key=jr.key(0))

    def bare(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("m", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match="something to predict"):
        posterior_of(bare, {"m": np.ones(3)}).predict(1.0, key=jr.key(0))

    def wide(n, y=None):
        numpyro.sample("v", dist.Normal(jnp.zeros(n), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="'v'.*axis 0 is in no plate"):
        posterior_of(wide, {"v": np.ones((3, 2))}).predict(4, key=jr.key(0))
    with pytest.raises(TypeError, match="key"):
        posterior.predict(np.ones(2), key=jax.random.PRNGKey(0))
