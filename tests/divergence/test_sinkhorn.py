"""Sinkhorn: exact small problems, the primal by an independent solver, Gaussians in closed form, wrong input."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.spatial.distance import cdist

import genkit as gk
from genkit.divergence import MatrixCost, PointCost, sinkhorn_potentials, transport_value


v = gk.divergence


def problem(n=7, m=5, seed=0):
    random = np.random.RandomState(seed)
    x, y = random.randn(n, 2), 0.6 * random.randn(m, 2) + 0.5
    a, b = random.dirichlet(np.ones(n)), random.dirichlet(np.ones(m))
    return x, y, a, b, cdist(x, y, "sqeuclidean") / 2


def plan_of(state, cost, a, b, epsilon):
    return a[:, None] * b[None] * np.exp((np.asarray(state.f)[:, None] + np.asarray(state.g)[None] - cost) / epsilon)


def kl(p, q):
    return np.sum(p * np.log(p / q)) - p.sum() + q.sum()


def scaling(cost, a, b, epsilon, rho=1.0, sweeps=20_000):
    """The textbook iteration on the scalings, without logarithms."""
    kernel, u, w = np.exp(-cost / epsilon), np.ones(len(a)), np.ones(len(b))
    for _ in range(sweeps):
        u = (1 / (kernel @ (b * w))) ** rho
        w = (1 / (kernel.T @ (a * u))) ** rho
    return (a * u)[:, None] * kernel * (b * w)[None]


@pytest.mark.parametrize("epsilon", [2.0, 0.3, 0.05])
def test_balanced_plan_marginals_and_value(epsilon, x64):
    x, y, a, b, cost = problem()
    geometry = PointCost(jnp.asarray(x), jnp.asarray(y))
    state = sinkhorn_potentials(geometry, jnp.log(a), jnp.log(b), epsilon, tolerance=1e-12)
    assert bool(state.converged) and float(state.marginal_error) <= 1e-12
    plan = plan_of(state, cost, a, b, epsilon)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-11)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-11)
    np.testing.assert_allclose(plan, scaling(cost, a, b, epsilon), atol=1e-10)
    primal = np.sum(plan * cost) + epsilon * kl(plan, a[:, None] * b[None])
    value = transport_value(geometry, jnp.log(a), jnp.log(b), epsilon, state)
    np.testing.assert_allclose(value, primal, rtol=1e-9)
    by_matrix = sinkhorn_potentials(MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, tolerance=1e-12)
    np.testing.assert_allclose(by_matrix.f - by_matrix.f[0], state.f - state.f[0], atol=1e-9)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_unbalanced_against_the_textbook_iteration(tau, x64):
    _, _, a, b, cost = problem()
    a, b, epsilon = 1.5 * a, 0.8 * b, 0.3  # masses need not agree
    state = sinkhorn_potentials(MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, tau=tau, tolerance=1e-12)
    assert bool(state.converged)
    plan = plan_of(state, cost, a, b, epsilon)
    np.testing.assert_allclose(plan, scaling(cost, a, b, epsilon, rho=tau / (tau + epsilon)), atol=1e-9)
    primal = np.sum(plan * cost) + epsilon * kl(plan, a[:, None] * b[None])
    primal += tau * (kl(plan.sum(1), a) + kl(plan.sum(0), b))
    value = transport_value(MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, state, tau=tau)
    np.testing.assert_allclose(value, primal, rtol=1e-8)


def test_small_epsilon_approaches_the_linear_program(x64):
    _, _, a, b, cost = problem()
    n, m = cost.shape
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.kron(np.ones(n), np.eye(m))
    exact = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b])).fun
    for epsilon in (1e-2, 1e-3):
        state = sinkhorn_potentials(
            MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, tolerance=1e-9, max_iterations=200_000
        )
        value = float(transport_value(MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, state))
        assert bool(state.converged)
        assert exact <= value + 1e-9 and value - exact <= epsilon * np.log(n * m)


def test_gradient_of_the_value_is_exact(x64):
    _, _, a, b, cost = problem()
    epsilon, h = 0.2, 1e-5

    def value(matrix, log_a, epsilon):
        state = sinkhorn_potentials(MatrixCost(matrix), log_a, jnp.log(b), epsilon, tolerance=1e-13)
        return transport_value(MatrixCost(matrix), log_a, jnp.log(b), epsilon, state)

    matrix, log_a = jnp.asarray(cost), jnp.log(a)
    by_cost, by_epsilon = jax.grad(value, argnums=(0, 2))(matrix, log_a, epsilon)
    state = sinkhorn_potentials(MatrixCost(cost), log_a, jnp.log(b), epsilon, tolerance=1e-13)
    np.testing.assert_allclose(by_cost, plan_of(state, cost, a, b, epsilon), atol=1e-9)
    np.testing.assert_allclose(
        by_epsilon, (value(matrix, log_a, epsilon + h) - value(matrix, log_a, epsilon - h)) / (2 * h), rtol=1e-6
    )
    # Weights move on the simplex: the gradient is determined up to a constant.
    direction = np.array([1.0, -1.0, 0, 0, 0, 0, 0]) * 1e-6
    slope = jax.grad(lambda w: value(matrix, jnp.log(w), epsilon))(jnp.asarray(a)) @ direction
    difference = value(matrix, jnp.log(a + direction), epsilon) - value(matrix, jnp.log(a - direction), epsilon)
    np.testing.assert_allclose(slope, difference / 2, rtol=1e-5)


def test_points_without_weight_do_not_count(x64):
    x, y, a, b, cost = problem()
    padded = np.concatenate([x, np.full((2, 2), 50.0)])
    log_a = jnp.concatenate([jnp.log(a), jnp.full(2, -jnp.inf)])
    geometry = PointCost(jnp.asarray(padded), jnp.asarray(y))
    state = sinkhorn_potentials(geometry, log_a, jnp.log(b), 0.3, tolerance=1e-10)
    bare = sinkhorn_potentials(MatrixCost(cost), jnp.log(a), jnp.log(b), 0.3, tolerance=1e-10)
    assert bool(state.converged)
    got = transport_value(geometry, log_a, jnp.log(b), 0.3, state)
    np.testing.assert_allclose(got, transport_value(MatrixCost(cost), jnp.log(a), jnp.log(b), 0.3, bare), rtol=1e-9)


def test_gaussians_in_closed_form(x64):
    # On a fine grid with Gaussian weights: W_eps of N(0, s) and N(0, r) in one dimension, cost |x - y|^2 / 2.
    # The plan is the Gaussian coupling of covariance c with eps = (s r - c^2) / c.
    s, r, epsilon = 0.8, 1.5, 0.5
    grid = jnp.linspace(-9, 9, 401)
    log_a, log_b = (jax.nn.log_softmax(-(grid**2) / (2 * variance)) for variance in (s, r))
    geometry = PointCost(grid[:, None], grid[:, None])
    state = sinkhorn_potentials(geometry, log_a, log_b, epsilon, tolerance=1e-11)
    c = np.sqrt(s * r + epsilon**2 / 4) - epsilon / 2
    want = 0.5 * (s + r - 2 * c) - 0.5 * epsilon * np.log(1 - c**2 / (s * r))
    np.testing.assert_allclose(transport_value(geometry, log_a, log_b, epsilon, state), want, rtol=1e-7)


def test_divergence_limits(x64):
    random = np.random.RandomState(0)
    x, y = random.randn(12, 2), random.randn(12, 2) + 1.0
    cost = cdist(x, y, "sqeuclidean") / 2
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    got = v.sinkhorn_divergence(x, y, 1e-2, tolerance=1e-5, max_iterations=100_000)
    np.testing.assert_allclose(got, cost[rows, columns].mean(), rtol=1e-2)
    far = v.sinkhorn_divergence(x, y, 1e4)
    np.testing.assert_allclose(far, ((x.mean(0) - y.mean(0)) ** 2).sum() / 2, rtol=1e-3)
    assert abs(float(v.sinkhorn_divergence(x, x, 0.1, tolerance=1e-10))) < 1e-9
    slope = jax.grad(lambda z: v.sinkhorn_divergence(z, x, 0.1, tolerance=1e-10))(jnp.asarray(x))
    np.testing.assert_allclose(slope, 0.0, atol=1e-8)


def test_divergence_of_different_sizes_is_symmetric_and_composes():
    x, y = jr.normal(jr.key(0), (9, 1, 2)), jr.normal(jr.key(1), (6, 1, 2)) + 1
    np.testing.assert_allclose(v.sinkhorn_divergence(x, y, 0.3), v.sinkhorn_divergence(y, x, 0.3), rtol=1e-4)
    inside = jax.jit(lambda x: jax.value_and_grad(v.sinkhorn_divergence)(x, y, 0.3))(x)
    np.testing.assert_allclose(inside[0], v.sinkhorn_divergence(x, y, 0.3), rtol=1e-4)
    together = jax.vmap(lambda s: v.sinkhorn_divergence(s * x, y, 0.3))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(together[1], v.sinkhorn_divergence(2 * x, y, 0.3), rtol=1e-4)


def test_no_silent_failure():
    x, y = jr.normal(jr.key(0), (9, 2)), jr.normal(jr.key(1), (6, 2)) + 1
    with pytest.raises(RuntimeError, match="did not converge within 3 sweeps"):
        jax.block_until_ready(v.sinkhorn_divergence(x, y, 1e-3, max_iterations=3))
    geometry = PointCost(x, y)
    log_a, log_b = jnp.full(9, -jnp.log(9.0)), jnp.full(6, -jnp.log(6.0))
    state = sinkhorn_potentials(geometry, log_a, log_b, 1e-3, max_iterations=3)
    assert not bool(state.converged) and int(state.num_iterations) == 3


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_float32_reaches_what_rounding_permits(epsilon):
    _, _, a, b, cost = problem(40, 30)
    low = sinkhorn_potentials(MatrixCost(np.float32(cost)), jnp.log(np.float32(a)), jnp.log(np.float32(b)), epsilon)
    value = transport_value(MatrixCost(np.float32(cost)), jnp.log(np.float32(a)), jnp.log(np.float32(b)), epsilon, low)
    assert bool(low.converged) and low.f.dtype == jnp.float32
    with jax.enable_x64(True):
        high = sinkhorn_potentials(MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, tolerance=1e-9)
        want = float(transport_value(MatrixCost(cost), jnp.log(a), jnp.log(b), epsilon, high))
    np.testing.assert_allclose(value, want, rtol=1e-4)


def test_wrong_input():
    x = jnp.zeros((3, 2))
    log = jnp.zeros(3)
    for kwargs, words in (
        ({"epsilon": -1.0}, "`epsilon` must be positive"),
        ({"epsilon": 1.0, "tau": 0.0}, "`tau` must be positive"),
        ({"epsilon": 1.0, "tolerance": 0.0}, "`tolerance` must be positive"),
        ({"epsilon": 1.0, "max_iterations": 0}, "`max_iterations` must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            sinkhorn_potentials(PointCost(x, x), log, log, **kwargs)
    with pytest.raises(ValueError, match=r"`a` must be of shape \(3,\)"):
        sinkhorn_potentials(PointCost(x, x), jnp.zeros(2), log, 1.0)
    with pytest.raises(ValueError, match="`cost` must be finite"):
        MatrixCost(jnp.array([[jnp.nan]]))
    with pytest.raises((ValueError, TypeError)):
        MatrixCost(jnp.ones(3))
