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


def hierarchical(grad):
    def guide():
        u = vi.sample("u", dist.Categorical(logits=jnp.array([0.1, -0.2, 0.3])), grad=grad)
        a = vi.sample("a", dist.Bernoulli(logits=jnp.array([-1.0, 0.5, 1.0])[u]), grad=grad)
        vi.sample("b", dist.Bernoulli(logits=jnp.array([0.2, -0.8, 0.4])[u] + 0.6 * a), grad=grad)

    return vi.program(guide)()


def uniform(grad):
    return vi.program(lambda: vi.sample("u", dist.Categorical(probs=jnp.ones(3) / 3), grad=grad))()


@pytest.mark.parametrize(("size", "want"), [(1, -2.490123618014), (2, -2.424879511805)])
@pytest.mark.parametrize("grad", [None, vi.Score()])
def test_hierarchical_bounds(size, want, grad):
    q = vi.marginal(hierarchical(grad), ["a", "b"], vi.SIR(size, lambda kept: uniform(grad)))
    value = jax.jit(lambda: vi.exact(lambda: vi.elbo(vi.program(g1_model)(), q))())()
    np.testing.assert_allclose(value, want, atol=1e-10)


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
def test_smc_evidence_is_unbiased_and_density_normalised():
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
