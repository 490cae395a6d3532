"""Bridges in closed form: tables, likelihoods, exact sampling, both directions of time."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
from bridge.helpers import FEW_FAMILIES, pair_1d, random_potential, table_covariances
from stats import assert_covariance, assert_mean, assert_same_mean

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")

# d, epsilon, tr S, log det S, tr C, KL(P* || W), entropic value, mutual information
TABLE = [
    (2, 0.1, 2.267132937, -0.0220041876, 1.865686354, 12.85413855, 1.61095683, 2.266431847),
    (2, 1.0, 1.446654961, -1.011930054, 1.230686292, 1.525278734, 2.478123395, 0.4588096872),
    (2, 10.0, 0.2464423014, -4.720979167, 0.2166425678, 1.663825327, 3.140848941, 0.01074915087),
    (8, 0.1, 10.3049406, 0.7473038732, 7.140610009, 54.22024797, 6.763056919, 9.036669283),
    (8, 1.0, 6.357896505, -3.133670161, 4.583905027, 5.982930053, 10.1829109, 1.766815929),
    (8, 10.0, 0.9901270257, -18.09609076, 0.7585012271, 6.272195259, 12.61835735, 0.03768585812),
    (32, 0.1, 42.16567113, 3.551064517, 28.20026307, 220.221837, 27.40046622, 36.0072929),
    (32, 1.0, 25.81219513, -12.06653978, 17.99853924, 24.03473065, 40.97619432, 6.974733563),
    (64, 1.0, 51.74444591, -23.99921093, 35.88421054, 48.11539493, 82.03334755, 13.91755809),
    (64, 10.0, 7.92709704, -144.112906, 5.86934082, 49.86951893, 101.0474858, 0.2916826641),
]


@jax.jit
def table_figures(cov0, cov1, epsilon, x):
    """The columns of the table, and the gaps of both end densities at `x`."""
    d = cov0.shape[0]
    bridge = gk.bridge.gaussian(jnp.zeros(d), cov0, jnp.ones(d), cov1, epsilon)
    scale = bridge.potential.scale.dense(d)[0]
    cross = cov0 @ scale
    logdet = jnp.linalg.slogdet(scale)[1]
    square = d + jnp.trace(cov0 + cov1 - cross - cross.T)  # E |X1 - X0|^2, the means differ by one in each coordinate
    kl = -0.5 * logdet - 0.5 * d + square / (2 * epsilon)
    information = 0.5 * (jnp.linalg.slogdet(cov1)[1] - d * jnp.log(epsilon) - logdet)
    ends = jnp.stack([bridge.marginal_log_prob(t, x) for t in (0.0, 1.0)])
    laws = [dist.MultivariateNormal(jnp.full(d, t), cov).log_prob(x) for t, cov in ((0.0, cov0), (1.0, cov1))]
    figures = [jnp.trace(scale), logdet, jnp.trace(cross), kl, 0.5 * square + epsilon * information, information]
    return jnp.stack(figures), ends / jnp.stack(laws) - 1.0


@pytest.mark.parametrize("d", [2, 8, 32, 64])
def test_gaussian_table(d):
    cov0, cov1 = table_covariances(d)
    x = jr.normal(jr.key(0), (20, d))
    for _, epsilon, *expected in (row for row in TABLE if row[0] == d):
        figures, gaps = table_figures(cov0, cov1, epsilon, x)
        # The table has ten digits.
        np.testing.assert_allclose(figures, expected, rtol=1e-8, atol=1e-9)
        assert float(jnp.abs(gaps).max()) < 1e-8


def test_gaussian_scalar_case_and_drift_energy():
    bridge = gk.bridge.gaussian(jnp.array([-0.1]), jnp.ones(1), jnp.array([0.1]), jnp.ones(1), 1.0)
    scale = float(bridge.potential.scale.dense(1)[0, 0, 0])
    np.testing.assert_allclose(scale, (np.sqrt(5) - 1) / 2, rtol=1e-14)
    square = 0.04 + 2 - 2 * scale
    kl = -0.5 * np.log(scale) - 0.5 + square / 2
    np.testing.assert_allclose(kl, 0.14257192378, rtol=1e-10)
    # KL of the path laws is half the energy of the drift: Gauss quadrature in time and space.
    nodes, weights = np.polynomial.legendre.leggauss(24)
    space, mass = np.polynomial.hermite_e.hermegauss(24)
    t = 0.5 * (nodes[:, None] + 1)
    var = (1 - t) ** 2 + t**2 + t * (1 - t) * (2 * scale + 1)
    x = -0.1 + 0.2 * t + np.sqrt(var) * space
    drift = jax.jit(lambda b, t, x: b.drift(t, x))(bridge, t, x[..., None])[..., 0]
    energy = 0.5 * weights @ (np.asarray(drift) ** 2 @ mass / mass.sum())
    np.testing.assert_allclose(0.5 * energy, kl, rtol=1e-10)


def test_gaussian_diagonal_equals_full():
    args = (jnp.zeros(3), jnp.array([0.5, 1.0, 2.0]), jnp.ones(3), jnp.array([1.0, 0.2, 3.0]))
    diagonal = gk.bridge.gaussian(*args, 0.3)
    full = gk.bridge.gaussian(args[0], jnp.diag(args[1]), args[2], jnp.diag(args[3]), 0.3)
    x = jr.normal(jr.key(0), (6, 3))
    t = jnp.linspace(0.0, 1.0, 6)
    names = ("drift", "score", "probability_flow", "marginal_log_prob")
    run = jax.jit(lambda bridge: [getattr(bridge, name)(t, x) for name in names])
    for one, other in zip(run(diagonal), run(full), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


def test_gaussian_moments_of_sampled_paths():
    d, epsilon, n = 3, 0.8, 20_000
    cov0, cov1 = table_covariances(d)
    bridge = gk.bridge.gaussian(np.zeros(d), cov0, np.ones(d), cov1, epsilon)
    cross = cov0 @ bridge.potential.scale.dense(d)[0]
    key_start, key_path = jr.split(jr.key(0))
    x0 = dist.MultivariateNormal(jnp.zeros(d), cov0).sample(key_start, (n,))
    ts = jnp.array([0.25, 0.8, 1.0])
    paths = jax.jit(lambda b, ts: b.sample(x0, ts, key=key_path))(bridge, ts)
    for i, t in enumerate(np.asarray(ts)):
        cov = (1 - t) ** 2 * cov0 + t**2 * cov1 + t * (1 - t) * (cross + cross.T + epsilon * np.eye(d))
        assert_mean(paths[:, i], jnp.full(d, t), detects=0.1)
        assert_covariance(paths[:, i], cov)


def test_mixture_pair_normalizer_and_marginals():
    pair = pair_1d()
    from genkit.bridge._mixture_pair import product_of_potentials

    log_z = jax.jit(lambda p: jax.nn.logsumexp(product_of_potentials(p.source, p.target, p.bridge.epsilon, 0.0)[0]))(
        pair
    )
    np.testing.assert_allclose(np.exp(log_z), 0.14156886641978, rtol=1e-13)
    x = jnp.linspace(-6, 7, 400)[:, None]

    @jax.jit
    def both(pair, t):
        law = pair.marginal(t)
        ours = pair.bridge.marginal_log_prob(t, x), pair.bridge.score(t, x)
        return ours, (law.log_prob(x), jax.vmap(jax.grad(law.log_prob))(x))

    for t in (0.0, 0.3, 1.0):
        (density, score), (expected, gradient) = both(pair, t)
        np.testing.assert_allclose(density, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(score, gradient, rtol=1e-10, atol=1e-10)


def test_mixture_pair_against_log_domain_sinkhorn_on_a_grid():
    """The plan recovered from its marginals alone by plain log-domain Sinkhorn: L1 error below 1e-12."""
    pair, epsilon = pair_1d(), 0.5
    grid = np.linspace(-10, 10, 321)
    log_h = np.log(grid[1] - grid[0])
    x = jnp.asarray(grid)[:, None]
    kernel = -0.5 * (jnp.asarray(grid)[:, None] - jnp.asarray(grid)) ** 2 / epsilon

    @jax.jit
    def gap(pair):
        log_a, log_b = pair.marginal(0.0).log_prob(x) + log_h, pair.marginal(1.0).log_prob(x) + log_h

        def sweep(g, _):
            f = -jax.nn.logsumexp(kernel + g + log_b, 1)
            return -jax.nn.logsumexp(kernel + (f + log_a)[:, None], 0), None

        g, _ = jax.lax.scan(sweep, jnp.zeros(321), length=400)
        f = -jax.nn.logsumexp(kernel + g + log_b, 1)
        solved = jnp.exp(kernel + (f + log_a)[:, None] + g + log_b)
        # The log-plan is a sum of functions of one end and the kernel.
        phi, hatphi = pair.bridge.potential.log_value(x, 1.0), pair.bridge.backward.log_value(x, 1.0)
        plan = jnp.exp(hatphi[:, None] + kernel - 0.5 * jnp.log(2 * jnp.pi * epsilon) + phi + 2 * log_h)
        return jnp.abs(solved - plan).sum()

    assert float(gap(pair)) < 1e-12


@pytest.mark.parametrize("kind", FEW_FAMILIES)
def test_paths_telescope_and_transitions_compose(kind):
    bridge = gk.bridge.Bridge(random_potential(kind, epsilon=0.4))
    ts = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])

    @jax.jit
    def run(bridge):
        xs = bridge.sample(jnp.ones((6, 3)), ts, key=jr.key(0))
        steps = bridge.transition_log_prob(ts[:-1], xs[:, :-1], ts[1:], xs[:, 1:])
        plan = bridge.transition_log_prob(0.0, xs[:, 0], 1.0, xs[:, -1])
        return xs, bridge.path_log_prob(ts, xs), steps, plan, bridge.coupling(xs[:, 0]).log_prob(xs[:, -1])

    xs, path, steps, plan, coupling = run(bridge)
    np.testing.assert_allclose(xs[:, 0], 1.0, atol=1e-14)
    np.testing.assert_allclose(path, steps.sum(-1), rtol=1e-12, atol=1e-11)
    np.testing.assert_allclose(plan, coupling, rtol=0, atol=1e-10)


def test_transition_is_a_density_and_obeys_chapman_kolmogorov():
    bridge = pair_1d().bridge
    grid = jnp.linspace(-12, 12, 4001)[:, None]
    h = grid[1, 0] - grid[0, 0]
    x, y = jnp.array([0.4]), jnp.array([1.1])
    density = jax.jit(lambda s, x, t, y: jnp.exp(bridge.transition_log_prob(s, x, t, y)))
    first = density(0.1, x, 0.6, grid)
    np.testing.assert_allclose(first.sum() * h, 1.0, rtol=1e-12)
    second, expected = density(0.6, grid, 0.95, y), density(0.1, x, 0.95, y)
    np.testing.assert_allclose((first * second).sum() * h, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", FEW_FAMILIES)
def test_sampler_agrees_with_the_plan(kind):
    """Mean and covariance of exact draws, from time 0 and restarted midway, against the end-point posterior."""
    potential = random_potential(kind, epsilon=0.6)
    bridge = gk.bridge.Bridge(potential)
    x = jnp.array([0.2, -0.4, 1.0])
    many, end = jnp.broadcast_to(x, (30_000, 3)), jnp.array([1.0])

    @jax.jit
    def run(b, start):
        draws = b.sample(many, end, start=start, key=jr.key(1))[:, 0]
        logits, means = b.potential.endpoint(x, start)
        w, dense = jax.nn.softmax(logits), b.potential.scale.dense(3)
        mean = w @ means
        inner = jnp.einsum("k,kde->de", w, dense @ jnp.linalg.inv((1 - start) * jnp.eye(3) + start * dense))
        spread = jnp.einsum("k,kd,ke->de", w, means - mean, means - mean)
        return draws, mean, 0.6 * (1 - start) * inner + spread, b.coupling(x).mean

    for start in (0.0, 0.6):
        draws, mean, covariance, plan_mean = run(bridge, start)
        assert_mean(draws, mean)
        assert_covariance(draws, covariance)
        if start == 0.0:
            np.testing.assert_allclose(plan_mean, mean, rtol=1e-12)


def test_components_of_a_coupling_have_covariances():
    x = jnp.zeros((2, 3))
    for kind in ("full", "lowrank"):
        potential = random_potential(kind)
        covariance = jax.jit(lambda p: p.coupling(x).component_distribution.covariance_matrix)(potential)
        expected = jnp.broadcast_to(potential.epsilon * potential.scale.dense(3), covariance.shape)
        np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12)
    for kind in ("iso", "diag"):
        potential = random_potential(kind)
        variance = jax.jit(lambda p: p.coupling(x).component_distribution.variance)(potential)
        expected = potential.epsilon * jnp.diagonal(potential.scale.dense(3), axis1=-2, axis2=-1)
        np.testing.assert_allclose(variance, jnp.broadcast_to(expected, variance.shape), rtol=1e-12)


@pytest.mark.slow
def test_restarting_and_grids_do_not_change_the_law():
    """The state at one time has the same law whatever other times are on the grid."""
    bridge = pair_1d().bridge
    x0 = jnp.broadcast_to(jnp.array([-0.5]), (40_000, 1))
    sample = jax.jit(lambda ts, key: bridge.sample(x0, ts, key=key))
    fine = sample(jnp.linspace(0.1, 1.0, 10), jr.key(0))[:, 4]
    coarse = sample(jnp.array([0.5]), jr.key(1))[:, 0]
    assert_same_mean(jnp.concatenate([fine, fine**2], 1), jnp.concatenate([coarse, coarse**2], 1))


@pytest.mark.slow
def test_reverse_of_known_source():
    pair = pair_1d()
    x, y = jnp.array([[0.3], [-1.0]]), jnp.array([[0.5], [2.0]])

    @jax.jit
    def run(pair):
        back = pair.bridge.reverse()
        forward = pair.marginal(0.0).log_prob(x) + pair.bridge.transition_log_prob(0.0, x, 1.0, y)
        backward = pair.marginal(1.0).log_prob(y) + back.transition_log_prob(0.0, y, 1.0, x)
        drifts = back.drift(0.3, x), back.reverse().drift(0.3, x)
        return forward, backward, drifts, (pair.bridge.backward_drift(0.7, x), pair.bridge.drift(0.3, x))

    forward, backward, drifts, expected = run(pair)
    np.testing.assert_allclose(forward, backward, rtol=0, atol=1e-12)
    np.testing.assert_allclose(drifts, expected, rtol=1e-12)


def test_probability_flow_transports_the_marginals():
    """Continuity equation: d_t log p + div u + u . score = 0."""
    pair = pair_1d()

    @jax.jit
    def residual(bridge, x, t):
        rate = jax.grad(lambda t: bridge.marginal_log_prob(t, x))(t)
        flow = lambda x: bridge.probability_flow(t, x)
        return rate + jnp.trace(jax.jacfwd(flow)(x)) + flow(x) @ bridge.score(t, x)

    np.testing.assert_allclose(residual(pair.bridge, jnp.array([0.7]), 0.4), 0.0, atol=1e-11)


@pytest.mark.slow
def test_source_samples_give_marginals_and_a_reverse():
    pair = pair_1d()
    x0, _ = jax.jit(lambda pair: pair.sample(4000, key=jr.key(0)))(pair)
    bridge = gk.bridge.Bridge(pair.bridge.potential).with_source(x0)
    x = jnp.linspace(-3, 4, 8)[:, None]

    @jax.jit
    def both(bridge, t):
        empirical = bridge.potential.log_value(x, t) + jax.nn.logsumexp(
            -0.5 * (x - x0[:, 0]) ** 2 / (0.5 * t)
            - 0.5 * jnp.log(2 * jnp.pi * 0.5 * t)
            - bridge.potential.log_value(x0, 0.0)
            - jnp.log(4000),
            axis=1,
        )
        return bridge.marginal_log_prob(t, x), empirical

    for t in (0.2, 1.0):
        np.testing.assert_allclose(*both(bridge, t), rtol=0, atol=1e-10)
    ends = jax.jit(lambda b: b.reverse().sample(jnp.array([0.5]), jnp.array([1.0]), key=jr.key(1)))(bridge)
    assert float(jnp.abs(x0 - ends[0]).min()) < 1e-12


def test_distribution_of_both_ends():
    pair = pair_1d()
    law = pair.bridge.as_distribution(pair.marginal(0.0))
    assert law.event_shape == (2, 1)
    # A pytree like any numpyro law, so it crosses jit.
    draws = jax.jit(lambda law: law.sample(jr.key(0), (5,)))(law)
    log_prob = jax.jit(lambda law, x: law.log_prob(x))
    log_plan = jax.jit(lambda pair, x: pair.log_plan(x[:, 0], x[:, 1]))
    np.testing.assert_allclose(log_prob(law, draws), log_plan(pair, draws), rtol=0, atol=1e-11)


@pytest.mark.slow
def test_measure_and_program():
    pair = pair_1d()
    law = pair.bridge.as_distribution(pair.marginal(0.0))
    draw = jax.jit(lambda law: law.sample(jr.key(0)))(law)
    measure = pair.bridge.as_measure(pair.marginal(0.0), jnp.array([0.0, 0.5, 1.0]))
    value, log_density = jax.jit(lambda key: measure.sample(key=key))(jr.key(1))
    assert value.shape == (3, 1) and np.isfinite(log_density)
    import numpyro

    def model():
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(x[1, 0], 0.1), obs=1.0)

    density = jax.jit(lambda x: numpyro.infer.util.log_density(model, (), {}, {"x": x})[0])(draw)
    expected = jax.jit(lambda law, x: law.log_prob(x))(law, draw) + dist.Normal(draw[1, 0], 0.1).log_prob(1.0)
    np.testing.assert_allclose(density, expected, rtol=1e-12)


def test_jit_vmap_grad_and_one_compilation(compilations):
    pair = pair_1d()
    drift = jax.jit(lambda bridge, t, x: bridge.drift(t, x))
    x = jnp.array([[0.1], [0.2]])
    eager = pair.bridge.drift(0.3, x)
    np.testing.assert_allclose(drift(pair.bridge, 0.3, x), eager, rtol=1e-12)
    other = pair_1d(0.7).bridge
    with compilations() as count:
        drift(other, 0.9, x).block_until_ready()
    assert count() == 0
    np.testing.assert_allclose(jax.vmap(pair.bridge.drift, (None, 0))(0.3, x), eager, rtol=1e-12)
    loss = lambda p: gk.bridge.Bridge(p).path_log_prob(jnp.array([0.0, 1.0]), x)
    gradient = jax.jit(jax.grad(loss))(pair.bridge.potential)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
