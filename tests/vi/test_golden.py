"""Golden tables G1-G5: values and expected gradients of every objective and admissible strategy mix, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from vi_golden import T, g1_exact, g1_guide, g1_model

from genkit import vi
from genkit.vi import MVD, RLOO, DisARM, Enum, Importance, LocalExpectation, Score


pytestmark = pytest.mark.usefixtures("x64")

ELBO = (-2.175770668812, (-0.480279, -0.451320, -0.265749))
IW2 = (-1.828724763866, (-0.328574, -0.292226, -0.108152))
IW3 = (-1.691186620092, (-0.239230, -0.204839, -0.050375))


def check(got, want):
    value, gradient = got
    np.testing.assert_allclose(value, want[0], atol=1e-10)
    np.testing.assert_allclose(gradient, want[1], atol=6e-7)


def brute(functional, size):
    """The exact bound by summing over all states of all particles, independent of the library's machinery."""
    states = [(a, b) for a in (0, 1) for b in (0, 1)]

    def fn(t):
        log_q, log_w = [], []
        for a, b in states:
            lq = dist.Bernoulli(logits=t[0]).log_prob(a) + dist.Bernoulli(logits=t[1] + t[2] * a).log_prob(b)
            lp = dist.Bernoulli(0.3).log_prob(a) + dist.Bernoulli(0.2 + 0.5 * a).log_prob(b)
            log_q.append(lq)
            log_w.append(lp + dist.Normal(a + 2 * b, 1.0).log_prob(0.7) - lq)
        log_q, log_w = jnp.stack(log_q), jnp.stack(log_w)
        index = np.indices((4,) * size).reshape(size, -1)
        return jnp.sum(jnp.exp(log_q[index].sum(0)) * functional(log_w[index]))

    return jax.jit(jax.value_and_grad(fn))(jnp.array(T))


def assert_same(got, want, atol=1e-12):
    np.testing.assert_allclose(got[0], want[0], atol=atol)
    np.testing.assert_allclose(got[1], want[1], atol=atol)


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
MIXES = [
    (None, None),
    slow(Enum(), Enum()),
    (Score(), Score()),
    slow(RLOO(2), RLOO(2)),
    slow(Score(), Enum()),
    slow(Enum(), Score()),
    slow(RLOO(2), Enum()),
    slow(RLOO(3), Score()),
    slow(LocalExpectation(), Score()),
    (MVD(), MVD()),
    (DisARM(), Enum()),
    slow(Score(1.5), MVD()),
    (Importance(dist.Bernoulli(0.5)), Score(-2.0)),
]


@pytest.mark.parametrize(("grad_a", "grad_b"), MIXES)
def test_elbo_of_every_mix_is_exact(grad_a, grad_b):
    got = g1_exact(vi.elbo, grad_a, grad_b)
    check(got, ELBO)
    assert_same(got, brute(lambda w: w[0], 1))


@pytest.mark.parametrize(("grad_a", "grad_b"), [(Score(), Score()), (Score(), Enum())])
def test_importance_weighted_bound_of_two(grad_a, grad_b):
    got = g1_exact(lambda p, q: vi.iwelbo(p, q, 2), grad_a, grad_b)
    check(got, IW2)
    assert_same(got, brute(lambda w: jax.nn.logsumexp(w, 0) - jnp.log(w.shape[0]), 2))


@pytest.mark.parametrize("estimator", [slow("auto"), "vimco"])
def test_importance_weighted_bound_of_three(estimator):
    got = g1_exact(lambda p, q: vi.iwelbo(p, q, 3, estimator=estimator))
    check(got, IW3)
    assert_same(got, brute(lambda w: jax.nn.logsumexp(w, 0) - jnp.log(w.shape[0]), 3))


@pytest.mark.slow
def test_importance_weighted_bound_of_five():
    got = g1_exact(lambda p, q: vi.iwelbo(p, q, 5))
    check(got, (-1.578324794425, (-0.146685, -0.120876, -0.016717)))


@pytest.mark.slow
def test_renyi_and_cubo():
    half = g1_exact(lambda p, q: vi.renyi(p, q, 0.5, 2))
    check(half, (-1.971710377463, (-0.380071, -0.346689, -0.162612)))
    upper = g1_exact(lambda p, q: vi.cubo(p, q, 2, 2))
    assert_same(upper, brute(lambda w: jax.nn.logsumexp(2 * w, 0) / 2 - jnp.log(2) / 2, 2))
    assert_same(g1_exact(lambda p, q: vi.renyi(p, q, 1.0, 2)), brute(lambda w: w.mean(0), 2))


def test_forward_kl_from_the_known_posterior():
    post = jnp.array([0.73125126, 0.10032980, 0.14354233, 0.02487661])

    def posterior():
        pa = post[2] + post[3]
        a = vi.sample("a", dist.Bernoulli(pa))
        vi.sample("b", dist.Bernoulli(jnp.where(a == 1, post[3] / pa, post[1] / (post[0] + post[1]))))

    def fn(t):
        q = vi.program(g1_guide())(t)
        return vi.exact(lambda: vi.forward_kl(vi.program(posterior)(), q))()

    value, gradient = jax.jit(jax.value_and_grad(fn))(jnp.array(T))
    np.testing.assert_allclose(value, 0.554900323255, atol=1e-7)
    np.testing.assert_allclose(gradient, (0.381415, 0.321282, 0.067726), atol=1e-6)


@pytest.mark.parametrize(("size", "want"), [slow(1, (0, 0, 0)), (2, (0.155750, 0.147105, 0.086540))])
def test_wake_phase_of_the_guide(size, want):
    _, gradient = g1_exact(lambda p, q: -vi.wake_q(p, q, size))
    np.testing.assert_allclose(gradient, want, atol=1e-6)


def test_hessian_of_the_enumerated_bound_is_exact():
    def fn(t):
        p, q = vi.program(g1_model)(), vi.program(g1_guide())(t)
        return vi.E(lambda: vi.elbo(p, q))(key=jax.random.key(0))

    def plain(t):
        states = [(a, b) for a in (0, 1) for b in (0, 1)]
        total = 0.0
        for a, b in states:
            lq = dist.Bernoulli(logits=t[0]).log_prob(a) + dist.Bernoulli(logits=t[1] + t[2] * a).log_prob(b)
            lp = dist.Bernoulli(0.3).log_prob(a) + dist.Bernoulli(0.2 + 0.5 * a).log_prob(b)
            total += jnp.exp(lq) * (lp + dist.Normal(a + 2 * b, 1.0).log_prob(0.7) - lq)
        return total

    t = jnp.array(T)
    np.testing.assert_allclose(jax.jit(jax.hessian(fn))(t), jax.jit(jax.hessian(plain))(t), atol=1e-12)


# --- G5: loops and branches ---------------------------------------------------------------------------------------


def flips(strategy, length):
    def fn(p):
        def body(carry, _):
            return carry + vi.sample("b", dist.Bernoulli(p), grad=strategy), None

        return vi.scan(body, jnp.zeros(()), None, length=length)[0] ** 2

    return fn


@pytest.mark.parametrize(
    "strategy", [Score(), slow(RLOO(2)), slow(LocalExpectation()), MVD(), slow(Enum()), slow(None)]
)
def test_scan_is_exact_for_every_strategy(strategy):
    n, p = 3, 0.3
    value, slope = jax.jit(jax.value_and_grad(vi.exact(flips(strategy, n))))(p)
    np.testing.assert_allclose(value, n * p * (1 - p) + n * n * p * p, atol=1e-12)
    np.testing.assert_allclose(slope, n * (1 - 2 * p) + 2 * n * n * p, atol=1e-12)


@pytest.mark.slow
def test_scan_with_dependent_steps_is_exact():
    """The law of a step depends on earlier draws: a replay must share everything before the step it changes."""

    def fn(strategy):
        def program(p):
            def body(carry, _):
                b = vi.sample("b", dist.Bernoulli(p + 0.4 * carry), grad=strategy)
                return 0.5 * carry + 0.5 * b, b

            last, bs = vi.scan(body, jnp.zeros(()), None, length=3)
            return last**2 + jnp.sin(jnp.sum(bs) * p)

        return program

    want = jax.jit(jax.value_and_grad(vi.exact(fn(Score()))))(0.3)
    for strategy in (LocalExpectation(), MVD()):
        assert_same(jax.jit(jax.value_and_grad(vi.exact(fn(strategy))))(0.3), want)


def test_unrolled_hessian():
    def fn(p):
        return sum(vi.sample(f"b{i}", dist.Bernoulli(p)) for i in range(4)) ** 2

    assert jnp.allclose(jax.jit(jax.hessian(lambda p: vi.E(fn)(p, key=jax.random.key(0))))(0.3), 24.0, atol=1e-12)


@pytest.mark.parametrize("strategy", [slow(Score()), slow(LocalExpectation()), MVD(), slow(RLOO(2))])
def test_vmap_lanes_are_exact(strategy):
    def fn(p):
        draws = vi.vmap(lambda w: w * vi.sample("b", dist.Bernoulli(p * w), grad=strategy))(jnp.array([0.5, 0.8]))
        return jnp.sum(draws) ** 2

    def truth(p):
        q = jnp.array([0.5, 0.8]) * p
        mean = jnp.sum(jnp.array([0.5, 0.8]) * q)
        return mean**2 + jnp.sum(jnp.array([0.25, 0.64]) * q * (1 - q))

    assert_same(jax.jit(jax.value_and_grad(vi.exact(fn)))(0.6), jax.value_and_grad(truth)(0.6))


@pytest.mark.parametrize("strategy", [Score(), slow(LocalExpectation()), slow(RLOO(2))])
def test_branches_are_exact(strategy):
    def fn(p):
        b = vi.sample("b", dist.Bernoulli(p), grad=Enum())
        x = vi.cond(
            b == 1,
            lambda: vi.sample("x", dist.Bernoulli(p**2), grad=strategy) + 0.0,
            lambda: 2.0 * vi.sample("x", dist.Bernoulli(1 - p), grad=strategy),
        )
        return (x + p) ** 2

    def truth(p):
        one = p**2 * (1 + p) ** 2 + (1 - p**2) * p**2
        two = (1 - p) * (2 + p) ** 2 + p * p**2
        return p * one + (1 - p) * two

    assert_same(jax.jit(jax.value_and_grad(vi.exact(fn)))(0.3), jax.value_and_grad(truth)(0.3))


def z_scores(fn, point, truth, n):
    keys = jax.random.split(jax.random.key(7), n)
    values, slopes = jax.jit(jax.vmap(lambda k: jax.value_and_grad(lambda p: vi.E(fn)(p, key=k))(point)))(keys)
    return [(np.mean(x) - t) / (np.std(x) / np.sqrt(n)) for x, t in zip((values, slopes), truth, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "n"), [(Score(), 100_000), (MVD(), 100_000), (LocalExpectation(), 100_000), (RLOO(2), 100_000)]
)
def test_scan_of_four_flips_by_draws(strategy, n):
    assert max(map(abs, z_scores(flips(strategy, 4), 0.3, (2.28, 11.2), n))) < 4


@pytest.mark.slow
def test_scan_of_normal_steps_by_draws():
    def fn(m):
        def body(carry, _):
            return carry + vi.sample("x", dist.Normal(m, 1.0)), None

        return vi.scan(body, jnp.zeros(()), None, length=4)[0] ** 2

    assert max(map(abs, z_scores(fn, 0.3, (5.44, 9.6), 100_000))) < 4


@pytest.mark.slow
@pytest.mark.key_reuse  # under the map over draws both branches are selected from, which the check takes for re-use
def test_branch_of_normals_by_draws():
    def fn(p):
        b = vi.sample("b", dist.Bernoulli(p))
        x = vi.cond(
            b == 1, lambda: vi.sample("x", dist.Normal(p, 1.0)), lambda: 2 * vi.sample("x", dist.Normal(p, 1.0))
        )
        return x**2

    assert max(map(abs, z_scores(fn, 0.3, ((0.09 + 1) * (4 - 0.9), -1.41), 100_000))) < 4
