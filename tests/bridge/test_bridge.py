"""Bridges in closed form: tables, likelihoods, exact sampling, both directions of time."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
from bridge.helpers import FAMILIES, pair_1d, random_potential, table_covariances
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


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"d{row[0]}-eps{row[1]}")
def test_gaussian_table(row):
    d, epsilon, *expected = row
    cov0, cov1 = table_covariances(d)
    bridge = gk.bridge.gaussian(np.zeros(d), cov0, np.ones(d), cov1, epsilon)
    scale = bridge.potential.scale.dense(d)[0]
    cross = cov0 @ scale
    logdet = jnp.linalg.slogdet(scale)[1]
    square = d + jnp.trace(cov0 + cov1 - cross - cross.T)  # E |X1 - X0|^2, the means differ by one in each coordinate
    kl = -0.5 * logdet - 0.5 * d + square / (2 * epsilon)
    information = 0.5 * (jnp.linalg.slogdet(cov1)[1] - d * jnp.log(epsilon) - logdet)
    got = [jnp.trace(scale), logdet, jnp.trace(cross), kl, 0.5 * square + epsilon * information, information]
    # The table has ten digits.
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-9)
    x = jr.normal(jr.key(0), (20, d))
    for t, mean, cov in ((0.0, 0.0, cov0), (1.0, 1.0, cov1)):
        law = dist.MultivariateNormal(jnp.full(d, mean), cov)
        np.testing.assert_allclose(bridge.marginal_log_prob(t, x), law.log_prob(x), rtol=1e-8)


def test_gaussian_scalar_case_and_drift_energy():
    bridge = gk.bridge.gaussian(jnp.array([-0.1]), jnp.ones(1), jnp.array([0.1]), jnp.ones(1), 1.0)
    scale = bridge.potential.scale.dense(1)[0, 0, 0]
    np.testing.assert_allclose(scale, (np.sqrt(5) - 1) / 2, rtol=1e-14)
    square = 0.04 + 2 - 2 * scale
    kl = -0.5 * jnp.log(scale) - 0.5 + square / 2
    np.testing.assert_allclose(kl, 0.14257192378, rtol=1e-10)
    # KL of the path laws is half the energy of the drift: Gauss quadrature in time and space.
    nodes, weights = np.polynomial.legendre.leggauss(24)
    space, mass = np.polynomial.hermite_e.hermegauss(24)
    energy = 0.0
    for t, w in zip(0.5 * (nodes + 1), 0.5 * weights, strict=True):
        var = (1 - t) ** 2 + t**2 + t * (1 - t) * (2 * scale + 1)
        x = -0.1 + 0.2 * t + np.sqrt(var) * space[:, None]
        energy += w * float(jnp.sum(bridge.drift(t, x)[:, 0] ** 2 * mass / mass.sum()))
    np.testing.assert_allclose(0.5 * energy, kl, rtol=1e-10)


def test_gaussian_diagonal_equals_full():
    args = (jnp.zeros(3), jnp.array([0.5, 1.0, 2.0]), jnp.ones(3), jnp.array([1.0, 0.2, 3.0]))
    diagonal = gk.bridge.gaussian(*args, 0.3)
    full = gk.bridge.gaussian(args[0], jnp.diag(args[1]), args[2], jnp.diag(args[3]), 0.3)
    x = jr.normal(jr.key(0), (6, 3))
    t = jnp.linspace(0.0, 1.0, 6)
    for name in ("drift", "score", "probability_flow", "marginal_log_prob"):
        np.testing.assert_allclose(getattr(diagonal, name)(t, x), getattr(full, name)(t, x), rtol=1e-10, atol=1e-11)


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
    from genkit.bridge._closed_form import _product

    log_z = jax.nn.logsumexp(_product(pair.source, pair.target, pair.bridge.epsilon, 0.0)[0])
    np.testing.assert_allclose(jnp.exp(log_z), 0.14156886641978, rtol=1e-13)
    x = jnp.linspace(-6, 7, 400)[:, None]
    for t in (0.0, 0.3, 1.0):
        law = pair.marginal(t)
        np.testing.assert_allclose(pair.bridge.marginal_log_prob(t, x), law.log_prob(x), rtol=0, atol=1e-12)
        score = jax.vmap(jax.grad(law.log_prob))(x)
        np.testing.assert_allclose(pair.bridge.score(t, x), score, rtol=1e-10, atol=1e-10)


def test_mixture_pair_against_log_domain_sinkhorn_on_a_grid():
    """The plan recovered from its marginals alone by plain log-domain Sinkhorn: L1 error below 1e-12."""
    pair, epsilon = pair_1d(), 0.5
    grid = np.linspace(-10, 10, 641)
    log_h = np.log(grid[1] - grid[0])
    x = jnp.asarray(grid)[:, None]
    log_a, log_b = pair.marginal(0.0).log_prob(x) + log_h, pair.marginal(1.0).log_prob(x) + log_h
    kernel = -0.5 * (jnp.asarray(grid)[:, None] - jnp.asarray(grid)) ** 2 / epsilon

    @jax.jit
    def solve(log_a, log_b):
        def sweep(g, _):
            f = -jax.nn.logsumexp(kernel + g + log_b, 1)
            return -jax.nn.logsumexp(kernel + (f + log_a)[:, None], 0), None

        g, _ = jax.lax.scan(sweep, jnp.zeros(641), length=400)
        f = -jax.nn.logsumexp(kernel + g + log_b, 1)
        return jnp.exp(kernel + (f + log_a)[:, None] + g + log_b)

    # The log-plan is a sum of functions of one end and the kernel.
    phi, hatphi = pair.bridge.potential.log_value(x, 1.0), pair.bridge.backward.log_value(x, 1.0)
    plan = jnp.exp(hatphi[:, None] + kernel - 0.5 * jnp.log(2 * jnp.pi * epsilon) + phi + 2 * log_h)
    assert float(jnp.abs(solve(log_a, log_b) - plan).sum()) < 1e-12


@pytest.mark.parametrize("kind", FAMILIES)
def test_paths_telescope_and_transitions_compose(kind):
    bridge = gk.bridge.Bridge(random_potential(kind, epsilon=0.4))
    ts = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])
    xs = bridge.sample(jnp.ones((6, 3)), ts, key=jr.key(0))
    np.testing.assert_allclose(xs[:, 0], 1.0, atol=1e-14)
    steps = [bridge.transition_log_prob(ts[i], xs[:, i], ts[i + 1], xs[:, i + 1]) for i in range(4)]
    np.testing.assert_allclose(bridge.path_log_prob(ts, xs), sum(steps), rtol=1e-12, atol=1e-11)
    plan = bridge.transition_log_prob(0.0, xs[:, 0], 1.0, xs[:, -1])
    np.testing.assert_allclose(plan, bridge.coupling(xs[:, 0]).log_prob(xs[:, -1]), rtol=0, atol=1e-10)


def test_transition_is_a_density_and_obeys_chapman_kolmogorov():
    bridge = pair_1d().bridge
    grid = jnp.linspace(-12, 12, 4001)[:, None]
    h = grid[1, 0] - grid[0, 0]
    x, y = jnp.array([0.4]), jnp.array([1.1])
    first = jnp.exp(bridge.transition_log_prob(0.1, x, 0.6, grid))
    np.testing.assert_allclose(first.sum() * h, 1.0, rtol=1e-12)
    second = jnp.exp(bridge.transition_log_prob(0.6, grid, 0.95, y))
    expected = jnp.exp(bridge.transition_log_prob(0.1, x, 0.95, y))
    np.testing.assert_allclose((first * second).sum() * h, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_sampler_agrees_with_the_plan(kind):
    """Mean and covariance of exact draws, from time 0 and restarted midway, against the end-point posterior."""
    potential = random_potential(kind, epsilon=0.6)
    bridge = gk.bridge.Bridge(potential)
    x = jnp.array([0.2, -0.4, 1.0])
    many, end = jnp.broadcast_to(x, (30_000, 3)), jnp.array([1.0])
    sample = jax.jit(lambda b, t: b.sample(many, end, start=t, key=jr.key(1))[:, 0])
    for start in (0.0, 0.6):
        draws = sample(bridge, start)
        logits, means = potential.endpoint(x, start)
        w = jax.nn.softmax(logits)
        left = (1 - start) * jnp.eye(3) + start * potential.scale.dense(3)
        inner = jnp.einsum("k,kde->de", w, potential.scale.dense(3) @ jnp.linalg.inv(left))
        mean = w @ means
        spread = jnp.einsum("k,kd,ke->de", w, means - mean, means - mean)
        assert_mean(draws, mean)
        assert_covariance(draws, 0.6 * (1 - start) * inner + spread)
    law = bridge.coupling(x)
    np.testing.assert_allclose(
        law.mean,
        potential.center
        + jax.nn.softmax(potential.endpoint(x, 0.0)[0]) @ (potential.endpoint(x, 0.0)[1] - potential.center),
        rtol=1e-12,
    )


def test_components_of_a_coupling_have_covariances():
    x = jnp.zeros((2, 3))
    for kind in ("full", "lowrank"):
        potential = random_potential(kind)
        covariance = potential.coupling(x).component_distribution.covariance_matrix
        expected = jnp.broadcast_to(potential.epsilon * potential.scale.dense(3), covariance.shape)
        np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12)
    for kind in ("iso", "diag"):
        potential = random_potential(kind)
        variance = potential.coupling(x).component_distribution.variance
        expected = potential.epsilon * jnp.diagonal(potential.scale.dense(3), axis1=-2, axis2=-1)
        np.testing.assert_allclose(variance, jnp.broadcast_to(expected, variance.shape), rtol=1e-12)


def test_restarting_and_grids_do_not_change_the_law():
    """The state at one time has the same law whatever other times are on the grid."""
    bridge = pair_1d().bridge
    x0 = jnp.broadcast_to(jnp.array([-0.5]), (40_000, 1))
    fine = bridge.sample(x0, jnp.linspace(0.1, 1.0, 10), key=jr.key(0))[:, 4]
    coarse = bridge.sample(x0, jnp.array([0.5]), key=jr.key(1))[:, 0]
    assert_same_mean(jnp.concatenate([fine, fine**2], 1), jnp.concatenate([coarse, coarse**2], 1))


def test_reverse_of_known_source():
    pair = pair_1d()
    back = pair.bridge.reverse()
    x, y = jnp.array([[0.3], [-1.0]]), jnp.array([[0.5], [2.0]])
    forward = pair.marginal(0.0).log_prob(x) + pair.bridge.transition_log_prob(0.0, x, 1.0, y)
    backward = pair.marginal(1.0).log_prob(y) + back.transition_log_prob(0.0, y, 1.0, x)
    np.testing.assert_allclose(forward, backward, rtol=0, atol=1e-12)
    np.testing.assert_allclose(back.drift(0.3, x), pair.bridge.backward_drift(0.7, x), rtol=1e-12)
    np.testing.assert_allclose(back.reverse().drift(0.3, x), pair.bridge.drift(0.3, x), rtol=1e-12)


def test_probability_flow_transports_the_marginals():
    """Continuity equation: d_t log p + div u + u . score = 0."""
    pair = pair_1d()
    x, t = jnp.array([0.7]), 0.4
    rate = jax.grad(lambda t: pair.bridge.marginal_log_prob(t, x))(t)
    flow = lambda x: pair.bridge.probability_flow(t, x)
    divergence = jnp.trace(jax.jacfwd(flow)(x))
    np.testing.assert_allclose(rate + divergence + flow(x) @ pair.bridge.score(t, x), 0.0, atol=1e-11)


def test_source_samples_give_marginals_and_a_reverse():
    pair = pair_1d()
    x0, _ = pair.sample(4000, key=jr.key(0))
    bridge = gk.bridge.Bridge(pair.bridge.potential).with_source(x0)
    x = jnp.linspace(-3, 4, 8)[:, None]
    for t in (0.2, 1.0):
        empirical = bridge.potential.log_value(x, t) + jax.nn.logsumexp(
            -0.5 * (x - x0[:, 0]) ** 2 / (0.5 * t)
            - 0.5 * jnp.log(2 * jnp.pi * 0.5 * t)
            - bridge.potential.log_value(x0, 0.0)
            - jnp.log(4000),
            axis=1,
        )
        np.testing.assert_allclose(bridge.marginal_log_prob(t, x), empirical, rtol=0, atol=1e-10)
    ends = bridge.reverse().sample(jnp.array([0.5]), jnp.array([1.0]), key=jr.key(1))
    assert float(jnp.abs(x0 - ends[0]).min()) < 1e-12


def test_distribution_and_measure():
    pair = pair_1d()
    law = pair.bridge.as_distribution(pair.marginal(0.0))
    assert law.event_shape == (2, 1)
    draws = law.sample(jr.key(0), (5,))
    np.testing.assert_allclose(law.log_prob(draws), pair.log_plan(draws[:, 0], draws[:, 1]), rtol=0, atol=1e-11)
    value, log_density = pair.bridge.as_measure(pair.marginal(0.0), jnp.array([0.0, 0.5, 1.0])).sample(key=jr.key(1))
    assert value.shape == (3, 1) and np.isfinite(log_density)
    # A pytree like any numpyro law, so it crosses jit, and a site like any other.
    assert jnp.isfinite(jax.jit(lambda law, x: law.log_prob(x))(law, draws[0]))
    import numpyro

    def model():
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(x[1, 0], 0.1), obs=1.0)

    density, _ = numpyro.infer.util.log_density(model, (), {}, {"x": draws[0]})
    expected = law.log_prob(draws[0]) + dist.Normal(draws[0, 1, 0], 0.1).log_prob(1.0)
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
    gradient = jax.grad(lambda p: gk.bridge.Bridge(p).path_log_prob(jnp.array([0.0, 1.0]), x))(pair.bridge.potential)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
