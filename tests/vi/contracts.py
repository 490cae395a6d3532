"""Contract cases of programmable variational inference."""

import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
from contract import Case

from genkit import vi


def model(y):
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    z = numpyro.sample("z", dist.Normal(x, 1.0))
    numpyro.sample("y", dist.Normal(z, 0.5), obs=y)


def guide():
    numpyro.sample("x", dist.Normal(0.2, 1.0))
    numpyro.sample("z", dist.Normal(0.5, 1.0))


def shifted():
    return numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.array(0.0)), 1.0))


def target(weight, batch):
    return weight * batch


def level():
    return jnp.array(0.3)


def mean(x):
    return 2.0 * x


def product(objective):
    return objective(2 * level(), level(), key=jr.key(0))[0]


def surrogate(strategy):
    """What a site of two coins becomes under the strategy."""
    law = dist.Bernoulli(probs=jnp.array([0.3, 0.6]))
    fn = lambda: jnp.sum(vi.sample("b", law, grad=strategy) * jnp.array([1.0, 2.0])) ** 2
    return vi.E(fn)(key=jr.key(0))


def pathwise(strategy):
    """The same for a site with a differentiable sampler."""
    return vi.E(lambda: vi.sample("x", dist.Normal(jnp.array(0.3), 1.0), grad=strategy) ** 2)(key=jr.key(0))


def measure(value):
    draw, log_density = value.sample(key=jr.key(0))
    return draw, log_density, value.log_density(draw)


def by_sir(algorithm):
    return vi.normalize(vi.program(model)(1.0), algorithm).sample(key=jr.key(0))


def sir():
    return vi.SIR(3, vi.program(guide)())


def smc():
    return vi.SMC(3, (vi.program(guide)(),), (), vi.Score())


def half():
    return jnp.array([0.5, 0.5])


CASES = [
    Case("Enum", vi.Enum, surrogate, grad=False, vmap=False, eager=False),
    Case("DisARM", vi.DisARM, surrogate, grad=False, vmap=False, eager=False),
    Case("RLOO", lambda: vi.RLOO(3), surrogate, grad=False, vmap=False, eager=False),
    Case(
        "LocalExpectation",
        lambda: vi.LocalExpectation(second_order=True),
        surrogate,
        grad=False,
        vmap=False,
        eager=False,
    ),
    Case("MVD", vi.MVD, surrogate, grad=False, vmap=False, eager=False),
    Case("Detach", vi.Detach, surrogate, grad=False, vmap=False),
    Case("Score", lambda: vi.Score(jnp.array(1.5)), surrogate, zero_grad=True),
    Case("Score, moving", lambda: vi.Score(vi.MovingBaseline(jnp.array(0.2))), surrogate, zero_grad=True),
    Case("Score, learned", lambda: vi.Score(vi.LearnedBaseline(mean, (jnp.array(0.5),))), surrogate, zero_grad=True),
    Case("Relaxed", lambda: vi.Relaxed(jnp.array(0.5)), surrogate),
    Case("Importance", lambda: vi.Importance(dist.Bernoulli(half())), surrogate, zero_grad=True),
    Case("Reparam", vi.Reparam, pathwise, grad=False, vmap=False),
    Case("Implicit", vi.Implicit, pathwise, grad=False, vmap=False),
    Case("MovingBaseline", lambda: vi.MovingBaseline(jnp.array(1.0)), lambda m: m.update(jnp.array(2.0)).value),
    Case("LearnedBaseline", lambda: vi.LearnedBaseline(mean, (jnp.array(3.0),)), lambda b: b(), zero_grad=True),
    Case("Program", lambda: vi.program(guide)(), measure, grad=False, vmap=False, rtol=1e-4),
    Case("Guide", lambda: vi.mean_field(model, 1.0), measure, rtol=1e-4),
    Case("Guide, full rank", lambda: vi.full_rank(model, 1.0), measure, rtol=1e-4),
    Case("Guide, low rank", lambda: vi.low_rank(model, 1.0), measure, rtol=1e-4),
    Case("Guide, flow", lambda: vi.flow_guide(model, 1.0, key=jr.key(0), width=4), measure, eager=False, rtol=1e-4),
    Case(
        "NumpyroGuide",
        lambda: vi.NumpyroGuide(shifted, {"loc": jnp.array(0.5)}, {"loc": dist.transforms.IdentityTransform()}),
        lambda g: vi.program(g)().sample(key=jr.key(0)),
    ),
    Case("ProgramObjective", lambda: vi.maximize(target), product, grad=False, vmap=False),
    Case("SIR", sir, by_sir, grad=False, vmap=False, eager=False),
    Case("SMC", smc, by_sir, grad=False, vmap=False, eager=False),
    Case("Fit", vi.Fit),
    Case("Plateau", vi.Plateau),
]
