"""Guides: bridges, neural controls, learned indices, forecasts, latent models."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import stats

import genkit.noise as gn
import genkit.sde as gs
from genkit.sde._filter import Gaussian
from genkit.sde._guide import Plan


CHEAP = gn.ma_fbm(5, 0.05, 1e3)
END = gs.Observed(np.array([2.0]), np.array([0.0]), gs.GaussianNoise(0.1))
# Posterior standard deviation at t = 1 of the bridge from 0 to an observation of 0 at t = 2, by theta: H = .3 .5 .7 .9
BRIDGES = {
    0.0: (0.78965, 0.70886, 0.58544, 0.36324),
    1.0: (0.670274, 0.617921, 0.528183, 0.340680),
    2.0: (0.548192, 0.491097, 0.427363, 0.290275),
}


def bridge(theta, hurst, lift=None, step="exact"):
    lift = gn.ma_fbm() if lift is None else lift
    return gs.FractionalSDE(gs.OrnsteinUhlenbeck(theta), gs.Constant(1.0), lift, hurst, 2.0, step=step)


def quartic(hurst=0.3, lift=CHEAP):
    return gs.FractionalSDE(lambda t, x: x - x**3, gs.Constant(0.5), lift, hurst, 1.0)


DATA = gs.Observed(np.array([0.25, 0.5, 1.0]), np.array([0.3, 0.4, 0.9]), gs.GaussianNoise(0.2))


@pytest.mark.long
@pytest.mark.parametrize("theta", [0.0, 1.0, 2.0])
def test_bridge_table(theta):
    """Posterior spread within 1 %: 60,000 paths have a standard error of 0.3 %."""
    num = 60_000
    for hurst, wanted in zip((0.3, 0.5, 0.7, 0.9), BRIDGES[theta], strict=True):
        sde = bridge(theta, hurst)
        guide = gs.LinearGuide(sde, END)
        x = jax.vmap(lambda k: gs.simulate(sde, np.array([1.0, 2.0]), guide=guide, key=k).x)(jr.split(jr.key(1), num))  # noqa: B023
        assert abs(float(x[:, 0, 0].std()) / wanted - 1) < 0.01
        assert abs(float(x[:, 0, 0].mean())) < stats.z_score(4) * wanted / num**0.5


@pytest.mark.long
def test_neural_guide_starts_as_the_linear_one():
    sde = bridge(1.0, 0.7, CHEAP)
    linear, neural = gs.LinearGuide(sde, END), gs.NeuralGuide(sde, END, width=8, key=jr.key(0))
    draws = [gs.log_weights(sde, g, END, num_particles=8, key=jr.key(1)) for g in (linear, neural)]
    np.testing.assert_allclose(draws[1], draws[0], atol=1e-4)
    kl = [gs.log_weights(sde, g, END, num_particles=8, martingale=False, key=jr.key(2)) for g in (linear, neural)]
    np.testing.assert_allclose(kl[1], kl[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("linear", [True, False])
def test_start_of_a_neural_guide_is_the_normal_law_it_weighs(linear):
    """Log-ratio and divergence against the map from white noise to the start, differentiated."""
    sde = gs.FractionalSDE(
        gs.OrnsteinUhlenbeck(1.0), gs.Constant(1.0), gn.ma_fbm(2, 0.1, 10.0), 0.7, 1.0, x0=np.zeros(2)
    )
    keys = jr.split(jr.key(0), 6)
    observed = gs.Observed(np.array([1.0]), np.zeros((1, 2)), gs.GaussianNoise(0.1))
    guide = gs.NeuralGuide(sde, observed, width=4, linear=False, key=keys[0])
    bias = 0.3 * jr.normal(keys[1], (int(guide.origin.out_size),))
    guide = eqx.tree_at(lambda g: g.origin.layers[-1].bias, guide, bias)
    size = 2 * (sde.lift.history_rank + 1)
    root = jnp.eye(size) + 0.1 * jr.normal(keys[2], (size, size))
    law = Gaussian(jr.normal(keys[3], (size,)), jnp.zeros((size, 0)), root, jnp.linalg.slogdet(root)[1])
    plan = Plan((law if linear else None, jnp.zeros(4)), None)
    white = jr.normal(keys[4], (size,))
    eps, log_ratio, divergence = guide.start(plan, white)
    slope = jax.jacfwd(lambda w: guide.start(plan, w)[0])(white)
    mean, log_det = eps - slope @ white, jnp.linalg.slogdet(slope)[1]
    np.testing.assert_allclose(log_ratio, (white @ white - eps @ eps) / 2 + log_det, rtol=1e-4)
    wanted = (mean @ mean + jnp.sum(slope**2) - size) / 2 - log_det
    np.testing.assert_allclose(divergence, wanted, rtol=1e-4)
    tied = slope[0, 1:] if linear else slope[1, 0]  # the root is not diagonal
    assert float(jnp.abs(tied).max()) > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("linear", [True, False])
def test_weights_of_a_perturbed_neural_guide_are_unbiased(linear):
    """E[w] = evidence whatever the networks return: all density ratios and Jacobians are right."""
    sde = bridge(1.0, 0.7, CHEAP, step="exponential")
    observed = gs.Observed(np.array([1.0, 2.0]), np.array([0.3, 0.1]), gs.GaussianNoise(1.0))
    guide = gs.NeuralGuide(sde, observed, width=8, linear=linear, steps_per_interval=2, key=jr.key(0))
    heads = lambda g: (g.control.layers[-1].bias, g.origin.layers[-1].bias)
    controls = jnp.array([0.4, 0.3])  # a push and a widening
    spreads = 0.2 * jnp.abs(jr.normal(jr.key(1), heads(guide)[1].shape))  # wider only: finite variance
    guide = eqx.tree_at(heads, guide, (controls, spreads))
    weigh = functools.partial(gs.log_weights, sde, guide, observed, num_particles=40_000, steps_per_interval=2)
    draws = weigh(key=jr.key(2))
    evidence = gs.kalman(sde, observed, steps_per_interval=2)
    stats.assert_mean(jnp.exp(draws - evidence), 1.0)
    other = weigh(martingale=False, key=jr.key(3))
    stats.assert_same_mean(draws, other)


@pytest.mark.slow
def test_importance_bound_is_between():
    sde, key = quartic(), jr.key(3)
    guide = gs.LinearGuide(sde, DATA, steps_per_interval=4, num_iterations=2)
    draws = gs.log_weights(sde, guide, DATA, steps_per_interval=4, num_particles=256, key=jr.key(3))
    low = gs.elbo(sde, guide, DATA, steps_per_interval=4, num_particles=256, key=jr.clone(key))
    high = gs.iwelbo(sde, guide, DATA, steps_per_interval=4, num_particles=256, key=jr.clone(key))
    np.testing.assert_allclose(low, draws.mean(), rtol=1e-5)
    np.testing.assert_allclose(high, jax.nn.logsumexp(draws) - np.log(256), rtol=1e-5)
    assert low < high


@pytest.mark.long
def test_a_law_of_the_start_that_is_not_normal():
    law = dist.Laplace(jnp.array([0.0]), 0.5)
    zero = lambda t, x: 0 * x
    sde = gs.FractionalSDE(zero, gs.Constant(0.5), CHEAP, 0.7, 1.0, x0=law)
    observed = gs.Observed(np.array([1.0]), np.array([0.8]), gs.GaussianNoise(0.3))
    guide = gs.LinearGuide(sde, observed)
    draws = gs.log_weights(sde, guide, observed, num_particles=40_000, key=jr.key(0))
    grid = np.linspace(-12, 12, 40_001)
    sd = np.sqrt(0.25 * float(CHEAP.covariance(0.7, 1.0, 1.0)) + 0.09)
    density = np.exp(-np.abs(grid) / 0.5) * np.exp(-0.5 * ((0.8 - grid) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
    evidence = np.trapezoid(density, grid)
    stats.assert_mean(jnp.exp(draws) / evidence, 1.0)


@pytest.mark.slow
def test_forecast_covers_and_reaches_beyond():
    ts = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    sde = bridge(0.0, 0.7, CHEAP)
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([0.2, 0.4]), gs.GaussianNoise(0.05))
    guide = gs.LinearGuide(sde, observed)
    out = gs.forecast(sde, guide, observed, ts, num_paths=20_000, key=jr.key(0))
    assert float(out.ess) > 19_000
    # exact Gaussian conditioning of the lifted process
    both = 2.0**1.4 * np.asarray(CHEAP.covariance(0.7, ts[:, None] / 2, ts[None] / 2), np.float64)
    seen = both[1:3, 1:3] + 0.0025 * np.eye(2)
    mean = both[:, 1:3] @ np.linalg.solve(seen, [0.2, 0.4])
    var = np.diag(both - both[:, 1:3] @ np.linalg.solve(seen, both[1:3]))
    stats.assert_mean(out.x[:, 1:, 0], mean[1:])
    stats.assert_variance(out.x[:, 1:, 0], var[1:], gaussian=True)
    width = (out.upper - out.lower)[1:, 0] / np.sqrt(var[1:])
    np.testing.assert_allclose(width, 2 * 1.6449, rtol=0.05)  # quantiles of 20,000 draws: standard error 1.5 %


@pytest.mark.long
def test_learned_index_stays_inside_and_moves():
    hurst = gs.LearnedHurst(0.5)
    observed = gs.Observed(np.arange(1, 9) / 8, np.sin(np.arange(1, 9) / 3), gs.GaussianNoise(0.1))

    @jax.jit
    @jax.grad
    def slope(h):
        return gs.kalman(gs.FractionalSDE(lambda t, x: 0 * x, gs.Constant(1.0), CHEAP, h, 1.0), observed)

    optimizer = optax.adam(0.1)
    state = optimizer.init(hurst)
    for _ in range(100):
        step, state = optimizer.update(jax.tree.map(jnp.negative, slope(hurst)), state)
        hurst = optax.apply_updates(hurst, step)
    grid = np.linspace(0.3, 0.97, 30)
    best = grid[np.argmax([float(gs.gp_log_evidence(h, observed)) for h in grid])]
    assert abs(float(hurst.value) - best) < 0.05
    assert 0.02 < float(hurst.value) < 0.98


@pytest.mark.slow
def test_latent_model_on_series():
    key_net, key_guide, key_data, key_loss = jr.split(jr.key(0), 4)
    ts = np.arange(1, 5) / 4
    y = jr.normal(key_data, (3, 4, 6))
    net = eqx.nn.Linear(2, 6, key=key_net)
    sde = gs.FractionalSDE(
        lambda t, x: -x,
        gs.Constant(1.0),
        gn.ma_fbm(3, 0.1, 100.0),
        gs.LearnedHurst(0.6),
        1.0,
        x0=dist.Normal(jnp.zeros(2), jnp.ones(2)),
    )
    decoder = Decoder(net)
    guide = gs.NeuralGuide(sde, gs.Observed(ts, y[0], decoder), width=8, linear=False, key=key_guide)
    model = gs.LatentSDE(sde, decoder, guide)
    objective = gs.NegativeELBO(ts, steps_per_interval=2)
    mask = jnp.ones((3, 4), bool).at[1, 2].set(False)
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: objective(m, (y, mask), key=jr.clone(key_loss))[0]))
    value, slope = loss(model)
    assert bool(jnp.isfinite(value))
    assert float(jnp.abs(slope.sde.hurst.raw)) > 0
    assert float(jnp.abs(slope.guide.encoder.cell.weight_ih).max()) >= 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(eqx.filter(slope, eqx.is_inexact_array)))


class Decoder(eqx.Module):
    net: eqx.nn.Linear

    def __call__(self, x):
        return dist.Normal(self.net(x), 0.5)


@pytest.mark.long
def test_training_tightens_the_neural_bound():
    sde = quartic()
    guide = gs.NeuralGuide(sde, DATA, width=16, linear=False, key=jr.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 5000))
    state = optimizer.init(eqx.filter(guide, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(guide, state, key):
        loss = lambda g: -gs.elbo(sde, g, DATA, steps_per_interval=4, num_particles=16, key=key)
        value, slope = eqx.filter_value_and_grad(loss)(guide)
        step, state = optimizer.update(slope, state)
        return eqx.apply_updates(guide, step), state, value

    values = []
    for i in range(5000):
        guide, state, value = update(guide, state, jr.fold_in(jr.key(1), i))
        values.append(float(value))
    draws = gs.log_weights(sde, guide, DATA, steps_per_interval=4, num_particles=4000, key=jr.key(2))
    evidence = float(jax.nn.logsumexp(draws) - np.log(4000))
    assert np.mean(values[:10]) > -evidence + 0.5  # untrained: half a nat or more below
    assert float(draws.mean()) > evidence - 0.1
