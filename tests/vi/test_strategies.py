"""Every strategy against closed forms: enumeration where the draws are discrete, quadrature where they are not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import stats
from vi_golden import T, g1_exact, g1_guide, g1_model

from genkit import vi


pytestmark = pytest.mark.usefixtures("x64")

ELBO_GRADIENT = (-0.480279, -0.451320, -0.265749)


# --- measure-valued derivatives -----------------------------------------------------------------------------------


def bump(x):
    """Neither smooth nor continuous: only the law may be differentiated."""
    return x**2 + 2.0 * (x > 1.5)


LAWS = {
    "binomial": (lambda a: dist.Binomial(3, a), (0.4,), np.arange(4)),
    "poisson": (dist.Poisson, (1.3,), np.arange(60)),
    "geometric": (dist.GeometricProbs, (0.45,), np.arange(120)),
    "exponential": (dist.Exponential, (0.8,), None),
    "gamma": (dist.Gamma, (1.7, 0.9), None),
    "normal": (dist.Normal, (0.6, 1.1), None),
}


def expected(law, points):
    """E bump by summation, or by the trapezoid rule on a fine grid."""
    if points is not None:
        return jnp.sum(jnp.exp(law.log_prob(points)) * bump(points))
    left = jnp.linspace(-12.0, 1.5, 20001) if law.support is dist.constraints.real else jnp.linspace(1e-9, 1.5, 20001)
    right = jnp.linspace(1.5, 60.0, 60001)[1:]  # the jump of `bump` lies between the two
    total = 0.0
    for grid in (left, jnp.concatenate([jnp.array([1.5 + 1e-12]), right])):
        total = total + jnp.trapezoid(jnp.exp(law.log_prob(grid)) * bump(grid), grid)
    return total


def two_lanes(law_of, params):
    return law_of(*[jnp.stack([p, 0.7 * p]) for p in params])


def program_of(law_of, strategy):
    def fn(params):
        x = vi.sample("x", two_lanes(law_of, params), grad=strategy)
        return bump(x[0]) * (1.0 + x[1])

    return fn


def truth_of(law_of, points):
    def fn(params):
        first = law_of(*params)
        second = law_of(*[0.7 * p for p in params])
        return expected(first, points) * (1.0 + second.mean)

    return fn


def draws_of(fn, point, num):
    keys = jax.random.split(jax.random.key(3), num)
    return jax.jit(jax.vmap(lambda k: jax.value_and_grad(lambda p: vi.E(fn)(p, key=k))(point)))(keys)


@pytest.mark.parametrize("name", [n if n == "poisson" else pytest.param(n, marks=pytest.mark.slow) for n in LAWS])
def test_measure_valued_rules_on_vectors(name):
    law_of, params, points = LAWS[name]
    want = jax.jit(jax.value_and_grad(truth_of(law_of, points)))(params)
    draws = draws_of(program_of(law_of, vi.MVD()), params, 30_000)
    stats.assert_mean(draws, want)


COUNTS = [(lambda p: dist.Binomial(3, p), 4), (lambda p: dist.Binomial(2, logits=p), 3), (dist.Bernoulli, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("law_of", "size"), COUNTS)
def test_measure_valued_rules_of_counts_are_exact(law_of, size):
    def fn(p):
        x = vi.sample("x", law_of(p), grad=vi.MVD())
        return bump(x) * (1.0 + vi.sample("y", law_of(0.7 * p), grad=vi.MVD()))

    support = np.arange(size)
    want = jax.value_and_grad(lambda p: expected(law_of(p), support) * (1.0 + law_of(0.7 * p).mean))(0.4)
    got = jax.value_and_grad(vi.exact(fn))(0.4)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [vi.MVD(), vi.MVD(second_order=True), vi.LocalExpectation(), vi.Enum(), vi.RLOO(2)]
)
def test_categorical_lanes_are_exact(strategy):
    """Two lanes of three outcomes each, by logits and by probabilities."""
    cost = jnp.array([[0.3, -1.0, 2.0], [1.0, 0.2, -0.4], [0.5, 0.9, 0.1]])

    def fn(logits):
        x = vi.sample("x", dist.Categorical(logits=logits), grad=strategy)
        return cost[x[0], x[1]]

    def truth(logits):
        p = jax.nn.softmax(logits, -1)
        return p[0] @ cost @ p[1]

    logits = jnp.array([[0.1, 0.4, -0.3], [0.2, -0.5, 0.6]])
    np.testing.assert_allclose(jax.grad(vi.exact(fn))(logits), jax.grad(truth)(logits), atol=1e-12)


@pytest.mark.slow
def test_second_order_alternatives_have_the_exact_hessian():
    def fn(strategy):
        def program(p):
            a = vi.sample("a", dist.Bernoulli(p), grad=strategy)
            return (a + vi.sample("b", dist.Bernoulli(0.2 + 0.5 * p * a), grad=strategy)) ** 2 * p

        return program

    truth = jax.jit(jax.hessian(vi.exact(fn(vi.Enum()))))(0.3)
    for strategy in (vi.MVD(second_order=True), vi.LocalExpectation(second_order=True), vi.Score()):
        np.testing.assert_allclose(jax.jit(jax.hessian(vi.exact(fn(strategy))))(0.3), truth, atol=1e-12)


# --- where guides start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [lambda t: dist.Bernoulli(logits=t), lambda t: dist.Binomial(2, logits=t)])
@pytest.mark.parametrize("grad", [vi.Enum(), pytest.param(vi.Score(), marks=pytest.mark.slow)])
def test_gradients_at_logits_of_zero(law, grad):
    """numpyro's own log-density has a kink there; a guide that starts at zero must not feel it."""

    def model(t):
        x = numpyro.sample("x", law(t))
        numpyro.sample("y", dist.Bernoulli(logits=t * x), obs=1)

    def fn(t):
        q = vi.program(lambda t: vi.sample("x", law(t), grad=grad))(t)
        return vi.elbo(vi.program(model)(t), q) + vi.log_density(dist.Bernoulli(logits=t), 1.0)

    slope, step = jax.jit(jax.grad(vi.exact(fn))), 1e-5
    np.testing.assert_allclose(slope(0.0), 0.5 + 0.5 * law(0.0).mean, atol=1e-12)
    np.testing.assert_allclose(slope(0.0), (slope(step) + slope(-step)) / 2, atol=1e-9)


# --- pathwise and relaxed -----------------------------------------------------------------------------------------


def mixture(params):
    loc, scale = params
    parts = dist.Normal(jnp.stack([loc, loc + 3.0]), jnp.stack([scale, 0.7]))
    return dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.4, 0.6])), parts)


def test_implicit_gradient_of_a_mixture():
    """A mixture has no sampler that could be differentiated, but it has a distribution function."""
    grid = jnp.linspace(-15.0, 20.0, 40001)
    value = lambda x: jnp.sin(x) * x
    truth = lambda params: jnp.trapezoid(jnp.exp(mixture(params).log_prob(grid)) * value(grid), grid)
    fn = lambda params: value(vi.sample("x", mixture(params), grad=vi.Implicit()))
    params = (jnp.array(0.5), jnp.array(1.2))
    stats.assert_mean(draws_of(fn, params, 20_000), jax.jit(jax.value_and_grad(truth))(params))


@pytest.mark.slow
def test_implicit_gradient_of_a_vector_mixture():
    def law(loc):
        parts = dist.Normal(jnp.stack([loc, -loc]), 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.3, 0.7])), parts)

    def fn(loc):
        x = vi.sample("x", law(loc), grad=vi.Implicit())
        return x[0] * x[1] + x[0]  # mean: loc_0 loc_1 - 0.4 loc_0

    loc = jnp.array([0.8, -0.5])
    truth = lambda loc: loc[0] * loc[1] - 0.4 * loc[0]
    stats.assert_mean(draws_of(fn, loc, 20_000), jax.value_and_grad(truth)(loc))


@pytest.mark.slow
def test_relaxation_is_marked_biased_and_is():
    assert not vi.Relaxed(0.5).unbiased
    fn = lambda p: (vi.sample("b", dist.Bernoulli(p), grad=vi.Relaxed(0.5)) - 0.3) ** 2
    cold, slopes = draws_of(fn, 0.4, 20_000)
    assert abs(slopes.mean() - 0.4) > 8 * slopes.std() / np.sqrt(20_000)  # 0.7^2 - 0.3^2 is the true one
    assert np.all((cold < 0.49) & (cold >= 0.0))  # strictly inside what the two outcomes would give


def test_relaxed_sites_weigh_by_the_bernoulli_formula():
    """Under a relaxation the bound stays finite: support checks would make every weight zero."""

    def fn(t):
        q = vi.program(g1_guide(vi.Relaxed(0.5), vi.Enum()))(t)
        return vi.E(lambda: vi.elbo(vi.program(g1_model)(), q))(key=jax.random.key(0))

    value, slope = jax.jit(jax.value_and_grad(fn))(jnp.array(T))
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


# --- baselines ----------------------------------------------------------------------------------------------------


def test_baselines_leave_the_mean_alone():
    for baseline in (vi.MovingBaseline(-2.0, 0.9), vi.LearnedBaseline(lambda x: 3.0 * x, (jnp.array(-0.7),))):
        value, gradient = g1_exact(vi.elbo, vi.Score(baseline), vi.Score(baseline))
        np.testing.assert_allclose(value, -2.175770668812, atol=1e-10)
        np.testing.assert_allclose(gradient, ELBO_GRADIENT, atol=6e-7)


class Based(eqx.Module):
    """Parameters of the guide beside a baseline of either kind."""

    t: jax.Array
    baseline: vi.MovingBaseline | vi.LearnedBaseline

    def bound(self, batch):
        del batch
        guide = g1_guide(vi.Score(self.baseline), vi.Enum())
        return vi.elbo(vi.program(g1_model)(), vi.program(guide)(self.t))


class Constant(eqx.Module):
    """The smallest learned baseline."""

    level: jax.Array

    def __call__(self):
        return self.level


def test_moving_baseline_follows_the_objective():
    objective = eqx.filter_jit(vi.maximize(Based.bound))
    model = Based(jnp.array(T), vi.MovingBaseline(jnp.array(0.0), jnp.array(0.5)))
    loss, aux = objective(model, None, key=jax.random.key(0))
    np.testing.assert_allclose(aux["updates"].baseline.value, -0.5 * loss, rtol=1e-12)
    assert aux["updates"].t is None


def test_learned_baseline_is_trained_on_its_squared_error():
    """Its gradient is that of (F - b)^2, whichever way the objective goes."""
    key = jax.random.key(0)
    model = Based(jnp.array(T), vi.LearnedBaseline(Constant(jnp.array(-1.0))))
    for make, sign in ((vi.maximize, -1.0), (vi.minimize, 1.0)):
        loss, slope = eqx.filter_jit(
            eqx.filter_value_and_grad(lambda m, make=make: make(Based.bound)(m, None, key=key)[0])
        )(model)
        np.testing.assert_allclose(slope.baseline.net.level, 2 * (-1.0 - sign * loss), rtol=1e-10)


# --- plates -------------------------------------------------------------------------------------------------------


Y = jnp.array([0.3, -0.4])


def plated_model():
    a = numpyro.sample("a", dist.Bernoulli(0.3))
    with numpyro.plate("n", 2):
        b = numpyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
        numpyro.sample("y", dist.Normal(a + 2 * b, 1.0), obs=Y)


def plated_guide(grad, last=False):
    def guide(t):
        if not last:
            vi.sample("a", dist.Bernoulli(logits=t[0]), grad=grad)
        with numpyro.plate("n", 2):
            b = vi.sample("b", dist.Bernoulli(logits=jnp.array([t[1], t[2]])), grad=grad)
        if last:  # a later site outside the plate mixes its lanes
            vi.sample("a", dist.Bernoulli(logits=t[0] + jnp.sum(b)), grad=grad)

    return guide


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_plate_costs_are_exact(last):
    def fn(grad, rao_blackwell):
        q = lambda t: vi.program(plated_guide(grad, last))(t)
        return lambda t: vi.elbo(vi.program(plated_model)(), q(t), rao_blackwell=rao_blackwell)

    t = jnp.array(T)
    want = jax.value_and_grad(vi.exact(fn(vi.Enum(), True)))(t)
    for grad, options in ((vi.Score(), (True, False)), (vi.RLOO(2), (True,))):
        for rao_blackwell in options:
            got = jax.value_and_grad(vi.exact(fn(grad, rao_blackwell)))(t)
            np.testing.assert_allclose(got[0], want[0], atol=1e-12)
            np.testing.assert_allclose(got[1], want[1], atol=1e-12)


@pytest.mark.slow
def test_plate_costs_cut_the_variance():
    """Forty independent coins: each lane's score meets its own lane's cost only."""

    def model():
        with numpyro.plate("n", 40):
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2.0 * b, 1.0), obs=1.0)

    def guide(t):
        with numpyro.plate("n", 40):
            vi.sample("b", dist.Bernoulli(logits=t), grad=vi.Score())

    def variance(rao_blackwell):
        fn = lambda t: vi.elbo(vi.program(model)(), vi.program(guide)(t), rao_blackwell=rao_blackwell)
        _, slopes = draws_of(fn, jnp.zeros(40), 500)
        return float(np.var(slopes, 0).sum())

    assert variance(True) < variance(False) / 20


@pytest.mark.slow
def test_subsampled_plates_scale_local_terms_without_bias():
    """A minibatch of two of four: the mean over subsamples is the full bound."""
    data = jnp.array([0.3, -0.4, 1.0, 2.0])

    def model():
        with numpyro.plate("n", 4, subsample_size=2) as index:
            b = numpyro.sample("b", dist.Bernoulli(0.4))
            numpyro.sample("y", dist.Normal(2.0 * b, 1.0), obs=data[index])

    def guide(t):
        with numpyro.plate("n", 4, subsample_size=2) as index:
            vi.sample("b", dist.Bernoulli(logits=t[index]), grad=vi.Enum())

    def full(t):
        q = jax.nn.sigmoid(t)
        cost = lambda b: jnp.log(0.4 if b else 0.6) + dist.Normal(2.0 * b, 1.0).log_prob(data)
        return jnp.sum(q * (cost(1) - jnp.log(q)) + (1 - q) * (cost(0) - jnp.log1p(-q)))

    t = jnp.array([0.2, -0.3, 0.5, 0.1])
    draws = draws_of(lambda t: vi.elbo(vi.program(model)(), vi.program(guide)(t)), t, 20_000)
    stats.assert_mean(draws, jax.value_and_grad(full)(t))


# --- masks, scales and wrappers ---------------------------------------------------------------------------------------


WRAPPED = {
    "mask": lambda law: law.mask(np.array([True, False])),
    "expand and mask": lambda law: law.expand([2]).mask(np.array([False, True])),
    "to_event": lambda law: law.to_event(1),
    "to_event and mask": lambda law: law.to_event(1).mask(False),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_sites_are_exact_under_every_strategy(wrapped):
    """A mask changes what is counted and not what is drawn, whichever way the gradient takes."""

    def law(logits):
        return WRAPPED[wrapped](dist.Bernoulli(logits=logits))

    def model():
        b = numpyro.sample("b", law(jnp.array([0.3, -0.8])))
        numpyro.sample("y", dist.Normal(jnp.sum(b * jnp.array([1.0, 2.0])), 1.0), obs=0.7)

    def fn(grad):
        return lambda t: vi.elbo(vi.program(model)(), vi.program(lambda: vi.sample("b", law(t), grad=grad))())

    def truth(t):
        total = 0.0
        for b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            value = jnp.array(b)
            weight = jnp.exp(jnp.sum(dist.Bernoulli(logits=t).log_prob(value)))
            log_p = jnp.sum(law(jnp.array([0.3, -0.8])).log_prob(value)) - jnp.sum(law(t).log_prob(value))
            total += weight * (log_p + dist.Normal(b[0] + 2.0 * b[1], 1.0).log_prob(0.7))
        return total

    t = jnp.array([0.2, -0.4])
    want = jax.value_and_grad(truth)(t)
    for grad in (vi.Enum(), vi.Score(), vi.MVD(), vi.DisARM()):
        got = jax.jit(jax.value_and_grad(vi.exact(fn(grad))))(t)
        np.testing.assert_allclose(got[0], want[0], atol=1e-12, err_msg=str(grad))
        np.testing.assert_allclose(got[1], want[1], atol=1e-12, err_msg=str(grad))
