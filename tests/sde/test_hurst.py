"""The Hurst index recovered: by gradient against the exact likelihood, and by NUTS."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size, gelman_rubin
from numpyro.infer import MCMC, NUTS
from scipy.optimize import minimize

import genkit as gk
import genkit.noise as gn
import genkit.sde as gs


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("hurst", [0.15, 0.5, 0.75])
def test_index_of_exact_paths(hurst):
    """Maximum likelihood of (H, scale) under the default lift, within a standard error of the exact one."""
    num = 256
    ts = np.arange(1, num + 1) / num
    path = gn.fbm(hurst, ts, key=jr.key(11))
    increments = jnp.diff(path, prepend=0.0)
    noise = gs.GaussianNoise(1e-3 * float(increments.std()))  # the path is seen all but exactly

    def exact(p):
        h = p[0]
        return -gn.fgn_log_prob(increments, h, scale=jnp.exp(p[1]) * (1 / num) ** h)

    def lifted(p):
        sde = gs.FractionalSDE(lambda t, x: 0 * x, gs.Constant(jnp.exp(p[1])), gn.ma_fbm(), p[0], 1.0)
        return -gs.kalman(sde, gs.Observed(ts, path, noise))

    best = []
    for loss in (exact, lifted):
        value_and_grad = jax.jit(jax.value_and_grad(loss))
        host = lambda p: tuple(np.asarray(v, float) for v in value_and_grad(jnp.asarray(p)))  # noqa: B023
        bounds = [(0.03, 0.97), (-3.0, 3.0)]
        best.append(minimize(host, np.array([0.5, 0.0]), jac=True, bounds=bounds, method="L-BFGS-B").x)
    error = np.sqrt(np.linalg.inv(np.asarray(jax.hessian(exact)(jnp.asarray(best[0]))))[0, 0])
    found = f"H = {hurst}: exact {best[0][0]:.4f} ({error:.4f}), lifted {best[1][0]:.4f}"
    print(found)  # noqa: T201 (shown by -s)
    assert abs(best[1][0] - best[0][0]) < error, found


@pytest.mark.long
@pytest.mark.key_reuse  # numpyro's chains split one key themselves
def test_nuts_over_index_scale_and_rate():
    ts = np.arange(1, 41) / 8
    with jax.enable_x64(True):
        root = np.linalg.cholesky(np.asarray(gn.fou_covariance(0.7, ts[:, None], ts[None], 1.0)))
    y = root @ np.random.default_rng(3).normal(size=40)
    lift = gn.ma_fbm(5, 0.05, 1e3)

    def model():
        hurst = numpyro.sample("hurst", dist.Uniform(0.05, 0.95))
        sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        theta = numpyro.sample("theta", dist.LogNormal(0.0, 0.5))
        sde = gs.FractionalSDE(gs.OrnsteinUhlenbeck(theta), gs.Constant(sigma), lift, hurst, 5.0)
        numpyro.factor("path", gs.kalman(sde, gs.Observed(ts, y, gs.GaussianNoise(0.05))))

    mcmc = MCMC(
        NUTS(model), num_warmup=300, num_samples=500, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jr.key(0))
    samples = mcmc.get_samples(group_by_chain=True)
    rhat = {name: float(gelman_rubin(np.asarray(value))) for name, value in samples.items()}
    found = {name: f"{value.mean():.3f} ({value.std():.3f}), r-hat {rhat[name]:.4f}" for name, value in samples.items()}
    print(found)  # noqa: T201 (shown by -s)
    assert max(rhat.values()) < 1.01
    assert abs(float(samples["hurst"].mean()) - 0.7) < 3 * float(samples["hurst"].std())


def nile_log_density(hurst, place, log_scale):
    """Of the flow of the Nile as fractional Gaussian noise of mean 900 + 100 place and scale 100 exp(log_scale)."""
    flow = jnp.asarray(gk.data.nile()[1])
    standard = (flow - 900 - 100 * place) / (100 * jnp.exp(log_scale))
    # Five processes up to 1e3 would put the maximum at .777.
    sde = gs.FractionalSDE(lambda t, x: 0 * x, gs.Constant(1.0), gn.ma_fbm(), hurst, 100.0)
    path = gs.Observed(np.arange(1.0, 101.0), jnp.cumsum(standard), gs.GaussianNoise(0.02))
    return gs.kalman(sde, path) - 100 * (jnp.log(100.0) + log_scale)


@pytest.mark.long
@pytest.mark.usefixtures("x64")
def test_index_of_the_nile():
    """Maximum likelihood of (H, mean, scale) beside the exact fit of fractional Gaussian noise, .805 (.060)."""
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: -nile_log_density(*p)))
    host = lambda p: tuple(np.asarray(v, float) for v in value_and_grad(jnp.asarray(p)))
    start, bounds = np.array([0.6, 0.0, 0.5]), [(0.05, 0.97), (-3.0, 3.0), (-1.0, 2.0)]
    best = minimize(host, start, jac=True, bounds=bounds, method="L-BFGS-B")
    gradient = lambda h: value_and_grad(jnp.asarray([h, *best.x[1:]]))[1][0]
    error = 1 / np.sqrt(float(gradient(best.x[0] + 1e-3) - gradient(best.x[0] - 1e-3)) / 2e-3)
    found = f"H = {best.x[0]:.4f}, error at fixed mean and scale {error:.4f}, log-density {-best.fun:.3f}"
    print(found)  # noqa: T201 (shown by -s)
    assert abs(best.x[0] - 0.805) < 0.015, found  # a quarter of the standard error
    assert abs(-best.fun + 637.166) < 0.1


def exact_posterior(flow, indices):
    """Mean and deviation of H where its prior is uniform, that of the mean flat, of the scale 1/s: both integrated."""
    lags, num = np.arange(flow.size), flow.size
    log_weights = []
    for h in indices:
        row = 0.5 * (np.abs(lags + 1) ** (2 * h) - 2 * lags ** (2 * h) + np.abs(lags - 1) ** (2 * h))
        root = np.linalg.cholesky(row[np.abs(lags[:, None] - lags)])
        y, one = np.linalg.solve(root, np.stack([flow, np.ones(num)], 1)).T
        precision = one @ one
        rest = y @ y - (one @ y) ** 2 / precision
        log_weights.append(-np.log(np.diag(root)).sum() - 0.5 * np.log(precision) - 0.5 * (num - 1) * np.log(rest))
    weights = np.exp(np.array(log_weights) - max(log_weights))
    weights = weights / weights.sum()
    mean = weights @ indices
    return mean, np.sqrt(weights @ (indices - mean) ** 2)


@pytest.mark.long
@pytest.mark.key_reuse  # numpyro's chains split one key themselves
@pytest.mark.usefixtures("x64")
def test_posterior_of_the_index_of_the_nile():
    """NUTS over (H, mean, scale) under the default lift beside the exact posterior of fractional Gaussian noise."""

    def model():
        hurst, flat = (
            numpyro.sample("hurst", dist.Uniform(0.05, 0.97)),
            dist.ImproperUniform(dist.constraints.real, (), ()),
        )
        place, log_scale = (numpyro.sample(name, flat) for name in ("place", "log_scale"))
        numpyro.factor("flow", nile_log_density(hurst, place, log_scale))

    mcmc = MCMC(
        NUTS(model), num_warmup=200, num_samples=500, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jr.key(0))
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["hurst"])
    size = float(effective_sample_size(draws))
    mean, deviation = exact_posterior(np.asarray(gk.data.nile()[1]), np.linspace(0.05, 0.97, 185))
    found = (
        f"H = {draws.mean():.4f} ({draws.std():.4f}), exact {mean:.4f} ({deviation:.4f}), {size:.0f} effective draws"
    )
    print(found, f"r-hat {float(gelman_rubin(draws)):.4f}")  # noqa: T201 (shown by -s)
    assert gelman_rubin(draws) < 1.02
    # A quarter of the deviation for the lift, and five standard errors.
    assert abs(draws.mean() - mean) < 0.25 * deviation + 5 * deviation / np.sqrt(size), found
    assert abs(draws.std() / deviation - 1) < 0.15, found
