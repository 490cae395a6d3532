"""Discrete plans: against closed forms, their bridges, their gradients; the Monge gap."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def points():
    with jax.enable_x64(True):
        return jr.normal(jr.key(0), (6, 2)), jr.normal(jr.key(1), (7, 2)) + 0.5


def test_plan_value_and_marginals(points):
    x, y = points
    plan = gk.bridge.sinkhorn(x, y, 0.3, tol=1e-12)
    assert bool(plan.converged)
    matrix = plan.plan
    np.testing.assert_allclose(matrix.sum(0), 1 / 7, rtol=1e-10)
    np.testing.assert_allclose(matrix.sum(1), 1 / 6, rtol=1e-10)
    cost = 0.5 * ((x[:, None] - y) ** 2).sum(-1)
    np.testing.assert_allclose(plan.cost, (matrix * cost).sum(), rtol=1e-12)
    np.testing.assert_allclose(plan.value, plan.cost + 0.3 * (matrix * jnp.log(matrix * 42)).sum(), rtol=1e-10)


@pytest.mark.parametrize("tau", [None, pytest.param(1.3, marks=pytest.mark.slow)])
def test_gradients_of_plan_and_value_against_finite_differences(points, tau):
    x, y = points

    def fn(x, epsilon):
        plan = gk.bridge.sinkhorn(x, y, epsilon, tau=tau, tol=1e-13)
        return jnp.sum(plan.plan**2) + plan.value

    run = jax.jit(jax.value_and_grad(fn, (0, 1)))
    value = lambda x, epsilon: run(x, jnp.asarray(epsilon))[0]
    gradient, slope = run(x, jnp.asarray(0.3))[1]
    direction, h = jr.normal(jr.key(3), x.shape), 1e-5
    difference = (value(x + h * direction, 0.3) - value(x - h * direction, 0.3)) / (2 * h)
    np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=1e-6)
    np.testing.assert_allclose(slope, (value(x, 0.3 + h) - value(x, 0.3 - h)) / (2 * h), rtol=1e-6)


def test_unbalanced_gaussian_closed_form():
    """Unbalanced entropic transport between Gaussians on a grid, against its optimality conditions in closed form.

    With quadratic potentials f = a0 - a2 x^2 / 2 and equal ends N(0, s), the fixed point of the soft marginal update is
    a scalar equation for a2, solved here by bisection, independently of the kernel.
    """
    s, epsilon, tau = 0.8, 0.5, 1.3
    rho = tau / (tau + epsilon)

    def update(c):
        # f(x) = -rho eps log int N(y; 0, s) exp((const - c y^2/2 - (x-y)^2/2) / eps) dy has curvature below.
        precision = 1 / s + (c + 1) / epsilon
        return rho * (1 - 1 / (epsilon * precision)), 0.5 * np.log(s * precision)

    lo, hi = -0.9, 5.0
    for _ in range(200):
        mid = 0.5 * (lo + hi)
        lo, hi = (lo, mid) if -update(mid)[0] < mid else (mid, hi)
    curvature, half_logdet = -mid, update(mid)[1]
    # constant term: f0 = -rho (g0 - eps/2 log(s precision)), symmetric f0 = g0.
    constant = rho * epsilon * half_logdet / (1 + rho)
    grid = np.linspace(-8, 8, 801)[:, None]
    weights = np.exp(-0.5 * grid[:, 0] ** 2 / s)
    weights /= weights.sum()
    plan = gk.bridge.sinkhorn(grid, grid, epsilon, a=weights, b=weights, tau=tau, tol=1e-12)
    assert bool(plan.converged)
    expected = constant + 0.5 * curvature * grid[:, 0] ** 2
    middle = np.abs(grid[:, 0]) < 3
    np.testing.assert_allclose(plan.potentials[0][middle], expected[middle], rtol=0, atol=1e-8)
    np.testing.assert_allclose(plan.potentials[1][middle], expected[middle], rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [None, 0.7])
def test_plan_against_pot(points, tau):
    """The same plan as POT's, whose cost is twice ours: so are its regularization and its marginal weight."""
    ot = pytest.importorskip("ot")
    x, y = points
    a, b = np.full(6, 1 / 6), np.linspace(1.0, 2.0, 7)
    b = b / b.sum() * (1.0 if tau is None else 1.5)  # unbalanced: another mass
    cost = np.asarray(((x[:, None] - y) ** 2).sum(-1))
    if tau is None:
        theirs = ot.sinkhorn(a, b, cost, 0.6, method="sinkhorn_log", stopThr=1e-14, numItermax=20_000)
    else:
        theirs = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, 0.6, 2 * tau, stopThr=1e-15, numItermax=20_000)
    plan = gk.bridge.sinkhorn(x, y, 0.3, a=a, b=b, tau=tau, tol=1e-13)
    np.testing.assert_allclose(plan.plan, theirs, rtol=0, atol=1e-10)


def test_gaussian_value_from_a_grid():
    """Entropic value between N(-.1, 1) and N(.1, 1) at epsilon 1: half the squared displacement plus MI."""
    grid = np.linspace(-8, 8, 641)[:, None]
    weight = lambda m: (lambda w: w / w.sum())(np.exp(-0.5 * (grid[:, 0] - m) ** 2))
    plan = gk.bridge.sinkhorn(grid, grid, 1.0, a=weight(-0.1), b=weight(0.1), tol=1e-12)
    scale = (np.sqrt(5) - 1) / 2
    expected = 0.5 * (0.04 + 2 - 2 * scale) - 0.5 * np.log(scale)
    np.testing.assert_allclose(plan.value, expected, rtol=1e-9)


@pytest.mark.slow
def test_bridge_of_a_plan(points):
    x, y = points
    plan = gk.bridge.sinkhorn(x, y, 0.3, tol=1e-13)
    bridge = plan.to_bridge()
    probs = bridge.coupling(x).mixing_distribution.probs
    np.testing.assert_allclose(probs, plan.plan * 6, rtol=0, atol=1e-11)
    z, t = jnp.array([[0.2, -0.1], [1.0, 0.4]]), 0.6
    logits = plan.potentials[1] / 0.3 - ((z[:, None] - y) ** 2).sum(-1) / (2 * 0.3 * (1 - t)) + plan.log_b
    published = (jax.nn.softmax(logits) @ y - z) / (1 - t)
    np.testing.assert_allclose(bridge.drift(t, z), published, rtol=1e-10)
    means = (1 - t) * x[:, None] + t * y
    var = 0.3 * t * (1 - t)
    terms = -0.5 * ((z[:, None, None] - means) ** 2).sum(-1) / var - jnp.log(2 * jnp.pi * var)
    mixture = jax.nn.logsumexp(terms + jnp.log(plan.plan), axis=(1, 2))
    np.testing.assert_allclose(bridge.marginal_log_prob(t, z), mixture, rtol=0, atol=1e-10)
    start = bridge.reverse().coupling(y).mixing_distribution.probs
    np.testing.assert_allclose(start, plan.plan.T * 7, rtol=0, atol=1e-10)


def half_square(x, y):
    return 0.5 * jnp.sum((x - y) ** 2)


def absolute(x, y):
    return jnp.sum(jnp.abs(x - y))


def assignment_gap(fn, x, cost):
    """The gap at epsilon = 0, from an exact assignment."""
    y = jax.vmap(fn)(x)
    table = np.asarray(jax.vmap(lambda x: jax.vmap(lambda y: cost(x, y))(y))(x))
    return np.trace(table) / len(x) - table[linear_sum_assignment(table)].mean()


TURN = np.array([[0.6, -0.8], [0.8, 0.6]])


@pytest.mark.parametrize("cost", [None, absolute], ids=["half_square", "absolute"])
@pytest.mark.parametrize(
    ("fn", "optimal"),
    [(lambda x: 0.5 * x + 1.0, True), (lambda x: x - 2.0, True), (lambda x: -x, False), (lambda x: TURN @ x, False)],
    ids=["shrink", "shift", "reflect", "turn"],
)
def test_monge_gap_against_an_exact_assignment(fn, optimal, cost):
    x, epsilon, tol = jr.normal(jr.key(0), (12, 2)), 0.1, 1e-5
    exact = assignment_gap(fn, x, cost or half_square)
    if cost is None:
        assert exact == pytest.approx(0.0, abs=1e-12) if optimal else exact > 0.1
    gap = float(gk.bridge.monge_gap(fn, x, cost=cost, epsilon=epsilon, tol=tol))
    # Entropy takes at most epsilon log n; rows that miss their weight by tol in all miss at most tol (range of f).
    assert exact - epsilon * np.log(12) - 100 * tol <= gap <= exact + 100 * tol


def test_training_on_the_monge_gap_makes_a_map_optimal():
    """A rotated and stretched linear map, descended on its gap alone, ends in an optimal assignment of its samples."""
    x = jr.normal(jr.key(0), (12, 2))
    fn = lambda matrix: lambda x: matrix @ x
    step = jax.jit(jax.value_and_grad(lambda a: gk.bridge.monge_gap(fn(a), x, epsilon=0.3, tol=1e-3)))
    matrix = jnp.asarray(TURN)
    first = assignment_gap(fn(matrix), x, half_square)
    for _ in range(40):
        matrix = matrix - 0.2 * step(matrix)[1]
    assert first > 0.1
    assert assignment_gap(fn(matrix), x, half_square) < 0.02 * first


def test_monge_gap_refuses_what_it_cannot_judge():
    x = jr.normal(jr.key(0), (12, 2))
    with pytest.raises(ValueError, match="epsilon"):
        gk.bridge.monge_gap(lambda x: -x, x, epsilon=0.0)
    with pytest.raises(ValueError, match="one space"):
        gk.bridge.monge_gap(lambda x: x[:1], x, epsilon=0.1)
    with pytest.raises(gk.NonFiniteError, match="x"):
        gk.bridge.monge_gap(lambda x: -x, x.at[0, 0].set(jnp.nan), epsilon=0.1)
    with pytest.raises(Exception, match="did not converge within 2 sweeps"):
        gk.bridge.monge_gap(lambda x: -x, x, epsilon=0.01, max_iterations=2)


def test_wrong_input(points):
    x, y = points
    for epsilon in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="epsilon"):
            gk.bridge.sinkhorn(x, y, epsilon)
    with pytest.raises(ValueError, match="Both ends live in one space"):
        gk.bridge.sinkhorn(x, jnp.zeros((3, 3)), 0.1)
    with pytest.raises(ValueError, match="weights that sum to one"):
        gk.bridge.sinkhorn(x, y, 0.1, a=jnp.ones(6))
    with pytest.raises(ValueError, match="non-negative"):
        gk.bridge.sinkhorn(x, y, 0.1, a=jnp.array([1.5, -0.5, 0, 0, 0, 0]))
    short = gk.bridge.sinkhorn(x, y, 1e-3, max_iterations=3)
    assert not bool(short.converged) and float(short.marginal_error) > 1e-3
    with pytest.raises(ValueError, match="marginal error of .* after 3 iterations"):
        short.to_bridge()
