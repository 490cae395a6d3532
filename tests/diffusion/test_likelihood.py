"""Likelihood under the probability flow: its three errors apart, probes, draws with densities, laws for numpyro."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from stats import assert_mean

import genkit as gk
from genkit.sampling import check_levels


gd = gk.diffusion
SIGMA_MIN, SIGMA_MAX = 0.02, 100.0


def mixture():
    covs = [[[0.09, 0.02], [0.02, 0.04]], [[0.04, -0.01], [-0.01, 0.09]], [[0.0625, 0.0], [0.0, 0.0625]]]
    means = [[-1.5, 0.0], [1.5, 0.5], [0.0, 1.5]]
    return gd.MixtureDenoiser(jnp.array([0.5, 0.3, 0.2]), jnp.array(means), jnp.array(covs))


def points(law, num_samples=64):
    return law.sample(num_samples, key=jr.key(1)) + SIGMA_MIN * jr.normal(jr.key(2), (num_samples, 2))


@jax.jit
def found_at(law, x, tolerance, sigma_max):
    one = lambda x: gd.log_prob(law, x, sigma_min=SIGMA_MIN, sigma_max=sigma_max, rtol=tolerance, atol=tolerance)
    return jax.vmap(one)(x), jax.vmap(lambda x: law.log_density(x, SIGMA_MIN))(x)


def test_the_solver_error_falls_with_the_tolerance(x64):
    # The ladder: worst of 64 points in nats, the terminal law exact; steps as many as the same solver needs in the time
    # of a variance-preserving schedule, 6, 12, 27 and 63 on average, for errors that may not be larger than there.
    law = mixture()
    x = points(law)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        found, exact = found_at(law, x, tolerance, SIGMA_MAX)
        assert bool(found.ok.all())
        np.testing.assert_allclose(found.value, found.terminal + found.volume)
        np.testing.assert_array_equal(found.std_err, 0)
        errors.append(float(jnp.abs(found.value - exact).max()))
        evaluations.append(float(found.nfe.mean()))
    assert np.all(np.array(errors) <= [1.9e-2, 6.4e-5, 6.6e-7, 1.0e-8])
    assert np.all(np.array(evaluations) <= 1 + 6 * np.array([6, 12, 27, 63]))


def test_the_three_errors_are_apart(x64):
    law = mixture()
    x = points(law)
    wide = found_at(law, x, 1e-8, 8.0)[0]
    centered = dist.Normal(jnp.zeros(2), 8.0).to_event(1)
    # A terminal law that is wrong shows in the terminal part alone, by exactly its own error.
    wrong = wide.terminal - jax.vmap(lambda z: law.log_density(z, 8.0))(wide.latent)
    np.testing.assert_allclose(wrong, 0, atol=1e-12)
    mismatch = centered.log_prob(wide.latent) - wide.terminal
    assert 1e-4 < np.abs(mismatch).max() < 0.2
    # Truncation: the density is that of data with noise sigma_min, not of data.
    truncated = jax.vmap(lambda x: law.log_density(x, SIGMA_MIN) - law.log_density(x, 0.0))(x)
    exact = jax.vmap(lambda x: law.log_density(x, 0.0))(x)
    np.testing.assert_allclose(wide.value - exact, truncated, atol=1e-6)
    assert np.abs(truncated).max() > 1e-3


@jax.jit
def probed(law, x, keys):
    one = lambda key: gd.log_prob(
        law, x, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, trace=gd.Hutchinson(4), key=key, rtol=1e-4, atol=1e-4
    )
    return jax.vmap(one)(keys)


@pytest.mark.slow
def test_probes_are_unbiased_and_say_their_error(x64):
    law = mixture()
    x = points(law)[3]
    exact = float(law.log_density(x, SIGMA_MIN))
    found = probed(law, x, jr.split(jr.key(5), 300))
    assert_mean(np.asarray(found.value), exact, detects=None)
    # The reported error is the deviation of the estimates.
    spread = float(jnp.std(found.value, ddof=1))
    np.testing.assert_allclose(np.sqrt(np.mean(found.std_err**2)), spread, rtol=0.25)
    # On data of diagonal covariance the Jacobian is diagonal: every probe is exact.
    plain = gd.GaussianDenoiser(jnp.zeros(2), jnp.array([4.0, 0.25]))
    exact = float(plain.log_density(x, SIGMA_MIN))
    np.testing.assert_allclose(probed(plain, x, jr.split(jr.key(6), 3)).value, exact, atol=1e-3)


@pytest.mark.slow
def test_draws_bring_their_density_in_one_solve(x64):
    law = mixture()
    ends = {"sigma_min": SIGMA_MIN, "sigma_max": 30.0, "rtol": 1e-8, "atol": 1e-8}

    @jax.jit
    def both(keys):
        terminal = dist.Normal(jnp.zeros(2), 30.0)

        def one(key):
            x, found = gd.sample_log_prob(law, key=key, **ends)
            return x, found, gd.log_prob(law, x, terminal=terminal, **ends)

        return jax.vmap(one)(keys)

    x, forward, back = both(jr.split(jr.key(0), 32))
    np.testing.assert_allclose(forward.value, back.value, atol=1e-5)
    np.testing.assert_allclose(forward.latent, back.latent, atol=1e-5 * 30)
    assert x.shape == (32, 2) and bool(forward.ok.all())


@pytest.mark.slow
def test_adaptive_draws_follow_the_exact_flow(x64):
    law = gd.GaussianDenoiser(jnp.zeros(3), jnp.array([4.0, 1.0, 0.01]))
    start = 20.0 * jr.normal(jr.key(0), (5, 3))
    draws = gk.sample(gd.probability_flow(SIGMA_MIN, 20.0, 1e-8, 1e-8), law, 5, key=jr.key(1), x_init=start)
    exact = jax.vmap(lambda x: gd.teleport(law, x, 20.0, SIGMA_MIN))(start)
    np.testing.assert_allclose(draws.value, exact, atol=1e-6)
    assert bool(draws.info["ok"].all()) and np.all(draws.nfe >= draws.nfe_logical)


def degenerate():
    basis = jnp.linalg.qr(jr.normal(jr.key(3), (6, 6)))[0]
    cov = (basis * jnp.array([9.0, 4.0, 1.0, 0.3, 0.0, 0.0])) @ basis.T
    return gd.GaussianDenoiser(jnp.arange(6.0), 0.5 * (cov + cov.T))


def test_teleportation_is_exact_on_gaussian_data(x64):
    # Any rank, any pair of levels: against the closed form of the flow with a fine table, and there and back.
    law = degenerate()
    x = 40 * jr.normal(jr.key(4), (2, 6))
    port = jax.jit(jax.vmap(lambda x, s, t: gd.teleport(law, x, s, t), in_axes=(0, None, None)))
    there = port(x, 40.0, 2.0)
    fine = gk.sample(gd.unipc(gd.log_uniform(2000, 2.0, 40.0, None)), law, 2, key=jr.key(0), x_init=x)
    np.testing.assert_allclose(there, fine.value, atol=1e-9)
    np.testing.assert_allclose(port(there, 2.0, 40.0), x, rtol=1e-11)
    # Rank two: the other directions are pure noise and shrink with it.
    still = jnp.eye(6) - law.basis[:, 2:] @ law.basis[:, 2:].T
    np.testing.assert_allclose((there - law.mean) @ still, (x - law.mean) @ still * 0.05, rtol=1e-6, atol=1e-7)
    # A draw that starts by it costs less and is the same.
    whole = gk.sample(gd.unipc(gd.log_uniform(120, 0.01, 40.0)), law, 2, key=jr.key(0), x_init=x)
    short = gd.Teleported(gd.unipc(gd.log_uniform(80, 0.01, 2.0)), law, 40.0)
    skipped = gk.sample(short, law, 2, key=jr.key(0), x_init=x)
    np.testing.assert_allclose(skipped.value, whole.value, atol=1e-4)
    assert int(skipped.nfe[0]) < 0.7 * int(whole.nfe[0])


@pytest.mark.slow
def test_bits_do_not_depend_on_the_scale_of_the_data(x64):
    # x -> 3 x - 1 with everything else alike: the same bits per dimension.
    law = mixture()
    moved = gd.MixtureDenoiser(law.weights, 3 * law.means - 1, 9 * law.covs)
    x = points(law, 4)
    kwargs = {"rtol": 1e-9, "atol": 1e-9}
    small = jax.vmap(lambda x: gd.log_prob(law, x, sigma_min=0.02, sigma_max=50.0, **kwargs).value)
    large = jax.vmap(lambda x: gd.log_prob(moved, x, sigma_min=0.06, sigma_max=150.0, sigma_data=3.0, **kwargs).value)
    bits = gd.bits_per_dim(jax.jit(small)(x), 2, 17, 1.0)
    np.testing.assert_allclose(gd.bits_per_dim(jax.jit(large)(3 * x - 1), 2, 17, 3.0), bits, atol=1e-7)


def test_bits_of_uniform_data():
    # Uniform levels: a density of 1 / scale on every coordinate is log2(levels) bits.
    assert float(gd.bits_per_dim(jnp.array(-5 * np.log(2.0)), 5, 16, 2.0)) == pytest.approx(4.0)
    ink = jnp.arange(17)
    x = gd.dequantize(ink, 17, 2.0, -1.0, key=jr.key(0))
    np.testing.assert_array_equal(jnp.floor((x + 1) / 2 * 17).astype(int), ink)


def test_an_example_out_of_steps_is_flagged_and_harms_nobody(x64):
    law = mixture()
    x = points(law, 8)
    ends = {"sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rtol": 1e-7, "atol": 1e-7}
    found = jax.jit(jax.vmap(lambda x: gd.log_prob(law, x, max_steps=25, **ends)))(x)
    assert 0 < int(found.ok.sum()) < 8
    np.testing.assert_array_equal(np.isnan(found.value), ~found.ok)
    exact = jax.vmap(lambda x: law.log_density(x, SIGMA_MIN))(x)
    np.testing.assert_allclose(found.value[found.ok], exact[found.ok], atol=1e-6)


@pytest.mark.slow
def test_a_draw_out_of_steps_is_flagged_and_harms_nobody(x64):
    # The exact flow of few draws from near the data needs fewer steps than that of the others.
    law = mixture()
    x_init = jnp.concatenate([0.01 * jr.normal(jr.key(0), (4, 2)), 100.0 * jr.normal(jr.key(1), (4, 2))])
    ends = (SIGMA_MIN, SIGMA_MAX, 1e-7, 1e-7)
    whole = gk.sample(gd.probability_flow(*ends), law, 8, key=jr.key(0), x_init=x_init)
    steps = np.sort((np.asarray(whole.nfe_logical) - 1) // 6)
    short = gd.probability_flow(*ends, max_steps=int(steps[3]))
    with pytest.raises(gk.NonFiniteError, match="draw") as caught:
        gk.sample(short, law, 8, key=jr.key(0), x_init=x_init)
    found = caught.value.draws
    ok = np.asarray(found.info["ok"])
    np.testing.assert_array_equal(ok, np.asarray(whole.nfe_logical) <= 1 + 6 * steps[3])
    assert 0 < ok.sum() < 8
    np.testing.assert_array_equal(found.value[ok], whole.value[ok])
    assert np.isnan(found.value[~ok]).all()


@pytest.mark.slow
def test_gradients_by_the_data_and_by_the_model(x64):
    # By the data the derivative is the score, whichever way it is taken; by the mean of the model it is its opposite.
    x = jnp.array([0.7, -0.2])

    def value(mean, x):
        law = gd.GaussianDenoiser(mean, jnp.array([1.0, 0.25]))
        return gd.log_prob(law, x, sigma_min=0.1, sigma_max=20.0, rtol=1e-8, atol=1e-8).value

    by_mean, by_x = jax.jit(jax.grad(value, (0, 1)))(jnp.zeros(2), x)
    score = -x / (jnp.array([1.0, 0.25]) + 0.01)
    np.testing.assert_allclose(by_x, score, atol=1e-6)
    np.testing.assert_allclose(by_mean, -score, atol=1e-6)


def linear_problem():
    """A Gaussian prior as a diffusion model under a linear observation, with mean and covariance of the posterior."""
    cov = jnp.array([[1.0, 0.6], [0.6, 0.8]])
    prior = gd.GaussianDenoiser(jnp.array([0.5, -0.5]), cov)
    operator, noise, y = jnp.array([[1.0, 2.0]]), 0.5, jnp.array([1.3])
    law = gd.FlowDistribution(prior, SIGMA_MIN, 50.0, rtol=1e-4, atol=1e-4)

    def model():
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(operator @ x, noise).to_event(1), obs=y)

    total = cov + SIGMA_MIN**2 * jnp.eye(2)
    gain = total @ operator.T @ jnp.linalg.inv(operator @ total @ operator.T + noise**2 * jnp.eye(1))
    return law, model, prior.mean + gain @ (y - operator @ prior.mean), total - gain @ operator @ total


# numpyro splits the key of a site twice when it looks for a place to start.
@pytest.mark.slow
@pytest.mark.key_reuse
def test_a_diffusion_prior_in_a_numpyro_model_under_nuts(x64):
    from numpyro.diagnostics import effective_sample_size

    _, model, mean, exact = linear_problem()
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=1500, progress_bar=False)
    mcmc.run(jr.key(0))
    draws = np.asarray(mcmc.get_samples()["x"])
    sizes = effective_sample_size(draws[None])
    assert np.all(sizes > 200)
    assert_mean(draws, mean, ess=sizes)
    np.testing.assert_allclose(np.cov(draws.T), exact, atol=5 * np.sqrt(2 / sizes.min()) * float(exact.max()))


# As above.
@pytest.mark.slow
@pytest.mark.key_reuse
def test_a_diffusion_prior_in_a_numpyro_model_under_variational_inference(x64):
    # The same posterior, a full normal guide: its mean and covariance are the exact ones at the optimum.
    import optax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal

    law, model, mean, exact = linear_problem()
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(0.03, 1200)), Trace_ELBO(num_particles=8))
    params = svi.run(jr.key(0), 1200, progress_bar=False).params
    found = guide.get_posterior(params)
    np.testing.assert_allclose(found.mean, mean, atol=0.03)
    np.testing.assert_allclose(found.covariance_matrix, exact, atol=0.05)
    assert law.event_shape == (2,)


@pytest.mark.slow
def test_the_model_as_a_measure_and_as_a_distribution(x64):
    law = mixture()
    measure = gd.FlowMeasure(law, SIGMA_MIN, 50.0, rtol=1e-7, atol=1e-7)
    prior = gd.FlowDistribution(law, SIGMA_MIN, 50.0, rtol=1e-7, atol=1e-7)

    @jax.jit
    def look(key):
        value, weight = measure.sample(key=key)
        again = prior.log_prob(value[None, None])
        score = jax.grad(lambda x: law.log_density(x, SIGMA_MIN))(value)
        return weight, again, jax.grad(lambda x: prior.log_prob(x))(value), score

    weight, again, slope, score = look(jr.key(0))
    np.testing.assert_allclose(again, weight[None, None], atol=1e-5)
    # The gradient is the score at the smallest level.
    np.testing.assert_allclose(slope, score, rtol=1e-9)
    draws = jax.jit(lambda key: prior.sample(key, (2, 3)))(jr.key(1))
    assert draws.shape == (2, 3, 2) and prior.event_shape == (2,)
    assert prior.support(draws).shape == (2, 3)


def networked():
    return gd.Preconditioned(lambda x, t, cond: x, "eps", schedule=gd.VE(0.01, 50.0))


def test_levels_that_a_model_knows_pass():
    check_levels(gd.ddim(gd.karras(5, 0.01, 50.0)).levels, networked())
    check_levels(gd.karras(5, 0.001, 500.0), mixture())
    check_levels(gd.karras(5, 0.001, 500.0), gd.Preconditioned(lambda x, t, cond: x, "F"))
    for prediction in ("eps", "velocity"):
        check_levels(gd.karras(5, 1e-6, 1e6), gd.Preconditioned(lambda x, t, cond: x, prediction, 1.0, gd.CondOT()))
    # The range is read while a program is traced too, where the schedule is none of its arguments; else it is unknown.
    model = networked()
    inside = jax.jit(lambda x: x + model.noise_range[0])
    assert float(inside(0.0)) == pytest.approx(0.01, rel=1e-5)
    assert jax.jit(lambda denoiser: 1 if denoiser.noise_range is None else 0)(white_networked()) == 1


def white_networked():
    return gd.Preconditioned(jax.tree_util.Partial(lambda x, t, cond: x), "eps", schedule=gd.VE(0.01, 50.0))


GRID = gd.karras(5, 0.02, 80.0)
LAW = gd.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: gd.ddim(GRID),
        lambda: gk.Sampler(gd.unipc(GRID)),
        lambda: gd.predictor_corrector(GRID),
        lambda: gd.probability_flow(0.02, 80.0),
        lambda: gd.Teleported(gd.ddim(GRID), LAW, 100.0),
        lambda: gd.DDRM(GRID, np.eye(2)[:1], np.ones(1), 0.3),
    ],
)
def test_sampling_refuses_levels_outside_the_range_of_the_model(sampler):
    given = gd.Measurement(networked(), np.eye(2)[:1], np.ones(1), 0.1)
    for model in (networked(), given, gd.WithUncertainty(networked(), jnp.sin)):
        with pytest.raises(ValueError, match="0.01 to 50 of the model's schedule; got level 80"):
            gk.sample(sampler(), model, 2, key=jr.key(0), shape=(2,))


def test_sampling_refuses_a_grid_of_another_schedule():
    # The times of one schedule are levels that another one never reaches.
    grid = gd.time_uniform(gd.VP(), 5, t_min=1e-3, t_max=1.0)
    with pytest.raises(ValueError, match="got level 152"):
        gk.sample(gd.ddim(grid), networked(), 2, key=jr.key(0), shape=(2,))
    fitting = gd.time_uniform(gd.VE(0.01, 50.0), 5, t_min=0.0, t_max=1.0)
    assert gk.sample(gd.ddim(fitting), networked(), 2, key=jr.key(0), shape=(2,)).value.shape == (2, 2)
    # A teleported start above the range is no question to the model.
    short = gd.Teleported(gd.ddim(gd.karras(5, 0.02, 40.0)), LAW, 100.0)
    assert gk.sample(short, networked(), 2, key=jr.key(0), shape=(2,)).value.shape == (2, 2)


class Mute(gk.Denoiser):
    def __call__(self, x, sigma, cond=None):
        return x


def ask(denoiser=None, x=None, **kwargs):
    options = {"sigma_min": 0.1, "sigma_max": 10.0} | kwargs
    return gd.log_prob(mixture() if denoiser is None else denoiser, jnp.ones(2) if x is None else x, **options)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: ask(gk.Sampler(gd.ancestral(gd.karras(4, 0.1, 1.0)))), TypeError, "stochastic sampler has no"),
        (lambda: ask(gd.ancestral(gd.karras(4, 0.1, 1.0))), TypeError, "stochastic sampler has no"),
        (lambda: ask(gk.guidance.cfg(2.0)), TypeError, "no guided model"),
        (lambda: ask(3.0), TypeError, "denoiser"),
        (lambda: ask(sigma_min=20.0), ValueError, "sigma_min"),
        (lambda: ask(sigma_min=0.0), ValueError, "sigma_min"),
        (lambda: ask(sigma_max=np.inf), ValueError, "sigma_max"),
        (lambda: ask(rtol=0.0), ValueError, "rtol"),
        (lambda: ask(sigma_data=-1.0), ValueError, "sigma_data"),
        (lambda: ask(trace=gd.Hutchinson(2)), ValueError, "key"),
        (lambda: gd.Hutchinson(0), ValueError, "num_probes"),
        (lambda: ask(networked(), sigma_max=80.0), ValueError, "0.01 to 50 of the model"),
        (lambda: ask(networked(), sigma_min=0.001), ValueError, "got level 0.001"),
        (lambda: check_levels(gd.ddim(gd.karras(5, 0.02, 80.0)).levels, networked()), ValueError, "got level 80"),
        (lambda: check_levels(gk.Sampler(gd.ddim(gd.karras(5, 0.02, 80.0))).levels, networked()), ValueError, "80"),
        (lambda: gd.bits_per_dim(jnp.array(1.0), 0, 4, 1.0), ValueError, "dim"),
        (lambda: gd.dequantize(jnp.array([4]), 4, key=jr.key(0)), ValueError, "ink"),
        (lambda: gd.sample_log_prob(Mute(), sigma_min=0.1, sigma_max=1.0, key=jr.key(0)), ValueError, "shape"),
        (lambda: gd.FlowMeasure(Mute(), 0.1, 1.0), ValueError, "shape"),
        (lambda: gd.FlowMeasure(mixture(), 0.1, 1.0, trace=gd.Hutchinson(2)), ValueError, "biased"),
        (lambda: gd.probability_flow(1.0, 0.5), ValueError, "sigma_min"),
        (lambda: gd.probability_flow(0.1, 0.5, rtol=-1.0), ValueError, "rtol"),
        (lambda: gd.teleport(mixture(), jnp.ones(2), 1.0, 0.1), TypeError, "gaussian"),
        (lambda: gd.Teleported(gd.ddim(gd.karras(4, 0.1, 1.0)), mixture(), 80.0), TypeError, "gaussian"),
    ],
)
def test_wrong_input(make, error, says):
    with pytest.raises(error, match=says):
        make()
