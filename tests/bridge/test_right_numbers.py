"""Inputs that people really have: large units, integers, padding, weights known beforehand, NaN."""

import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import genkit as gk


def clouds(n=100, d=5, scale=1.0):
    random = np.random.RandomState(0)
    return scale * random.randn(n, d), scale * random.randn(n, d)


def test_costs_of_ten_million_epsilon_converge_in_float32():
    x, y = (np.float32(points) for points in clouds(scale=1000.0))
    plan = gk.bridge.sinkhorn(x, y, 0.1)
    cost = 0.5 * ((x[:, None].astype(float) - y) ** 2).sum(-1)
    exact = cost[linear_sum_assignment(cost)].mean()
    assert bool(plan.converged) and float(plan.marginal_error) <= 1e-6
    np.testing.assert_allclose(plan.plan.sum(1), 0.01, rtol=1e-4)
    np.testing.assert_allclose(plan.plan.sum(0), 0.01, rtol=1e-4)
    np.testing.assert_allclose(plan.cost, exact, rtol=1e-5)
    np.testing.assert_allclose(plan.value, exact, rtol=1e-5)
    with pytest.raises(ValueError, match="`epsilon` must be at least"):
        plan.to_bridge()


def test_what_has_not_converged_says_so():
    x, y = clouds(20, 2)
    for epsilon, options in ((1e-30, {"max_iterations": 200}), (0.01, {"tol": 1e-12})):
        plan = gk.bridge.sinkhorn(np.float32(x), np.float32(y), epsilon, **options)
        assert not bool(plan.converged)
        assert np.isfinite(float(plan.value))
        with pytest.raises(ValueError, match="converged"):
            plan.to_bridge()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float16, np.float64])
def test_numbers_are_not_cast_to_the_dtype_of_the_data(dtype):
    x = np.array([[1, 4], [3, 0], [2, 2], [9, 5]], dtype)
    y = np.array([[2, 1], [7, 6], [0, 3]], dtype)
    plan = gk.bridge.sinkhorn(x, y, 1.5)
    expected = gk.bridge.sinkhorn(np.float32(x), np.float32(y), 1.5)
    np.testing.assert_array_equal(plan.plan, expected.plan)
    assert float(plan.epsilon) == 1.5 and plan.plan.dtype == jnp.float32
    bridge = gk.bridge.gaussian(np.zeros(2, dtype), np.ones(2, dtype), np.ones(2, dtype), np.ones(2, dtype), 0.5)
    assert float(bridge.epsilon) == 0.5
    pair = gk.bridge.mixture_pair(
        (np.ones(1, dtype), np.zeros((1, 2), dtype), np.ones((1, 2), dtype)),
        (np.ones(1, dtype), np.ones((1, 2), dtype), np.ones((1, 2), dtype)),
        0.5,
    )
    assert np.isfinite(float(pair.log_plan(jnp.zeros(2), jnp.ones(2))))
    assert float(gk.bridge.light(np.zeros(1, dtype), np.ones((1, 2), dtype), np.ones(1), 0.5).epsilon) == 0.5


SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", [np.uint8, pytest.param(np.float16, marks=SLOW), pytest.param(bool, marks=SLOW)])
def test_points_of_any_dtype_are_floats(dtype):
    """Unsigned integers wrap in differences and squares, and half precision ends at 65,504."""
    points = np.array([[1, 2], [3, 0], [200, 1]]).astype(dtype)
    bridge = gk.bridge.light(np.zeros(2), np.array([[1.0, 0.0], [0.0, 2.0]]), np.ones(2), 1.5)
    calls = {
        "drift": lambda x: bridge.drift(0.5, x),
        "transition": lambda x: bridge.transition_log_prob(0.25, x[1:], 0.5, x[:-1]),
        "path": lambda x: bridge.path_log_prob(np.array([0.0, 0.25, 0.5]), x),
        "objective": lambda x: bridge.objective(x, x),
        "marginal": lambda x: bridge.with_source(x).marginal_log_prob(0.25, x),
        "path_kl": lambda x: gk.bridge.path_kl(bridge, bridge.with_source(x), x, key=jr.key(0)),
        "conditional": lambda x: gk.bridge.cbw2_uvp(bridge, bridge, x, x),
        "moments": lambda x: gk.bridge.bw2_uvp(x[0], np.diag(x[0]), x[1], np.diag(x[0]), 1.5),
        "discrete": lambda x: (
            gk.divergence.sinkhorn_potentials(
                gk.divergence.PointCost(x, x[:2]), np.zeros(3, int), np.zeros(2, np.float16), 1.5, tau=0.5
            ).f
        ),
    }
    for name, call in calls.items():
        expected = call(np.float32(points))
        np.testing.assert_allclose(call(points), expected, rtol=1e-6, err_msg=name)


def test_parameters_given_as_integers_do_not_round_the_times():
    whole = gk.bridge.MixturePotential(
        jnp.zeros(1, int), jnp.ones((1, 2), int), gk.bridge.Iso(jnp.ones(1, int)), 0.5, jnp.zeros(2, int)
    )
    floats = gk.bridge.MixturePotential(jnp.zeros(1), jnp.ones((1, 2)), gk.bridge.Iso(jnp.ones(1)), 0.5, jnp.zeros(2))
    np.testing.assert_array_equal(whole.drift(jnp.ones(2), 0.5), floats.drift(jnp.ones(2), 0.5))


def test_weights_known_outside_a_trace(x64):
    x, y = clouds(6, 2)
    for weights in (jnp.full(6, 1 / 6), np.full(6, 1 / 6)):
        cost = jax.jit(lambda u, a=weights: gk.bridge.sinkhorn(u, y, 0.5, a=a, b=a).cost)(jnp.asarray(x))
        np.testing.assert_allclose(cost, gk.bridge.sinkhorn(x, y, 0.5).cost, rtol=1e-6)


@pytest.mark.parametrize("tau", [None, 2.0])
def test_gradient_in_weights_that_are_zero(tau, x64):
    """The derivative in a weight is its potential, where the mass of the others makes room (balanced problems)."""
    x, y = (jnp.asarray(points) for points in clouds(6, 2))
    a = jnp.array([0.3, 0.2, 0.5, 0.0, 0.0, 0.0])

    def value(a):
        return gk.bridge.sinkhorn(x, y, 0.5, a=a, tau=tau, tol=1e-12).value

    def plan_size(a):
        return jnp.sum(gk.bridge.sinkhorn(x, y, 0.5, a=a, tau=tau, tol=1e-12).plan ** 2)

    for function in (value, plan_size):
        slope = jax.jit(jax.grad(function))(a)
        assert bool(jnp.isfinite(slope).all())
        # Along the simplex, and to the inside.
        direction = jnp.array([-1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        h = 1e-6
        difference = (-3 * function(a) + 4 * function(a + h * direction) - function(a + 2 * h * direction)) / (2 * h)
        np.testing.assert_allclose(slope @ direction, difference, rtol=1e-5, atol=1e-8)


def test_couplings_that_do_not_converge_are_told():
    x, y = (np.float32(points) for points in clouds(64, 2))
    options = {"coupling": "sinkhorn", "num_steps": 4, "batch_size": 32}
    with pytest.warns(UserWarning, match="plans of 100 % of the batches had not converged"):
        gk.bridge.fit_matching(x, y, 1e-5, 1, key=jr.key(0), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gk.bridge.fit_matching(x, y, 0.5, 1, key=jr.key(1), **options)


@pytest.mark.slow
def test_raw_units_of_the_breast_cancer_data():
    """In 10,000 sweeps neither float32 nor float64 converges; both say so, at a cost within 1e-4 of the assignment."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    benign, malignant = np.float32(x[y == 1][:200]), np.float32(x[y == 0][:200])
    plan = gk.bridge.sinkhorn(malignant, benign, 10.0)
    cost = 0.5 * ((malignant[:, None].astype(float) - benign) ** 2).sum(-1)
    exact = cost[linear_sum_assignment(cost)].mean()
    assert exact == pytest.approx(649_363, rel=1e-5)
    assert not bool(plan.converged) and float(plan.marginal_error) < 1e-3
    np.testing.assert_allclose(plan.cost, exact, rtol=1e-4)


def test_soft_marginals_with_a_large_weight_take_few_sweeps(x64):
    x, y = clouds(30, 2)
    # A ratio of 1e4 took more than 10,000 sweeps before both potentials moved together.
    plan = gk.bridge.sinkhorn(x, y + 1.0, 0.1, b=np.full(30, 1.5 / 30), tau=1e3)
    assert bool(plan.converged) and int(plan.num_iterations) < 200
    # Both masses are held equally hard: the plan has their geometric mean.
    np.testing.assert_allclose(plan.plan.sum(), np.sqrt(1.5), rtol=1e-3)


def test_memory_of_potentials_and_their_gradient_does_not_grow_with_the_pairs():
    """20,000 by 20,000 numbers would be 1.6 GB."""
    x = jnp.zeros((20_000, 3))

    def second_moment(x):
        return jnp.sum(gk.bridge.sinkhorn(x, 2 * x, 0.5, max_iterations=3).potentials[1] ** 2)

    memory = jax.jit(jax.grad(second_moment)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**29


def test_conjugate_gradients_give_the_derivative_of_the_direct_solve(monkeypatch, x64):
    from genkit.divergence import _transport_value

    x, y = (jnp.asarray(points) for points in clouds(12, 2))

    def gradients():
        jax.clear_caches()
        found = []
        for tau in (None, 1.0):
            plan_size = lambda x, tau=tau: jnp.sum(gk.bridge.sinkhorn(x, y, 0.5, tau=tau, tol=1e-12).plan ** 2)
            found.append(jax.grad(plan_size)(x))
        return found

    direct = gradients()
    monkeypatch.setattr(_transport_value, "_FEW_PAIRS", 0)
    for one, other in zip(direct, gradients(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)
    jax.clear_caches()


def test_nan_is_named():
    bridge = gk.bridge.light(jnp.zeros(1), jnp.zeros((1, 2)), jnp.ones(1), 1.0)
    x = jnp.array([jnp.nan, 0.0])
    with pytest.raises(gk.NonFiniteError, match="`x0`"):
        bridge.sample(x, jnp.array([0.5, 1.0]), key=jr.key(0))
    with pytest.raises(gk.NonFiniteError, match="`x0`"):
        bridge.coupling(x)
    with pytest.raises(gk.NonFiniteError, match="`xs`"):
        bridge.path_log_prob(jnp.array([0.0, 1.0]), jnp.stack([x, x]))
    points = jnp.asarray(clouds(8, 2)[0])
    with pytest.raises(gk.NonFiniteError, match="map_fn"):
        gk.bridge.monge_gap(lambda x: x * jnp.nan, points, epsilon=0.5)
    with pytest.raises(Exception, match="map_fn.x.` must be finite"):
        jax.block_until_ready(jax.jit(lambda s: gk.bridge.monge_gap(lambda x: s * x, points, epsilon=0.5))(jnp.nan))


NOTHING = jnp.zeros((0, 2))
POINTS = jnp.zeros((3, 2))
LOST = jnp.full((3, 2), jnp.nan)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda b: gk.bridge.LightObjective()(b, (NOTHING, POINTS), key=jr.key(0)), "`x0` must be a batch"),
        (lambda b: gk.bridge.MatchingObjective()(b, (NOTHING, NOTHING), key=jr.key(0)), "`x0` must be a batch"),
        (lambda b: gk.bridge.MatchingObjective()(b, (POINTS, POINTS[:2]), key=jr.key(0)), "one end for each start"),
        (lambda b: b.objective(NOTHING, NOTHING), "`x0 and x1` must be non-empty"),
        (lambda b: b.with_source(NOTHING), "`source` must be samples"),
        (lambda b: b.drift(0.5, LOST), "`x` must be finite"),
        (lambda b: b.with_source(POINTS).marginal_log_prob(0.5, LOST), "`x` must be finite"),
        (lambda b: gk.bridge.plan_kl(b, b, NOTHING, NOTHING), "`x0` must be non-empty"),
        (lambda b: gk.bridge.path_kl(b, b, LOST, key=jr.key(0)), "`x0` must be finite"),
        (lambda b: gk.bridge.cbw2_uvp(b, b, POINTS, LOST), "`x1` must be finite"),
        (lambda b: gk.bridge.monge_gap(lambda x: x, NOTHING, epsilon=0.1), "`x` must be samples"),
        (lambda b: gk.bridge.sinkhorn(POINTS, POINTS, 0.1, a=np.zeros(3), tau=1.0), "`a` must be weights of which one"),
        (lambda b: gk.bridge.sinkhorn(POINTS, POINTS, 0.1, tau=np.inf), "Leave `tau` out"),
        (lambda b: gk.bridge.UnpairedBatches(POINTS, POINTS, 0), "`batch_size` must be an integer >= 1"),
        (lambda b: gk.divergence.PointCost(POINTS, LOST), "`y` must be finite"),
    ],
)
def test_nothing_and_nan_are_refused(call, words):
    bridge = gk.bridge.light(np.zeros(1), np.ones((1, 2)), np.ones(1), 0.5)
    with pytest.raises(ValueError, match=words):
        call(bridge)


def test_raw_units_are_named_where_the_start_fails():
    x, y = (np.float32(points * [1.0, 1e4]) for points in clouds(200, 2))
    with pytest.raises(ValueError, match="standard deviations"):
        gk.bridge.fit_light(np.float32(x * [1e-2, 1e2]), y, 1e-6, 2, scale="full", num_steps=2, key=jr.key(0))


@pytest.mark.slow
def test_raw_units_of_the_wine_data_are_named():
    """Thirteen coordinates from hue to proline: standard deviations from .1 to 300."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_wine(return_X_y=True)
    with pytest.raises(ValueError, match="divide coordinates by their standard deviations where units differ"):
        gk.bridge.fit_light(
            np.float32(x[y == 0]), np.float32(x[y == 1]), 10.0, 2, scale="full", num_steps=2, key=jr.key(0)
        )
