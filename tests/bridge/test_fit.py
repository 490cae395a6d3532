"""Fitting light bridges: metrics, start, guard, other routes, wrong input."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
from bridge.helpers import pair_1d, rotated_pair
from stats import assert_mean, assert_variance

import genkit as gk


@pytest.fixture(scope="module")
def pair():
    return rotated_pair(2, 1.0, key=jr.key(7))


@pytest.fixture(scope="module")
def data(pair):
    x0, x1 = pair.sample(6000, key=jr.key(0))  # one compilation for both
    return (x0[:4000], x1[:4000]), (x0[4000:], x1[4000:])


@pytest.fixture(scope="module")
def fitted(data):
    """Fits of five components at epsilon = 1, one per family, each made when first asked for."""
    (x0, x1), _ = data

    @functools.cache
    def fit(scale, polish=0):
        return gk.bridge.fit_light(x0, x1, 1.0, 5, scale=scale, num_steps=300, polish=polish, rank=1, key=jr.key(1))

    return fit


@pytest.fixture(scope="module")
def single(data):
    """One Gaussian for each end, in closed form."""
    (x0, x1), _ = data
    return gk.bridge.gaussian(x0.mean(0), jnp.cov(x0.T), x1.mean(0), jnp.cov(x1.T), 1.0)


@jax.jit
def objective(bridge, x0, x1):
    return bridge.objective(x0, x1)


def test_metrics_vanish_on_the_truth_and_agree_with_each_other(pair, data):
    _, (y0, y1) = data
    truth = pair.bridge
    assert float(gk.bridge.plan_kl(truth, truth, y0, y1)) == 0.0
    assert float(gk.bridge.cbw2_uvp(truth, truth, y0[:50], y1)) < 1e-3
    other = gk.bridge.Bridge(eqx.tree_at(lambda p: p.shifts, truth.potential, replace_fn=lambda r: r + 0.3))
    assert float(gk.bridge.cbw2_uvp(other, truth, y0[:50], y1)) > 0.1
    # Two estimators of one divergence; their spread is bounded by that of the log-ratio and of the energies.
    log_plan = jax.jit(lambda b: b.potential.log_value(y1, 1.0) - b.potential.log_value(y0, 0.0))
    ratio = log_plan(truth) - log_plan(other)
    static = float(gk.bridge.plan_kl(truth, other, y0, y1))
    dynamic = float(gk.bridge.path_kl(truth, other, y0, key=jr.key(2)))
    assert abs(static - dynamic) < 4.9 * float(ratio.std()) / np.sqrt(len(y0)) * np.sqrt(2)
    assert dynamic > 0.01


def test_bw2_of_commuting_gaussians():
    value = gk.bridge.bw2_uvp(jnp.zeros(2), jnp.diag(jnp.array([4.0, 1.0])), jnp.ones(2), jnp.eye(2), 10.0)
    np.testing.assert_allclose(value, 100 * (2.0 + 1.0) / 10.0, rtol=1e-5)


@pytest.mark.parametrize(
    "scale", ["diag", *(pytest.param(scale, marks=pytest.mark.slow) for scale in ("iso", "full", "lowrank"))]
)
def test_objective_falls_and_the_bridge_lands_on_the_target(data, fitted, single, scale):
    (x0, x1), (y0, y1) = data
    bridge, report = fitted(scale)
    assert report.objective.shape == (300,)
    assert float(report.objective[-50:].mean()) < float(report.objective[:10].mean())
    assert float(report.effective_components) > 3
    assert float(report.end_marginal_error) < 0.03
    # Held out, better than one Gaussian of both ends.
    assert float(objective(bridge, y0, y1)) < float(objective(single, y0, y1)) - 0.1
    # The objective estimates the divergence up to a constant: differences agree.
    by_parts = jax.jit(lambda b: jnp.mean(b.potential.log_c(x0) - b.potential.log_v(x1)))(bridge)
    np.testing.assert_allclose(objective(bridge, x0, x1), by_parts, rtol=1e-5)


@pytest.mark.slow
def test_full_scale_recovers_a_rotated_pair(pair, data, fitted):
    (x0, x1), (y0, y1) = data
    bridge, report = fitted("full", 40)
    assert report.objective.shape == (340,)
    # On all samples the objective is deterministic: what Adam's noise left is taken out, below the truth itself.
    assert bool(jnp.all(jnp.diff(report.objective[300:]) < 1e-3))
    assert float(objective(bridge, x0, x1)) < float(objective(pair.bridge, x0, x1))
    assert float(gk.bridge.plan_kl(pair.bridge, bridge, y0, y1)) < 0.01
    # 4,000 fitting pairs here; the table with 20,000 is a long test.
    assert float(gk.bridge.cbw2_uvp(bridge, pair.bridge, y0[:50], y1)) < 0.2


@pytest.mark.slow
def test_recipe_and_fit_light_meet(data, fitted):
    """The library's loop takes the same start and coordinates to the same objective."""
    (x0, x1), (y0, y1) = data
    trained = gk.fit(gk.bridge.recipe(x0, x1, 1.0, 5, num_steps=300), key=jr.key(1)).model
    direct, _ = fitted("diag")
    assert abs(float(objective(trained, y0, y1) - objective(direct, y0, y1))) < 0.02


@pytest.mark.long
def test_lbfgs_alone_reaches_what_adam_and_polish_reach(data, fitted):
    (x0, x1), _ = data
    bridge, report = gk.bridge.fit_light(
        x0, x1, 1.0, 5, scale="full", optimizer="lbfgs", num_steps=150, key=jr.key(1)
    )  # crosses a change of anchors
    assert report.objective.shape == (150,)
    assert float(objective(bridge, x0, x1)) < float(objective(fitted("full", 40)[0], x0, x1)) + 2e-3


def test_noise_widens_batches_and_fixed_samples():
    x = jnp.zeros((50, 3))
    data = gk.bridge.UnpairedBatches(x, x + 1.0, 4000, jnp.asarray(0.5))
    for x0, x1 in (data(jr.key(0)), data.fixed(jr.key(1))):
        assert len(x0) >= 4000 and len(x1) >= 4000
        assert_variance(x0, 0.25)
        assert_mean(x1, 1.0)
    plain = gk.bridge.UnpairedBatches(x, x, 4)
    assert plain.fixed(jr.key(2))[0] is x


def test_fitting_compiles_once_and_sweeps_epsilon_and_rate(data, compilations):
    (x0, x1), _ = data
    gk.bridge.fit_light(x0, x1, 1.0, 5, num_steps=30, key=jr.key(1))
    with compilations() as count:
        gk.bridge.fit_light(x0, x1, 0.5, 5, num_steps=30, learning_rate=2e-3, key=jr.key(2))
    assert count() == 0


def test_start_is_balanced_at_small_epsilon():
    """Newton's weights give every component its mass, where the plain start lets few carry all."""
    from genkit.bridge._light_options import LightFit
    from genkit.bridge._report import component_masses

    key0, key1, *keys = jr.split(jr.key(0), 4)
    x0, x1 = jr.normal(key0, (2000, 8)), 3.0 * jr.normal(key1, (2000, 8))
    epsilon = jnp.asarray(0.1)
    masses = {}
    for init, key in zip(("balanced", "published"), keys, strict=True):
        potential = LightFit(12, init=init).start(x0, x1, epsilon, key)
        masses[init] = jax.jit(component_masses)(potential, x0, x1)[0]
    effective = {init: float(1 / jnp.sum(m**2)) for init, m in masses.items()}
    assert effective["balanced"] > max(11.0, effective["published"])  # of 12


def test_a_dead_component_is_revived_and_its_momentum_forgotten(data, fitted):
    from genkit.bridge._light_options import LightFit, LightTraining
    from genkit.bridge._report import component_masses

    (x0, x1), _ = data
    bridge, _ = fitted("diag")
    dead = eqx.tree_at(lambda b: b.potential.log_weights, bridge, replace_fn=lambda w: w.at[2].set(-60.0))
    masses = jax.jit(component_masses)
    assert float(masses(dead.potential, x0, x1)[:, 2].max()) < 1e-6
    training = LightTraining(x0, x1, jnp.asarray(1.0), LightFit(5, num_steps=300))
    alive = training.revival(dead, jr.key(0))
    assert training.revival.count == 1 and float(masses(alive.potential, x0, x1)[:, 2].min()) > 0.02
    assert training.revival(bridge, jr.key(1)) is bridge and training.revival.count == 1
    optimizer = training.recipe(name="", with_source=False).phases[0]
    params = eqx.filter(dead, eqx.is_inexact_array)
    state = optimizer.optimizer.init(
        eqx.tree_at(lambda b: (b.potential.epsilon, b.potential.center), params, (None, None))
    )
    moving = state._replace(adam=jax.tree.map(lambda leaf: leaf + 1, state.adam))
    after = optimizer.adapt(moving, dead, alive)
    momentum = after.adam[0].mu.shifts
    assert float(jnp.abs(momentum[2]).max()) == 0.0 and float(momentum[0].min()) == 1.0


def test_interrupted_and_resumed_bitwise(data, tmp_path):
    (x0, x1), _ = data
    make = lambda: gk.bridge.recipe(x0, x1, 1.0, 3, num_steps=80, batch_size=64, polish=3)
    whole = gk.fit(make(), key=jr.key(4))

    def stop(step, metrics):
        if step == 60:
            raise StopIteration

    part = gk.fit(make(), key=jr.key(4), run=tmp_path / "run", on_step=stop)
    assert len(part.log["loss"]) < 80
    resumed = gk.fit(make(), key=jr.key(4), run=tmp_path / "run", resume=True)
    for one, other in zip(jax.tree.leaves(whole.model), jax.tree.leaves(resumed.model), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
def test_matching_learns(data, single):
    (x0, x1), (y0, y1) = data
    bridge, report = gk.bridge.fit_matching(x0, x1, 1.0, 5, num_steps=200, key=jr.key(1))
    assert float(objective(bridge, y0, y1)) < float(objective(single, y0, y1)) - 0.1
    assert bool(jnp.isfinite(report.objective).all())


@pytest.mark.long
def test_sf2m_learns(data):
    (x0, x1), (y0, y1) = data
    neural, losses = gk.bridge.sf2m(x0, x1, 1.0, num_steps=400, batch_size=64, key=jr.key(2))
    assert bool(jnp.isfinite(losses).all())
    sample = eqx.filter_jit(lambda b, x, ts: b.sample(x, ts, key=jr.key(4)))
    paths = sample(neural, y0[:500], jnp.array([0.5, 1.0]))
    assert paths.shape == (500, 2, 2) and neural.drift(0.3, y0[:4]).shape == (4, 2)
    far = gk.divergence.energy_distance(y0[:500], y1[:500])
    assert float(gk.divergence.energy_distance(paths[:, -1], y1[:500])) < 0.25 * float(far)
    assert neural.epsilon == 1.0


@pytest.mark.slow
def test_samplers_through_the_verb():
    pair = pair_1d()
    bridge = gk.bridge.Bridge(pair.bridge.potential).with_source(
        jax.jit(lambda p: p.sample(500, key=jr.key(0))[0])(pair)
    )
    exact = gk.sample(gk.bridge.ExactPaths(10), bridge, 4000, key=jr.key(1), trajectory=True)
    assert exact.value.shape == (4000, 1) and exact.trajectory.shape == (4000, 11, 1)
    euler = gk.sample(gk.bridge.EulerPaths(100), bridge, 4000, key=jr.key(2))
    assert euler.nfe.tolist() == [100] * 4000
    spread = float(exact.value.std()) * np.sqrt(2 / 4000)
    assert abs(float(exact.value.mean() - euler.value.mean())) < 4.9 * spread + 0.02  # weak error of 100 steps
    with pytest.raises(ValueError, match="x_init"):
        gk.sample(gk.bridge.ExactPaths(), pair.bridge, 3, key=jr.key(0))


def test_wrong_input():
    key = jr.key(0)
    x = jr.normal(key, (100, 3))
    fit = lambda *args, **kwargs: gk.bridge.fit_light(*args, num_steps=2, key=jr.key(1), **kwargs)
    for epsilon in (0.0, -0.1, float("inf")):
        with pytest.raises(ValueError, match="epsilon"):
            fit(x, x, epsilon, 2)
        with pytest.raises(ValueError, match="epsilon"):
            gk.bridge.gaussian(jnp.zeros(2), jnp.eye(2), jnp.zeros(2), jnp.eye(2), epsilon)
        with pytest.raises(ValueError, match="epsilon"):
            gk.bridge.light(jnp.zeros(1), jnp.zeros((1, 2)), jnp.ones(1), epsilon)
    with pytest.raises(ValueError, match=r"`x1` must be of shape \(\*, 3\)"):
        fit(x, x[:, :2], 0.1, 2)
    with pytest.raises(ValueError, match="at least 120 samples"):
        fit(x, x, 0.1, 60)
    with pytest.raises(ValueError, match="nonzero variance"):
        fit(x.at[:, 1].set(2.0), x, 0.1, 2)
    with pytest.raises(ValueError, match="full-rank covariance"):
        fit(x, jnp.stack([x[:, 0], x[:, 1], x[:, 0] + x[:, 1]], 1), 0.1, 2, scale="full")
    with pytest.raises(ValueError, match="'diag'"):
        fit(x, x, 0.1, 2, scale="diagonal")
    with pytest.raises(ValueError, match="polish"):
        fit(x, x, 0.1, 2, polish=-1)
    with pytest.raises(ValueError, match="noise"):
        fit(x, x, 0.1, 2, noise=0.0)
    with pytest.raises(gk.NonFiniteError, match="x0"):
        fit(x.at[0, 0].set(jnp.nan), x, 0.1, 2)
    with pytest.raises(TypeError, match="key"):
        gk.bridge.fit_light(x, x, 0.1, 2, key=3)
    with pytest.raises(ValueError, match="positive definite"):
        gk.bridge.gaussian(jnp.zeros(2), jnp.ones((2, 2)), jnp.zeros(2), jnp.eye(2), 1.0)
    with pytest.raises(ValueError, match="mean1"):
        gk.bridge.gaussian(jnp.zeros(2), jnp.eye(2), jnp.zeros(3), jnp.eye(3), 1.0)
    part = (jnp.array([0.5, 0.6]), jnp.zeros((2, 1)), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="sum to one"):
        gk.bridge.mixture_pair(part, part, 1.0)
    with pytest.raises(ValueError, match="positive"):
        gk.bridge.light(jnp.zeros(1), jnp.zeros((1, 2)), -jnp.ones(1), 1.0)
    bridge = gk.bridge.light(jnp.zeros(1), jnp.zeros((1, 2)), jnp.ones(1), 1.0)
    for t in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"`t` must be in \[0.0, 1.0\]"):
            bridge.drift(t, jnp.zeros(2))
        with pytest.raises(ValueError, match=r"`ts` must be in \[0.0, 1.0\]"):
            bridge.sample(jnp.zeros(2), jnp.array([t]), key=jr.key(2))
    with pytest.raises(ValueError, match="non-decreasing"):
        bridge.sample(jnp.zeros(2), jnp.array([0.5, 0.2]), key=jr.key(2))
    with pytest.raises(ValueError, match="strictly increasing"):
        bridge.path_log_prob(jnp.array([0.0, 0.5, 0.5]), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="x0"):
        bridge.sample(jnp.zeros(3), jnp.array([1.0]), key=jr.key(2))
    with pytest.raises(ValueError, match="earlier"):
        bridge.transition_log_prob(0.5, jnp.zeros(2), 0.2, jnp.zeros(2))
    with pytest.raises(ValueError, match="with_source"):
        bridge.reverse()
    with pytest.raises(ValueError, match="source"):
        bridge.with_source(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="event shape"):
        bridge.as_distribution(dist.Normal(jnp.zeros(2), 1.0))
    with pytest.raises(ValueError, match="starts at 0"):
        bridge.as_distribution(dist.Normal(jnp.zeros(2), 1.0).to_event(1), jnp.array([0.1, 1.0]))
    with pytest.raises(ValueError, match="num_steps"):
        gk.bridge.ExactPaths(0)


def test_wrong_input_of_the_other_routes():
    x = jr.normal(jr.key(0), (60, 2))
    routes = (gk.bridge.sf2m, lambda *args, **kw: gk.bridge.fit_matching(*args, 2, **kw))
    for seed, fit in enumerate(routes):
        with pytest.raises(ValueError, match="epsilon"):
            fit(x, x, 0.0, num_steps=2, key=jr.key(seed + 1))
        with pytest.raises(ValueError, match="'sinkhorn'"):
            fit(x, x, 0.1, coupling="exact", num_steps=2, key=jr.key(seed + 1))
        with pytest.raises(ValueError, match="one end per start"):
            fit(x, x[:50], 0.1, coupling="paired", num_steps=2, key=jr.key(seed + 1))
        with pytest.raises(ValueError, match="x1"):
            fit(x, x[:, :1], 0.1, num_steps=2, key=jr.key(seed + 1))
    with pytest.raises(ValueError, match="epsilon"):
        gk.bridge.recipe(x, x, -1.0, 2)
    with pytest.raises(ValueError, match="'lowrank'"):
        gk.bridge.recipe(x, x, 0.1, 2, scale="rank")
