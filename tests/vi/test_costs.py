"""Which cost meets which score: exact in expectation, and less noise, wherever costs are dropped."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from genkit import vi


pytestmark = pytest.mark.usefixtures("x64")
Y = np.array([0.4, 1.9, -0.3, 1.2])


def chain(length):
    z = 0
    for i in range(length):
        z = numpyro.sample(f"z{i}", dist.Bernoulli(0.2 + 0.6 * z))
        numpyro.sample(f"y{i}", dist.Normal(2.0 * z, 1.0), obs=Y[i % 4])


def independent(grad):
    """A guide of independent coins: the law of one says nothing of another."""

    def guide(t):
        for i in range(t.shape[0]):
            vi.sample(f"z{i}", dist.Bernoulli(logits=t[i]), grad=grad)

    return guide


def skipping(grad):
    """Every second coin looks at the last but one."""

    def guide(t):
        draws = []
        for i in range(t.shape[0]):
            logits = t[i] + (draws[i - 2] if i > 1 else 0.0)
            draws.append(vi.sample(f"z{i}", dist.Bernoulli(logits=logits), grad=grad))

    return guide


class Copy(dist.Distribution):
    """The point `z` with a density of one: its sampler alone says what it depends on."""

    support = dist.constraints.boolean
    arg_constraints: ClassVar = {}

    def __init__(self, z):
        self.z = z
        super().__init__(validate_args=False)

    def sample(self, key, sample_shape=()):
        return self.z

    def log_prob(self, value):
        return jnp.zeros(())


def bound(model, guide, rao_blackwell=True):
    return lambda t: vi.elbo(vi.program(model)(), vi.program(guide)(t), rao_blackwell=rao_blackwell)


T = np.array([0.2, -0.3, 0.5, 0.1])


@pytest.mark.parametrize("family", [independent, pytest.param(skipping, marks=pytest.mark.slow)])
@pytest.mark.parametrize("grad", [vi.Score(), pytest.param(vi.RLOO(2), marks=pytest.mark.slow)])
def test_dropped_costs_leave_the_mean_alone(family, grad):
    length = 3 if isinstance(grad, vi.Score) else 2
    model, t = lambda: chain(length), T[:length]
    want = jax.jit(jax.value_and_grad(vi.exact(bound(model, family(None)))))(t)
    got = jax.jit(jax.value_and_grad(vi.exact(bound(model, family(grad)))))(t)
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


def gradient_draws(fn, t, num):
    keys = jax.random.split(jax.random.key(3), num)
    slope = lambda k: jax.grad(lambda t: vi.E(fn)(t, key=k))(t)
    return np.asarray(jax.jit(jax.vmap(slope))(keys))


@pytest.mark.slow
def test_flow_of_data_cuts_the_noise_below_program_order():
    """Twelve coins of a chain under a guide that keeps them apart: a score meets three costs, not all later ones."""
    t = jnp.zeros(12)
    model, guide = lambda: chain(12), independent(vi.Score())
    spread = {kept: gradient_draws(bound(model, guide, kept), t, 4000).var(0) for kept in (True, False)}
    assert spread[True].sum() < spread[False].sum() / 15
    # Program order would spare the last coins only; the flow of data spares the first as much.
    assert spread[True][0] < spread[False][0] / 10


def test_samplers_are_looked_at_beside_densities():
    """The score of the first coin must still meet the costs of its copy: no cost may be dropped here."""

    def model():
        numpyro.sample("z0", dist.Bernoulli(0.3))
        z1 = numpyro.sample("z1", dist.Bernoulli(0.6))
        numpyro.sample("y", dist.Normal(3.0 * z1, 1.0), obs=1.0)

    def guide(t):
        z = vi.sample("z0", dist.Bernoulli(logits=t[0]), grad=vi.Score())
        vi.sample("z1", Copy(z), grad=vi.Score())

    kept, all_costs = (gradient_draws(bound(model, guide, how), T[:1], 16) for how in (True, False))
    # All that is left out is the derivative of the coin's own -log q, which is zero on average.
    p = 1 / (1 + np.exp(-T[0]))
    gap = (all_costs - kept)[:, 0]
    np.testing.assert_allclose(gap, np.where(gap > 0, p, p - 1), rtol=1e-12)
    assert {*np.sign(gap)} == {-1.0, 1.0}


def test_python_branches_fall_back_to_program_order():
    """Where the program looks at a drawn value outside of JAX the flow of data cannot be traced."""

    def guide(t):
        z = vi.sample("z0", dist.Bernoulli(logits=t[0]), grad=vi.Score())
        vi.sample("z1", dist.Bernoulli(logits=t[1] + (1.0 if bool(z) else -1.0)), grad=vi.Score())

    value = vi.E(bound(lambda: chain(2), guide))(T[:2], key=jax.random.key(0))
    assert np.isfinite(value)


# --- lanes that mix -------------------------------------------------------------------------------------------------


W = np.array([1.0, 2.0])
MIXERS = {
    "apart": lambda z: z * W,
    "table": lambda z: jnp.array([0.3, -0.7])[z] * W,
    "reversed": lambda z: z[::-1] * W,
    "centered": lambda z: z - z.mean(),
    "cumulative": lambda z: jnp.cumsum(z) * W,
    "neighbors": lambda z: z + jnp.roll(z, 1) * 0.5,
    "matrix": lambda z: jnp.array([[0.3, 1.0], [-0.5, 0.2]]) @ z,
}


def mixing(mixer):
    def model():
        with numpyro.plate("n", 2):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(MIXERS[mixer](z), 1.0), obs=Y[:2])

    return model


def coins(grad):
    def guide(t):
        with numpyro.plate("n", 2):
            vi.sample("z", dist.Bernoulli(logits=t), grad=grad)

    return guide


def gradients(fn, t=T[:2]):
    return jax.jit(jax.value_and_grad(vi.exact(fn)))(t)


@pytest.mark.parametrize("mixer", MIXERS)
def test_members_of_a_plate_that_mix_keep_their_scores(mixer):
    """The model may reverse, center or sum up the members of a plate; the mean gradient is that of enumeration."""
    want = gradients(bound(mixing(mixer), coins(None)))
    got = gradients(bound(mixing(mixer), coins(vi.Score())))
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


def test_members_that_mix_on_the_way_through_another_draw():
    def model():
        with numpyro.plate("n", 2):
            numpyro.sample("z", dist.Bernoulli(0.3))
            b = numpyro.sample("b", dist.Bernoulli(0.6))
            numpyro.sample("y", dist.Normal(b * W, 1.0), obs=Y[:2])

    def guide(grad):
        def draws(t):
            with numpyro.plate("n", 2):
                z = vi.sample("z", dist.Bernoulli(logits=t), grad=grad)
                vi.sample("b", dist.Bernoulli(logits=t + 2.0 * z[::-1]), grad=grad)

        return draws

    want = gradients(bound(model, guide(None)))
    got = gradients(bound(model, guide(vi.Score())))
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


def test_members_apart_still_meet_their_own_costs_only():
    """Nothing mixes: the gradient of one coin does not move with the draw of the other."""
    fn = bound(mixing("table"), coins(vi.Score()))
    draws = gradient_draws(fn, T[:2], 64)
    assert len(np.unique(draws[:, 0].round(10))) == 2


# --- linear uses ------------------------------------------------------------------------------------------------------


def test_linear_uses_of_a_bound_keep_their_dropped_costs():
    t = T[:3]
    model, guide = lambda: chain(3), independent(vi.Score())
    plain = bound(model, guide)
    once = gradient_draws(plain, t, 16)
    rows = {
        "negative": (lambda t: -plain(t), -once),
        "shifted": (lambda t: plain(t) + 0.0, once),
        "scaled": (lambda t: 3.0 * plain(t) / 2.0, 1.5 * once),
    }
    for name, (fn, want) in rows.items():
        np.testing.assert_allclose(gradient_draws(fn, t, 16), want, atol=1e-10, err_msg=name)
    all_costs = gradient_draws(bound(model, guide, False), t, 16)
    assert not np.allclose(once, all_costs)


@pytest.mark.parametrize(
    "use",
    [
        lambda value, t: value**2,
        lambda value, t: t[0] * value + jnp.sum(t**2),
        lambda value, t: value * vi.sample("c", dist.Bernoulli(logits=t[1]), grad=vi.Score()),
    ],
)
def test_any_use_of_a_bound_is_unbiased(use):
    """Squared, with a coefficient that is trained, or with one that is drawn."""
    t = T[:2]
    want = gradients(lambda t: use(bound(lambda: chain(2), independent(vi.Enum()))(t), t), t)
    got = gradients(lambda t: use(bound(lambda: chain(2), independent(vi.Score()))(t), t), t)
    np.testing.assert_allclose(got[0], want[0], atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)


def test_sums_of_two_bounds_are_unbiased():
    t = T[:2]

    def fn(grad):
        half = bound(lambda: chain(2), independent(grad))
        return lambda t: half(t) + 2.0 * bound(mixing("reversed"), coins(grad))(t)

    want, got = gradients(fn(vi.Enum()), t), gradients(fn(vi.Score()), t)
    np.testing.assert_allclose(got[1], want[1], atol=1e-12)
