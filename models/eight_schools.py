"""Eight schools: the effect of coaching on test scores, partially pooled, non-centered.

What: `avg_effect ~ N(0, 10)`, `log_tau ~ N(5, 1)`, school effects `avg_effect + exp(log_tau) z`.
Source: Rubin, "Estimation in parallel randomized experiments", Journal of Educational Statistics 6 (1981); priors as in
the inference-gym benchmark, whose long Stan run gives avg_effect 5.76 (sd 5.47) and log_tau 2.45 (sd 0.51).
Cost: NUTS with 4 chains of 1000 draws about ten seconds on two cores.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import genkit as gk


effects = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
std_errs = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(y, sigma):
    """Effects of eight schools around their average."""
    avg_effect = numpyro.sample("avg_effect", dist.Normal(0.0, 10.0))
    log_tau = numpyro.sample("log_tau", dist.Normal(5.0, 1.0))
    with numpyro.plate("school", 8):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        effect = numpyro.deterministic("effect", avg_effect + jnp.exp(log_tau) * z)
        numpyro.sample("y", dist.Normal(effect, sigma), obs=y)


problem = gk.Problem(model, args=(effects, std_errs), name="eight schools")
