"""Chains against a conjugate posterior and against a long reference run."""

from pathlib import Path
from typing import Any

import arviz as az
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import stats

import genkit as gk
import genkit.mcmc._chains


# numpyro's own initialization uses keys twice
pytestmark = pytest.mark.key_reuse


def conjugate(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [gk.mcmc.NUTS(300, 1000, 2), gk.mcmc.HMC(300, 1000, 2, trajectory_length=1.5)], ids=["NUTS", "HMC"]
)
def test_conjugate_posterior(method):
    result = gk.infer(gk.Problem(conjugate, (1.0,)), method, key=jax.random.key(0))
    data = result.to_arviz()
    ess = float(az.ess(data)["x"])
    stats.assert_mean(np.ravel(result.samples["x"]), 0.8, sd=np.sqrt(0.2), ess=ess)
    rhat: Any = az.rhat(data)
    assert float(rhat["x"]) < 1.02
    assert result.khat is None
    assert not np.any(result.stats["diverging"])
    assert result.samples["x"].shape == result.log_density.shape == (2, 1000)


MEANS = [14.765, 7.156, 2.589, 6.557, 1.819, 3.397, 12.792, 7.949]
SDS = [10.796, 7.814, 10.473, 8.314, 7.458, 8.454, 8.163, 10.914]


@pytest.mark.slow
def test_eight_schools_agree_with_the_reference_posterior():
    """20 000 draws of Stan, from the inference-gym benchmark."""
    models = Path(__file__).parents[2] / "models"
    method = gk.mcmc.NUTS(800, 1000, 4, target_accept=0.9)
    result = gk.infer(gk.load(models / "eight_schools.py"), method, key=jax.random.key(0))
    ess = az.ess(result.to_arviz())
    want = {"avg_effect": (5.7598, 5.4654), "log_tau": (2.4533, 0.5147), "effect": (MEANS, SDS)}
    for name, (mean, sd) in want.items():
        draws = np.asarray(result.samples[name]).reshape(4000, -1)
        mean, sd, effective = np.atleast_1d(mean), np.atleast_1d(sd), np.atleast_1d(ess[name].values)
        error = stats.z_score(10) * sd * np.sqrt(1 / effective + 1 / 20_000)
        assert np.all(np.abs(draws.mean(0) - mean) < error), name
        assert np.all(np.abs(draws.std(0) / sd - 1) < 0.12), name
    assert result.stats["diverging"].mean() < 0.005


@pytest.mark.slow
def test_the_clock_changes_no_draw(monkeypatch):
    """Calls of one transition each, as under a slow model, against calls that double."""
    method, problem = gk.mcmc.NUTS(10, 20, 2), gk.Problem(conjugate, (1.0,))
    fast = gk.infer(problem, method, key=jax.random.key(0))
    calls = []
    monkeypatch.setattr(genkit.mcmc._chains.time, "perf_counter", lambda: calls.append(0) or 10.0 * len(calls))
    slow = gk.infer(problem, method, key=jax.random.key(0))
    assert len(calls) >= 2 * 25
    for name in ("samples", "stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(fast, name), getattr(slow, name))
