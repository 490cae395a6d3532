"""Nested measures against enumeration: hierarchical guides (G2), SIR and SMC densities, flows."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from vi_golden import g1_model

from genkit import vi


pytestmark = pytest.mark.usefixtures("x64")


ZERO = np.zeros(3)


def hierarchical(grad, s=ZERO):
    def guide():
        u = vi.sample("u", dist.Categorical(logits=jnp.array([0.1, -0.2, 0.3]) + s[0] * jnp.arange(3)), grad=grad)
        a = vi.sample("a", dist.Bernoulli(logits=jnp.array([-1.0, 0.5, 1.0])[u] + s[1]), grad=grad)
        logits = jnp.array([0.2, -0.8, 0.4])[u] + (0.6 + s[2]) * a
        vi.sample("b", dist.Bernoulli(logits=logits), grad=grad)

    return vi.program(guide)()


def uniform(grad):
    return vi.program(lambda: vi.sample("u", dist.Categorical(probs=jnp.ones(3) / 3), grad=grad))()


def summed_out(size, grad=None, s=ZERO):
    return vi.marginal(hierarchical(grad, s), ["a", "b"], vi.SIR(size, lambda kept: uniform(grad)))


STATES = [(a, b) for a in (0, 1) for b in (0, 1)]


def joint_table(s):
    """log q(u, a, b), shape (3, 4), and log p(a, b), shape (4,), written out."""
    log_u = jax.nn.log_softmax(jnp.array([0.1, -0.2, 0.3]) + s[0] * jnp.arange(3))
    rows = []
    for u in range(3):
        row = []
        for a, b in STATES:
            log_a = dist.Bernoulli(logits=jnp.array([-1.0, 0.5, 1.0])[u] + s[1]).log_prob(a)
            log_b = dist.Bernoulli(logits=jnp.array([0.2, -0.8, 0.4])[u] + (0.6 + s[2]) * a).log_prob(b)
            row.append(log_u[u] + log_a + log_b)
        rows.append(jnp.stack(row))
    log_p = [vi.program(g1_model)().log_density({"a": a, "b": b}) for a, b in STATES]
    return jnp.stack(rows), jnp.stack(log_p)


def brute_bound(s, size, particles):
    """The bound of a hierarchical guide with M draws of u per weight and K weights, over every outcome."""
    log_q, log_p = joint_table(s)
    shape = (3, 4) + (3,) * (size - 1)  # of one particle: its own u, its state, further draws of u
    index = np.indices(shape).reshape(len(shape), -1)
    u, state, others = index[0], index[1], index[2:]
    log_prob = log_q[u, state] - (size - 1) * np.log(3.0)
    ratios = jnp.stack([log_q[i, state] + np.log(3.0) for i in (u, *others)])
    log_w = log_p[state] - (jax.nn.logsumexp(ratios, 0) - np.log(size))
    grid = np.indices((index.shape[1],) * particles).reshape(particles, -1)
    bound = jax.nn.logsumexp(log_w[grid], 0) - np.log(particles)
    return jnp.sum(jnp.exp(log_prob[grid].sum(0)) * bound)


@pytest.mark.parametrize(("size", "want"), [(1, -2.490123618014), (2, -2.424879511805)])
@pytest.mark.parametrize("grad", [None, vi.Score()])
def test_hierarchical_bounds(size, want, grad):
    """HVI and IWHVI as compositions: the value of the table, the gradient of the sum over all outcomes."""
    fn = lambda s: vi.exact(lambda: vi.elbo(vi.program(g1_model)(), summed_out(size, grad, s)))()
    value, gradient = jax.jit(jax.value_and_grad(fn))(jnp.zeros(3))
    np.testing.assert_allclose(value, want, atol=1e-10)
    truth = jax.jit(jax.grad(lambda s: brute_bound(s, size, 1)))(jnp.zeros(3))
    np.testing.assert_allclose(gradient, truth, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_doubly_weighted_hierarchical_bound(size):
    """DIWHVI: the importance-weighted bound of a guide with a site summed out, two weights."""
    score = vi.Score()
    fn = lambda s: vi.exact(lambda: vi.iwelbo(vi.program(g1_model)(), summed_out(size, score, s), 2))()
    got = jax.jit(jax.value_and_grad(fn))(jnp.zeros(3))
    want = jax.jit(jax.value_and_grad(lambda s: brute_bound(s, size, 2)))(jnp.zeros(3))
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


# --- the promise of estimated densities ---------------------------------------------------------------------------


def contract_of(measure, states):
    """By enumeration, for each state z: q(z), E[1/w | z] q(z) and E[w] of weighing z."""
    is_state = lambda value, state: jnp.all(jnp.stack([value[k] == v for k, v in state.items()])) * 1.0

    def drawn(state):
        return is_state(vi.draw(measure)[0], state)

    def inverse(state):
        value, log_w = vi.draw(measure)
        return is_state(value, state) * jnp.exp(-log_w)

    ask = lambda fn: np.array([vi.exact(fn)(state) for state in states])
    return ask(drawn), ask(inverse), ask(lambda state: jnp.exp(vi.log_density(measure, state)))


def assert_contract(measure, states):
    law, inverse, density = contract_of(measure, states)
    np.testing.assert_allclose(law.sum(), 1.0, atol=1e-12)
    np.testing.assert_allclose(inverse, 1.0, atol=1e-12)  # E[1/w | z] = 1/q(z)
    np.testing.assert_allclose(density, law, atol=1e-12)  # E[w] = q(z)


AB = [{"a": jnp.array(a), "b": jnp.array(b)} for a, b in STATES]


@pytest.mark.slow
def test_marginal_keeps_the_promise():
    assert_contract(summed_out(2, vi.Score()), AB)


@pytest.mark.slow
def test_resampling_keeps_the_promise():
    assert_contract(sir(T, 2, vi.Score()), AB)


@pytest.mark.slow
def test_sequential_monte_carlo_keeps_the_promise():
    _, measure = chain_smc(2)
    assert_contract(measure, [{"z0": jnp.array(i), "z1": jnp.array(j)} for i in (0, 1) for j in (0, 1)])


T = np.array([0.2, -0.3, 0.5])


def sir(t, size, grad=None):
    def guide():
        a = vi.sample("a", dist.Bernoulli(logits=t[0]), grad=grad)
        vi.sample("b", dist.Bernoulli(logits=t[1] + t[2] * a), grad=grad)

    return vi.normalize(vi.program(g1_model)(), vi.SIR(size, vi.program(guide)()))


@pytest.mark.slow
def test_sir_density_is_the_law_of_its_draws():
    measure = sir(T, 3)
    law, density = [], vi.exact(lambda value: jnp.exp(vi.log_density(measure, value)))
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        value = {"a": jnp.array(a), "b": jnp.array(b)}
        law.append(density(value))
    np.testing.assert_allclose(law, (0.499757, 0.178793, 0.244526, 0.076925), atol=1e-6)


def test_elbo_of_sir_is_the_importance_weighted_bound():
    """ELBO with q replaced by SIR(2, q): value and gradient of IW2, index and particles enumerated or scored."""
    for grad in (None, vi.Score()):
        fn = lambda t, grad=grad: vi.exact(lambda: vi.elbo(vi.program(g1_model)(), sir(t, 2, grad)))()
        value, gradient = jax.jit(jax.value_and_grad(fn))(T)
        np.testing.assert_allclose(value, -1.828724763866, atol=1e-10)
        np.testing.assert_allclose(gradient, (-0.328574, -0.292226, -0.108152), atol=6e-7)


def chain(length, observations):
    def model():
        z = jnp.array(0)
        for t in range(length):
            z = numpyro.sample(f"z{t}", dist.Bernoulli(0.2 + 0.6 * z))
            numpyro.sample(f"y{t}", dist.Normal(2.0 * z, 1.0), obs=observations[t])

    return vi.program(model)()


def chain_smc(size):
    y = (0.3, 1.7)
    score = vi.Score()  # one run of everything, so that few outcomes have to be enumerated
    first = vi.program(lambda: vi.sample("z0", dist.Bernoulli(0.4), grad=score))()
    second = lambda old: vi.program(lambda: vi.sample("z1", dist.Bernoulli(0.3 + 0.4 * old["z0"]), grad=score))()
    return chain(2, y), vi.normalize(chain(2, y), vi.SMC(size, (first, second), (chain(1, y),), score))


@pytest.mark.slow
def test_smc_evidence_is_unbiased_and_density_normalized():
    target, measure = chain_smc(2)
    states = [{"z0": jnp.array(i), "z1": jnp.array(j)} for i in (0, 1) for j in (0, 1)]
    evidence = sum(jnp.exp(target.log_density(s)) for s in states)

    def estimate():
        value, log_q = vi.draw(measure)
        return jnp.exp(target.log_density(value) - log_q)

    np.testing.assert_allclose(vi.exact(estimate)(), evidence, rtol=1e-12)
    density = vi.exact(lambda state: jnp.exp(vi.log_density(measure, state)))
    np.testing.assert_allclose(sum(density(s) for s in states), 1.0, atol=1e-12)


def test_flow_is_the_transformed_law():
    transform = dist.transforms.AffineTransform(1.0, 2.0)
    measure = vi.flow(
        dist.Normal(0.0, 1.0), dist.transforms.ComposeTransform([transform, dist.transforms.ExpTransform()])
    )
    value, log_density = measure.sample(key=jax.random.key(0))
    want = dist.LogNormal(1.0, 2.0).log_prob(value)
    np.testing.assert_allclose(log_density, want, rtol=1e-12)
    np.testing.assert_allclose(measure.log_density(value), want, rtol=1e-12)


def test_outside_expectations_nested_measures_draw_with_a_key():
    value, log_density = sir(T, 3).sample(key=jax.random.key(1))
    assert set(value) == {"a", "b"}
    assert np.isfinite(log_density)
    with pytest.raises(TypeError, match="key"):
        sir(T, 3).log_density(value)
