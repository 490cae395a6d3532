"""Objectives against closed forms, quadrature and enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import stats
from vi_golden import T, g1_exact, g1_guide, g1_model

import genkit as gk
from genkit import vi


pytestmark = pytest.mark.usefixtures("x64")

EVIDENCE = -1.430758869508
POSTERIOR = np.array([0.73125126, 0.10032980, 0.14354233, 0.02487661])
STATES = [(0, 0), (0, 1), (1, 0), (1, 1)]


def posterior_weights():
    """The exact posterior of G1, to full precision."""
    log_joint = []
    for a, b in STATES:
        lp = dist.Bernoulli(0.3).log_prob(a) + dist.Bernoulli(0.2 + 0.5 * a).log_prob(b)
        log_joint.append(lp + dist.Normal(a + 2 * b, 1.0).log_prob(0.7))
    return jax.nn.softmax(jnp.stack(log_joint))


def g1_posterior():
    post = posterior_weights()
    pa = post[2] + post[3]
    a = vi.sample("a", dist.Bernoulli(pa))
    vi.sample("b", dist.Bernoulli(jnp.where(a == 1, post[3] / pa, post[1] / (post[0] + post[1]))))


def exact_of(objective, p, grad=None):
    def fn(t):
        q = vi.program(g1_guide(grad, grad))(t)
        return objective(p, q)

    return jax.value_and_grad(vi.exact(fn))(jnp.array(T))


@pytest.mark.parametrize(
    ("divergence", "value", "gradient"),
    [
        (gk.divergence.JensenShannon(), 0.142432575624, (0.086744, 0.076426, 0.025742)),
        (gk.divergence.SquaredHellinger(), 0.151295874518, (0.095717, 0.085008, 0.032300)),
        (gk.divergence.ForwardKL(), 0.554900323255, (0.381415, 0.321282, 0.067726)),
        (gk.divergence.ReverseKL(), EVIDENCE + 2.175770668812, (0.480279, 0.451320, 0.265749)),
    ],
)
@pytest.mark.parametrize("grad", [pytest.param(None, marks=pytest.mark.slow), vi.Score()])
def test_divergences_to_the_posterior(divergence, value, gradient, grad):
    p = vi.program(g1_posterior)()
    scale = 0.5 if "KL" not in type(divergence).__name__ else 1.0  # the usual halves of these two
    got = exact_of(lambda p, q: scale * vi.f_divergence(p, q, divergence), p, grad)
    np.testing.assert_allclose(got[0], value, atol=1e-7)
    np.testing.assert_allclose(got[1], gradient, atol=1e-6)


def test_upper_bound_by_its_unbiased_exponential():
    """exp(n CUBO) = E w^n has no logarithm outside the expectation: its estimate is unbiased."""
    square = gk.divergence.from_f(lambda r: r**2 - 1)
    value, gradient = exact_of(lambda p, q: vi.f_divergence(p, q, square), vi.program(g1_model)(), vi.Score())
    np.testing.assert_allclose(0.5 * np.log(1 + value), -1.035244976745, atol=1e-10)
    np.testing.assert_allclose(gradient / (2 * (1 + value)), (0.255582, 0.202806, 0.010167), atol=1e-6)
    root = gk.divergence.from_f(lambda r: 1 - r**0.5)
    value, gradient = exact_of(lambda p, q: vi.f_divergence(p, q, root), vi.program(g1_model)(), vi.Score())
    np.testing.assert_allclose(2 * np.log(1 - value), -1.758848171659, atol=1e-10)
    np.testing.assert_allclose(-2 * gradient / (1 - value), (-0.225559, -0.200324, -0.076116), atol=1e-6)


def test_model_phase_of_wake_sleep():
    """p-wake: the self-normalized estimate of the posterior mean of the model's score, by enumeration."""

    def model(s):
        a = numpyro.sample("a", dist.Bernoulli(logits=s[0]))
        b = numpyro.sample("b", dist.Bernoulli(logits=s[1] + a))
        numpyro.sample("y", dist.Normal(a + s[2] * b, 1.0), obs=0.7)

    def joint(s, state):
        a, b = state
        lp = dist.Bernoulli(logits=s[0]).log_prob(a) + dist.Bernoulli(logits=s[1] + a).log_prob(b)
        return lp + dist.Normal(a + s[2] * b, 1.0).log_prob(0.7)

    t, s = jnp.array(T), jnp.array([-0.4, 0.1, 1.5])
    log_q = jnp.stack(
        [
            dist.Bernoulli(logits=t[0]).log_prob(a) + dist.Bernoulli(logits=t[1] + t[2] * a).log_prob(b)
            for a, b in STATES
        ]
    )
    scores = jax.jacobian(lambda s: jnp.stack([joint(s, state) for state in STATES]))(s)
    log_p = jnp.stack([joint(s, state) for state in STATES])
    want = jnp.zeros(3)
    for i in range(4):
        for j in range(4):
            w = jax.nn.softmax(jnp.stack([log_p[i] - log_q[i], log_p[j] - log_q[j]]))
            want = want + jnp.exp(log_q[i] + log_q[j]) * (w[0] * scores[i] + w[1] * scores[j])
    fn = lambda s, t: vi.wake_p(vi.program(model)(s), vi.program(g1_guide())(t), 2)
    by_model, by_guide = jax.grad(vi.exact(fn), (0, 1))(s, t)
    np.testing.assert_allclose(by_model, want, atol=1e-12)
    np.testing.assert_array_equal(by_guide, 0.0)  # weights and draws are detached


def test_sleep_phase():
    """E_p log q over latents drawn from the model: the cross entropy in closed form."""

    def prior():
        a = numpyro.sample("a", dist.Bernoulli(0.3))
        numpyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))

    def cross_entropy(t):
        probs = jnp.array([0.7 * 0.8, 0.7 * 0.2, 0.3 * 0.3, 0.3 * 0.7])
        log_q = [
            dist.Bernoulli(logits=t[0]).log_prob(a) + dist.Bernoulli(logits=t[1] + t[2] * a).log_prob(b)
            for a, b in STATES
        ]
        return jnp.sum(probs * jnp.stack(log_q))

    fn = lambda t: vi.sleep(vi.program(prior)(), vi.program(g1_guide())(t))
    got, want = jax.value_and_grad(vi.exact(fn))(jnp.array(T)), jax.value_and_grad(cross_entropy)(jnp.array(T))
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


# --- G3: the conjugate normal -------------------------------------------------------------------------------------


def g3_model():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=1.0)


def g3_guide(t):
    vi.sample("x", dist.Normal(t[0], jnp.exp(t[1])))


POINT = np.array([0.5, np.log(0.8)])
AT_POSTERIOR = np.array([0.8, 0.5 * np.log(0.2)])


def g3(objective, point, num):
    fn = lambda t, k: vi.E(lambda: objective(vi.program(g3_model)(), vi.program(g3_guide)(t)))(key=k)
    keys = jax.random.split(jax.random.key(5), num)
    return jax.jit(jax.vmap(lambda k: jax.value_and_grad(fn)(point, k)))(keys)


def g3_elbo(t):
    m, v = t[0], jnp.exp(2 * t[1])
    prior = -0.5 * (m**2 + v) - 0.5 * jnp.log(2 * jnp.pi)
    likelihood = -0.5 * ((1 - m) ** 2 + v) / 0.25 - 0.5 * jnp.log(2 * jnp.pi * 0.25)
    return prior + likelihood + 0.5 * jnp.log(2 * jnp.pi * jnp.e * v)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"stick_the_landing": True}, {"analytic_kl": True}])
def test_normal_bound(options):
    want = jax.value_and_grad(g3_elbo)(POINT)
    np.testing.assert_allclose(want[0], -2.173934903959, atol=1e-11)
    stats.assert_mean(g3(lambda p, q: vi.elbo(p, q, **options), POINT, 20_000), want)


def test_sticking_the_landing_has_no_noise_at_the_posterior():
    value, slopes = g3(lambda p, q: vi.elbo(p, q, stick_the_landing=True), AT_POSTERIOR, 16)
    np.testing.assert_allclose(value, -1.430510308862, atol=1e-11)
    np.testing.assert_allclose(slopes, 0.0, atol=1e-12)
    _, plain = g3(vi.elbo, AT_POSTERIOR, 16)
    assert np.std(plain[:, 1]) > 0.1


@pytest.mark.slow
def test_doubly_reparametrized_bound():
    """The gradient of the two-particle bound, with half the standard deviation of the pathwise one."""
    slopes = {}
    for estimator in ("pathwise", "dreg"):
        draws = g3(lambda p, q, e=estimator: vi.iwelbo(p, q, 2, estimator=e), POINT, 40_000)
        stats.assert_mean(draws[0], -1.65589, sd=np.std(draws[0]) + 2e-5 * 200)
        slopes[estimator] = np.asarray(draws[1])
        error = stats.z_score(2) * slopes[estimator].std(0) / 200 + 4e-5  # the reference's own quadrature error
        assert np.all(np.abs(slopes[estimator].mean(0) - np.array([0.49437, -0.61363])) < error)
    assert np.all(slopes["dreg"].std(0) < 0.65 * slopes["pathwise"].std(0))


# --- G4: the coin -------------------------------------------------------------------------------------------------


def test_coin_bound_is_the_evidence_at_the_posterior():
    flips = jnp.array([1] * 6 + [0] * 4)

    def model():
        f = numpyro.sample("f", dist.Beta(10.0, 10.0))
        with numpyro.plate("n", 10):
            numpyro.sample("x", dist.Bernoulli(f), obs=flips)

    def fn(t, key):
        q = vi.program(lambda: vi.sample("f", dist.Beta(t[0], t[1])))()
        return vi.E(lambda: vi.elbo(vi.program(model)(), q, stick_the_landing=True))(key=key)

    value, slope = jax.jit(jax.value_and_grad(fn))(jnp.array([16.0, 14.0]), jax.random.key(0))
    np.testing.assert_allclose(value, -7.069374461046, atol=1e-10)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


# --- leave-one-out over particles ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_leave_one_out_over_particles_cuts_the_noise():
    def spread(estimator, grad):
        def fn(t, k):
            q = vi.program(g1_guide(grad, grad))(t)
            return vi.E(lambda: vi.iwelbo(vi.program(g1_model)(), q, 3, estimator=estimator))(key=k)

        keys = jax.random.split(jax.random.key(2), 20_000)
        return np.asarray(jax.jit(jax.vmap(lambda k: jax.grad(fn)(jnp.array(T), k)))(keys))

    slopes = spread("vimco", None)
    stats.assert_mean(slopes, np.array([-0.239230, -0.204839, -0.050375]))
    assert np.all(slopes.std(0) < (0.45, 0.42, 0.31))  # plain scores: 2.02, 2.04, 1.56


@pytest.mark.slow
def test_per_member_bounds_of_a_plate():
    """With `plate` the logarithm is inside the sum over members: two members, two particles, enumerated by hand."""
    y = jnp.array([0.3, 1.4])

    def model():
        with numpyro.plate("n", 2):
            b = numpyro.sample("b", dist.Bernoulli(0.4))
            numpyro.sample("y", dist.Normal(2.0 * b, 1.0), obs=y)

    def guide(t):
        with numpyro.plate("n", 2):
            vi.sample("b", dist.Bernoulli(logits=t), grad=vi.Score())

    def truth(t):
        total = 0.0
        for n in range(2):
            q = jnp.stack([1 - jax.nn.sigmoid(t[n]), jax.nn.sigmoid(t[n])])
            w = jnp.array([0.6, 0.4]) * jnp.exp(dist.Normal(jnp.array([0.0, 2.0]), 1.0).log_prob(y[n])) / q
            total = total + jnp.sum(q[:, None] * q[None, :] * jnp.log((w[:, None] + w[None, :]) / 2))
        return total

    t = jnp.array([0.2, -0.3])
    fn = lambda t: vi.iwelbo(vi.program(model)(), vi.program(guide)(t), 2, plate="n")
    got, want = jax.value_and_grad(vi.exact(fn))(t), jax.value_and_grad(truth)(t)
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


@pytest.mark.slow
def test_wake_phase_of_the_guide_with_five_particles():
    _, gradient = g1_exact(lambda p, q: -vi.wake_q(p, q, 5))
    np.testing.assert_allclose(gradient, (0.294881, 0.261717, 0.093887), atol=1e-6)
