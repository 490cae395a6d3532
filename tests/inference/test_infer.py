"""Inference against closed forms: the coin, a conjugate normal; k-hat; ArviZ."""

import importlib

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import genkit as gk
from genkit.inference._pareto import pareto_smooth


def conjugate(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def arviz_psis(log_w):
    """ArviZ's smoothed weights, its k-hat, and how near ours must come."""
    if hasattr(az, "psislw"):
        return *az.psislw(log_w.copy()), 1e-6
    # ArviZ 1.x takes the negative and draws the shape elsewhere: another estimator of the same tail.
    array_stats = importlib.import_module("arviz_stats.base").array_stats
    return *array_stats.psislw(-log_w, axis=-1), 0.04


def test_khat_agrees_with_arviz():
    rng = np.random.default_rng(0)
    for scale in (0.5, 1.0, 2.0):
        log_w = scale * rng.standard_normal(2000)
        smooth, khat = pareto_smooth(log_w)
        reference, reference_khat, near = arviz_psis(log_w)
        np.testing.assert_allclose(khat, reference_khat, atol=near)
        np.testing.assert_allclose(smooth - smooth[0], np.asarray(reference - reference[0]), atol=near)


def test_conjugate_normal_by_variational_inference():
    method = gk.vi.Fit(num_steps=600, num_samples=4000, num_particles=16)
    result = gk.infer(gk.Problem(conjugate, (1.0,)), method, key=jax.random.key(0))
    x = np.asarray(result.samples["x"])
    assert abs(x.mean() - 0.8) < 0.05
    assert abs(x.std() - np.sqrt(0.2)) < 0.03
    assert result.evidence is not None
    lower, upper = result.evidence
    assert lower <= upper
    assert abs(lower - -1.430510308862) < 0.02
    data = result.to_arviz()
    assert data["posterior"]["x"].shape == (1, 4000)
    assert {"log_p", "log_q", "log_w"} <= set(data["sample_stats"].data_vars)
    assert hasattr(data, "optimization")


def test_wrong_methods_are_named():
    with pytest.raises(TypeError, match="run"):
        gk.infer(gk.Problem(conjugate, (1.0,)), "nuts", key=jax.random.key(0))
    with pytest.raises(TypeError, match="Problem"):
        gk.infer(conjugate, gk.vi.Fit(), key=jax.random.key(0))  # pyright: ignore[reportArgumentType]

    def discrete():
        numpyro.sample("b", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="discrete"):
        gk.infer(gk.Problem(discrete), gk.mcmc.NUTS(10, 10, marginalize=False), key=jax.random.key(0))
    with pytest.raises(ValueError, match="continuous"):
        gk.infer(gk.Problem(discrete), gk.vi.Fit(marginalize=False), key=jax.random.key(0))
    with pytest.raises(ValueError, match="continuous latent site"):
        gk.infer(gk.Problem(discrete), gk.mcmc.NUTS(10, 10), key=jax.random.key(0))


def test_bad_guides_are_told():
    class Wrong(gk.Measure):
        loc: jax.Array

        def sample(self, *, key):
            value = self.loc + 0.2 * jax.random.normal(key)
            return {"x": value}, self.log_density({"x": value})

        def log_density(self, value, *, key=None):
            return dist.Normal(self.loc, 0.2).log_prob(value["x"])

    with pytest.warns(UserWarning, match="k-hat"):
        gk.infer(
            gk.Problem(conjugate, (1.0,)),
            gk.vi.Fit(Wrong(jnp.array(-2.0)), num_steps=1, num_samples=2000),
            key=jax.random.key(0),
        )
