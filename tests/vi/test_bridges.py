"""numpyro's guides here, our objectives there; debugging and reports."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from vi_golden import T, g1_guide, g1_model

from genkit import vi


@pytest.fixture
def key():
    return jax.random.key(0)


def conjugate(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


# numpyro's handlers split one key several times
@pytest.mark.key_reuse
def test_autoguide_becomes_a_module(key):
    guide = vi.from_numpyro(AutoNormal(conjugate), 1.0, key=key)
    assert len(jax.tree.leaves(guide.unconstrained)) == 2
    loss = lambda g, k: -vi.E(lambda: vi.elbo(vi.program(conjugate)(1.0), vi.program(g)(1.0)))(key=k)

    @jax.jit
    def step(leaves, state, k):
        rebuild = lambda u: vi.NumpyroGuide(guide.guide, u, guide.transforms)
        grads = jax.grad(lambda u: jnp.mean(jax.vmap(lambda one: loss(rebuild(u), one))(jax.random.split(k, 32))))(
            leaves
        )
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(leaves, updates), state

    optimizer = optax.adam(0.05)
    leaves, state = guide.unconstrained, optimizer.init(guide.unconstrained)
    for i in range(200):
        leaves, state = step(leaves, state, jax.random.fold_in(key, i))
    params = vi.NumpyroGuide(guide.guide, leaves, guide.transforms).params
    np.testing.assert_allclose(params["x_auto_loc"], 0.8, atol=0.05)
    np.testing.assert_allclose(params["x_auto_scale"], np.sqrt(0.2), atol=0.05)


# numpyro's SVI splits one key several times
@pytest.mark.key_reuse
def test_objective_in_numpyro_svi_has_the_right_gradient(key):
    """numpyro's own multi-sample loss points the wrong way on this discrete guide."""

    def guide():
        g1_guide()(numpyro.param("t", jnp.array(T)))

    loss = vi.NumpyroObjective(lambda p, q: vi.iwelbo(p, q, 2))
    slope = jax.jit(jax.grad(lambda t: loss.loss(key, {"t": t}, g1_model, guide)))(jnp.array(T))
    np.testing.assert_allclose(-slope, (-0.328574, -0.292226, -0.108152), atol=2e-6)
    svi = SVI(g1_model, guide, optax.adam(0.1), loss)
    state = svi.init(key)
    state, value = jax.jit(svi.update)(state)
    np.testing.assert_allclose(value, 1.828724763866, rtol=1e-5)


# one key for both sides of the comparison
@pytest.mark.key_reuse
def test_our_guide_in_numpyro(key):
    guide = vi.mean_field(conjugate, 1.0)
    value = Trace_ELBO(num_particles=2000).loss(key, {}, conjugate, vi.to_numpyro(guide), 1.0)
    keys = jax.random.split(key, 2000)
    ours = jax.vmap(lambda k: vi.E(lambda: vi.elbo(vi.program(conjugate)(1.0), guide))(key=k))(keys)
    assert abs(value + ours.mean()) < 4.9 * np.sqrt(2) * ours.std() / np.sqrt(2000)


# the function under test is run several times with one key
@pytest.mark.key_reuse
def test_debug_finds_nonlinear_use(key):
    inner = lambda p: vi.E(lambda: vi.sample("b", dist.Bernoulli(p)) + 1.0)(key=key)
    assert vi.debug(lambda p: 2.0 * inner(p) - 1.0)(0.3) == pytest.approx(1.6)
    with pytest.raises(ValueError, match="linearly"):
        vi.debug(lambda p: jnp.log(inner(p)))(0.3)


# explained and measured with one key
@pytest.mark.key_reuse
def test_reports(key):
    def fn(p):
        b = vi.sample("b", dist.Bernoulli(p), grad=vi.Score())
        return 10.0 + vi.sample("x", dist.Normal(b * p, 1.0)) ** 2

    decisions = {d.address: type(d.strategy).__name__ for d in vi.explain(fn, 0.3, key=key)}
    assert decisions == {"b": "Score", "x": "Reparam"}
    report = vi.variance_report(fn, jnp.array(0.3), key=key, num_samples=400)
    as_is = report.rows[0].variance
    enumerated = next(r.variance for r in report.rows if (r.site, r.strategy) == ("b", "Enum"))
    assert enumerated < as_is / 2
    assert "b" in report.suggestion
