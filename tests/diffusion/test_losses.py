"""Objectives: weight identities, minimizers, noise laws, condition dropout, wrong input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.special import gamma
from stats import assert_distribution, assert_frequencies, assert_mean

import genkit as gk
from genkit._core._stratified import draw_evenly


d = gk.diffusion
MEAN, VAR = 0.4, 0.25


class Linear(eqx.Module):
    """`D = mean + slope(sigma) (x - mean)`, its slope off the exact one by a factor."""

    factor: jax.Array
    shift: jax.Array

    def __call__(self, x, sigma, cond=None):
        return MEAN + self.shift + self.factor * VAR / (VAR + sigma**2) * (x - MEAN)


def data(n, key):
    return MEAN + jnp.sqrt(VAR) * jr.normal(key, (n, 1))


OBJECTIVES = {
    "EDM": d.DenoisingScoreMatching,
    "eps weight": lambda: d.DenoisingScoreMatching(weight=d.EpsWeight()),
    "one level": lambda: d.DenoisingScoreMatching(dist.Delta(0.7), weight=lambda sigma: 3.0),
    "flow": d.FlowMatching,
    "flow on VP": lambda: d.FlowMatching(d.VP(), time_distribution=dist.Uniform(0.01, 1.0)),
}
each = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


@each
def test_gradient_vanishes_at_the_exact_denoiser(make):
    objective, exact = make(), Linear(jnp.ones(()), jnp.zeros(()))

    @jax.jit
    def gradients(keys):
        def one(key):
            key_data, key_loss = jr.split(key)
            slope = eqx.filter_grad(lambda m: objective(m, data(256, key_data), key=key_loss)[0])(exact)
            return jnp.stack([slope.factor, slope.shift])

        return jax.lax.map(one, keys, batch_size=100)

    draws = np.asarray(gradients(jr.split(jr.key(0), 400)), np.float64)
    # Batches are independent: their spread is the error of their mean. A slope one per cent off must be seen.
    assert_mean(draws, np.zeros(2))

    off = Linear(jnp.array(1.5), jnp.array(0.1))
    slope = jax.jit(jax.grad(lambda m: objective(m, data(20_000, jr.key(1)), key=jr.key(2))[0]))(off)
    assert float(slope.factor) > 0 and float(slope.shift) > 0


def test_weights_turn_the_loss_into_every_prediction_loss(x64):
    # |D - x0|^2 with these weights is |eps' - eps|^2, |v' - v|^2, |F' - F|^2, |s' - s|^2, |u' - u|^2.
    sigma_data, t = 0.5, jnp.linspace(0.05, 0.95, 7)
    x0, eps = jr.normal(jr.key(0), (7,)), jr.normal(jr.key(1), (7,))
    guess = x0 + jr.normal(jr.key(2), (7,))
    for schedule in (d.VP(), d.CondOT(), d.Cosine(), d.SubVP()):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x, level = alpha * x0 + sigma * eps, sigma / alpha
        rates = {"alpha_dot": schedule.alpha_dot(t), "sigma_dot": schedule.sigma_dot(t), "sigma_data": sigma_data}
        determinant = alpha * rates["sigma_dot"] - sigma * rates["alpha_dot"]
        weights = {
            "eps": d.EpsWeight()(level),
            "score": alpha**2 / sigma**4,
            "v": ((alpha**2 + sigma**2) / sigma) ** 2,
            "velocity": (determinant / sigma) ** 2,
            "F": (alpha**2 * sigma_data**2 + sigma**2) / (sigma * sigma_data) ** 2,
        }
        for name, weight in weights.items():
            errors = d.convert(guess, "x0", name, x, alpha, sigma, **rates) - d.convert(
                x0, "x0", name, x, alpha, sigma, **rates
            )
            np.testing.assert_allclose(errors**2, weight * (guess - x0) ** 2, rtol=1e-8, err_msg=name)
    level = d.VP().noise_level(t)
    np.testing.assert_allclose(d.VWeight()(level), 1 / d.VP().sigma(t) ** 2, rtol=1e-12)
    edm = (sigma_data**2 + level**2) / (sigma_data * level) ** 2
    np.testing.assert_allclose(d.EDMWeight(sigma_data)(level), edm, rtol=1e-12)
    np.testing.assert_allclose(d.MinSNRWeight(5.0)(level), np.minimum(1 / level**2, 5.0), rtol=1e-12)


def test_value_is_the_posterior_variance():
    # At the exact denoiser the loss is E[w tr Cov(x0 | x)], here at one noise level.
    sigma, cov = 0.7, jnp.array([0.25, 1.0, 4.0])
    objective = d.DenoisingScoreMatching(dist.Delta(sigma), weight=d.EpsWeight())
    denoiser = d.GaussianDenoiser(jnp.zeros(3), cov)

    def one(key):
        key_data, key_loss = jr.split(key)
        value, aux = objective(denoiser, denoiser.sample(500, key=key_data), key=key_loss)
        return value, aux["mse"]

    values, mse = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=20))(jr.split(jr.key(0), 200))
    variance = float(jnp.sum(cov * sigma**2 / (cov + sigma**2)))
    assert_mean(np.asarray(values, np.float64), variance / sigma**2)
    assert_mean(np.asarray(mse, np.float64), variance / 3)


def test_flow_value_is_the_velocity_error():
    # The same draws, once through the denoiser and once through the velocity, on a straight path.
    denoiser = d.GaussianDenoiser(jnp.zeros(2), 0.3)
    x0 = jr.normal(jr.key(0), (64, 2))
    with jax.enable_x64(True):
        objective = d.FlowMatching(time_distribution=dist.Delta(0.3))
        noise = jr.normal(jr.split(jr.key(1), 4)[1], (64, 2), jnp.float64)
        x0 = jnp.asarray(x0, jnp.float64)
        x = 0.7 * x0 + 0.3 * noise
        clean = jax.vmap(lambda x: denoiser(x / 0.7, 0.3 / 0.7))(x)
        velocity = (x - clean) / 0.3
        want = jnp.mean(jnp.sum((velocity - (noise - x0)) ** 2, axis=1))
        got, _ = objective(denoiser, x0, key=jr.key(1))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_levels_follow_their_law_and_cover_it():
    law = dist.LogNormal(-1.2, 1.2)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: draw_evenly(law, 16, key=key)))(jr.split(jr.key(0), 4000)))
    # Every position by itself follows the law ...
    assert_distribution(draws[:, 3], lambda s: np.asarray(law.cdf(s), np.float64))
    # ... and every batch has exactly one level in each sixteenth.
    share = np.asarray(law.cdf(draws))
    ranks = np.floor(16 * share - 16 * share.min(1, keepdims=True) + 1e-3)
    assert np.all(np.sort(ranks, axis=1) == np.arange(16))
    assert np.isfinite(draws).all() and (draws > 0).all()


def test_laws_without_an_inverse_are_sampled():
    law = dist.InverseGamma(3.0, 1.0)
    with pytest.raises(ImportError):
        law.icdf(0.5)  # needs a package that genkit does not require
    draws = np.asarray(jax.jit(lambda key: draw_evenly(law, 4000, key=key))(jr.key(0)), np.float64)
    assert_mean(draws**0.5, gamma(2.5) / gamma(3.0))


def test_even_levels_lower_the_variance_of_the_loss():
    denoiser = d.GaussianDenoiser(jnp.zeros(64), 1.0)
    x0 = jr.normal(jr.key(0), (64, 64))
    even = d.DenoisingScoreMatching(dist.LogNormal(-1.2, 1.2), weight=lambda sigma: 1.0)

    class Independent(dist.LogNormal):
        def icdf(self, value):
            raise NotImplementedError

    loose = d.DenoisingScoreMatching(Independent(-1.2, 1.2), weight=lambda sigma: 1.0)

    def spread(objective):
        keys = jr.split(jr.key(1), 300)
        losses = lambda keys: jax.lax.map(lambda key: objective(denoiser, x0, key=key)[0], keys, batch_size=100)
        return float(np.std(jax.jit(losses)(keys)))

    assert spread(even) < 0.5 * spread(loose)


@pytest.mark.parametrize("kind", ["labels", "vectors"])
def test_condition_dropout_is_per_example(kind):
    seen = []

    class Spy(eqx.Module):
        def __call__(self, x, sigma, cond=None):
            seen.append(cond.dtype)
            gone = jnp.isnan(cond).any() if kind == "vectors" else cond < 0
            return x + jnp.where(gone, 1.0, 0.0)

    objective = d.DenoisingScoreMatching(dist.Delta(1e-6), weight=lambda sigma: 1.0, cond_dropout=0.25)
    n = 20_000
    cond = jnp.arange(n) % 10 if kind == "labels" else jnp.ones((n, 3))
    value, aux = objective(Spy(), (jnp.zeros((n, 1)), cond), key=jr.key(0))
    dropped = round(float(value) * n)
    assert_frequencies(np.repeat([0, 1], [n - dropped, dropped]), [0.75, 0.25])
    assert seen[0] == (jnp.int32 if kind == "labels" else jnp.float32)
    for share in (0.0, 1.0):
        objective = d.FlowMatching(time_distribution=dist.Delta(0.5), cond_dropout=share)
        _, aux = objective(Spy(), (jnp.zeros((8, 1)), cond[:8]), key=jr.key(1))
        _, base = objective(lambda x, sigma, cond, share=share: x + share, (jnp.zeros((8, 1)), cond[:8]), key=jr.key(1))
        np.testing.assert_allclose(aux["mse"], base["mse"], rtol=1e-6)


def test_dropping_sweeps_without_recompiling_and_seeds_matter():
    denoiser = d.GaussianDenoiser(jnp.zeros(2), 1.0)
    traces = []

    @eqx.filter_jit
    def run(objective, x, key):
        traces.append(1)
        return objective(denoiser, x, key=key)[0]

    x = jr.normal(jr.key(0), (8, 2))
    values = [
        float(run(d.DenoisingScoreMatching(dist.LogNormal(m, s), d.MinSNRWeight(5.0), p), x, jr.key(seed)))
        for m, s, p, seed in ((-1.2, 1.2, 0.0, 0), (-1.0, 1.0, 0.1, 0), (-1.2, 1.2, 0.0, 1))
    ]
    assert len(traces) == 1 and len(set(values)) == 3


def test_default_weight_takes_sigma_data_from_the_model():
    denoiser = d.Preconditioned(lambda x, t, cond: jnp.zeros_like(x), sigma_data=0.3)
    x = jr.normal(jr.key(0), (16, 2))
    plain, weighted = d.DenoisingScoreMatching(), d.DenoisingScoreMatching(weight=d.EDMWeight(0.3))

    @jax.jit
    def losses(x):
        # Under that weight the loss is that of a network whose target has unit variance.
        gaussian = 0.3 * jr.normal(jr.key(2), (4000, 2))
        pairs = ((plain, x, jr.key(1)), (weighted, x, jr.key(1)), (plain, gaussian, jr.key(3)))
        return [objective(denoiser, batch, key=key)[0] for objective, batch, key in pairs]

    default, explicit, value = losses(x)
    np.testing.assert_allclose(default, explicit, rtol=1e-6)
    np.testing.assert_allclose(value / 2, 1.0, atol=0.1)


def test_flow_is_finite_over_the_whole_path():
    net = gk.nn.MLP((2,), width=8, depth=1, key=jr.key(0))
    denoiser = d.Preconditioned(net, "velocity", schedule=d.CondOT())
    x = jr.normal(jr.key(1), (4, 2))
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, objective: objective(m, x, key=jr.key(2))[0]))
    for t in (2.0**-25, 1e-4, 0.5, 1 - 2.0**-24):
        value, slope = loss(denoiser, d.FlowMatching(time_distribution=dist.Delta(t)))
        assert np.isfinite(float(value))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope.net))
        if t > 1e-5:  # the network begins at zero, so the loss is |eps - x0|^2 whatever the time
            assert 0.5 < float(value) < 20


def test_coupling_pairs_data_noise_and_conditions():
    def by_rank(x0, noise, cond, *, key):
        order = jnp.argsort(x0[:, 0])
        return x0[order], jnp.sort(noise, axis=0), cond[order]

    seen = []

    def model(x, sigma, cond):
        seen.append(x.shape)
        return cond * jnp.ones_like(x)

    x0 = jnp.array([[3.0], [1.0], [2.0]])
    objective = d.FlowMatching(coupling=by_rank, time_distribution=dist.Delta(0.5))
    _, aux = objective(model, (x0, x0[:, 0]), key=jr.key(0))
    assert float(aux["mse"]) == 0.0  # the conditions moved with the data
    _, aux = d.FlowMatching(time_distribution=dist.Delta(0.5))(model, (x0, x0[:, 0]), key=jr.key(0))
    assert float(aux["mse"]) == 0.0


@pytest.mark.slow
def test_trained_linear_model_is_the_exact_denoiser():
    import optax

    sigma = 0.6
    cov = jnp.array([[1.0, 0.6], [0.6, 0.8]])
    gaussian = d.GaussianDenoiser(jnp.array([0.5, -1.0]), cov)
    objective = d.DenoisingScoreMatching(dist.Delta(sigma), weight=lambda s: 1.0)

    class Affine(eqx.Module):
        matrix: jax.Array
        offset: jax.Array

        def __call__(self, x, sigma, cond=None):
            return self.matrix @ x + self.offset

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 4000))

    @jax.jit
    def train(model, key):
        def step(carry, i):
            model, state = carry
            key_data, key_loss = jr.split(jr.fold_in(key, i))
            slope = jax.grad(lambda m: objective(m, gaussian.sample(256, key=key_data), key=key_loss)[0])(model)
            update, state = optimizer.update(slope, state)
            return (optax.apply_updates(model, update), state), None

        return jax.lax.scan(step, (model, optimizer.init(model)), jnp.arange(4000))[0][0]

    model = train(Affine(jnp.zeros((2, 2)), jnp.zeros(2)), jr.key(0))
    matrix = cov @ jnp.linalg.inv(cov + sigma**2 * jnp.eye(2))
    np.testing.assert_allclose(model.matrix, matrix, atol=5e-3)
    np.testing.assert_allclose(model.offset, gaussian.mean - matrix @ gaussian.mean, atol=5e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: d.DenoisingScoreMatching(cond_dropout=1.5), "`cond_dropout` must be in"),
        (lambda: d.FlowMatching(cond_dropout=-0.1), "`cond_dropout` must be in"),
        (
            lambda: d.DenoisingScoreMatching(dist.Normal(jnp.zeros(2), 1.0)),
            "`noise_distribution` must be a scalar distribution",
        ),
        (lambda: d.EDMWeight(0.0), "`sigma_data` must be positive"),
        (lambda: d.MinSNRWeight(-1.0), "`gamma` must be positive"),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_types():
    # The tests' own type check refuses these first, so the message is not looked at.
    for make in (
        lambda: d.DenoisingScoreMatching(noise_distribution=0.5),
        lambda: d.DenoisingScoreMatching(weight=3.0),
        lambda: d.FlowMatching(schedule="VP"),
        lambda: d.FlowMatching(coupling="ot"),
    ):
        with pytest.raises((ValueError, TypeError)):
            make()


def test_wrong_batches():
    objective, model = d.DenoisingScoreMatching(), d.GaussianDenoiser(jnp.zeros(2), 1.0)
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="`batch` must be an array or a pair"):
        objective(model, (x, x, x), key=jr.key(0))
    with pytest.raises(ValueError, match="`batch` must be floating examples"):
        objective(model, jnp.ones((4, 2), int), key=jr.key(0))
    with pytest.raises(ValueError, match="one entry for each of the 4 examples"):
        objective(model, (x, jnp.zeros(3, int)), key=jr.key(0))
    with pytest.raises(ValueError, match="None, because this distribution was given no labels"):
        objective(model, (x, jnp.zeros(4, int)), key=jr.key(0))
    assert not np.isfinite(jax.jit(lambda x: objective(model, x, key=jr.key(0))[0])(x.at[0, 0].set(jnp.nan)))
