"""Contract cases of distillation."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
from contract import Case

import genkit as gk


d = gk.distill


def law():
    return gk.diffusion.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [1.0]]), 0.5, labels=np.array([0, 1]))


def gauss():
    return gk.diffusion.GaussianDenoiser(jnp.full(1, 0.5), 1.5)


def net(x, sigma, cond=None):
    return jnp.sum(x) / (1 + sigma)


def model(**parts):
    return d.Distillation(
        d.OneStep(gauss(), 1.0), gauss(), fake=gk.diffusion.GaussianDenoiser(jnp.full(1, -0.2), 1.0), **parts
    )


def noised():
    x = jnp.linspace(-1.0, 1.0, 8)[:, None]
    sigma = jnp.linspace(0.4, 1.1, 8)
    return d.NoisyBatch(x, x + sigma[:, None] * x**2, sigma, x**2, None, jnp.ones_like(sigma))


def loss(value):
    parts = model(discriminator=net)
    x = noised()

    def of_student(shift):
        batch = x._replace(x=x.x + shift, x_t=x.x_t + shift)
        return value(parts, batch, key=jr.key(0))[0]

    return jax.grad(of_student)(jnp.zeros(()))


@functools.cache
def fitted():
    phases = d.cycle(d.SDS(), noise_distribution=NOISE, latent_shape=(1,), optimizer=optax.sgd(0.1), batch_size=4)
    return gk.fit(gk.Recipe(lambda key: model(), d.Conditions(None, 4), phases, 1), key=jr.key(0))


def denoise(value):
    return value(jnp.full(1, 0.3), jnp.asarray(0.7), jnp.asarray(1))


def student(value):
    return value(jnp.full(value.latent_shape if hasattr(value, "latent_shape") else (1,), 0.3))


def sample(sampler):
    return sampler.draw(d.OneStep(gauss(), 1.0) if isinstance(sampler, d.StudentSampler) else gauss(),
                        jr.split(jr.key(0), 2), cond=None, x_init=None, shape=(1,)).value  # fmt: skip


def categorical(logits):
    return dist.Categorical(logits=logits)


def target(x):
    return jnp.log(1.0 + x)


def policy():
    return d.LawPolicy(categorical, jnp.array([0.1, 0.5]))


def tokens(value):
    return value.log_prob(jnp.array([0, 1]))


def consistency(value):
    pair = d.Pair(d.ConsistencyModel(gk.nn.MLP((1,), width=4, depth=1, key=jr.key(0))), None, gauss())
    return value(pair, (jnp.ones((4, 1)), None), key=jr.key(0))[0]


def network():
    return d.ConsistencyModel(gk.nn.MLP((1,), width=4, depth=1, key=jr.key(0)), 0.5, 0.01)


def logit(value):
    return value(jnp.full(1, 0.3), jnp.asarray(0.7))


NOISE = dist.Uniform(0.3, 2.0)
JS = gk.divergence.JensenShannon
CASES = [
    Case("Distillation", model),
    Case("TeacherSamples", lambda: d.TeacherSamples(jnp.zeros((4, 1)), jnp.arange(4), jnp.ones((4, 1)))),
    Case("Distilled", lambda: d.Distilled.of_training(fitted())),
    Case("OneStep", lambda: d.OneStep(gauss(), 1.0), student),
    Case("FewStep", lambda: d.FewStep(gauss(), jnp.array([2.0, 1.0])), student, vmap=False),
    Case("ExactRatio", d.ExactRatio),
    Case("NoRatio", d.NoRatio),
    Case("EmpiricalRatio", lambda: d.EmpiricalRatio(16)),
    Case("DiscriminatorRatio", lambda: d.DiscriminatorRatio(None)),
    Case("ScoreRatio", lambda: d.ScoreRatio(20.0, 4)),
    Case("FDistill", lambda: d.FDistill(JS(), d.DiscriminatorRatio(None)), loss, eager=False, zero_grad=True),
    Case("SDS", d.SDS),
    Case("DSD", lambda: d.DSD(1.0, 2.0)),
    Case("SiD", lambda: d.SiD(1.0), loss, eager=False),
    Case("Adversarial", d.Adversarial),
    Case("PairRegression", d.PairRegression),
    Case("SumLoss", lambda: d.SDS() + 0.5 * d.Adversarial()),
    Case("StudentObjective", lambda: d.StudentObjective(d.SDS(), NOISE, None, 4, (1,))),
    Case("CriticObjective", lambda: d.CriticObjective(NOISE, 4, (1,))),
    Case("Discriminator", lambda: d.Discriminator((1,), width=4, depth=1, key=jr.key(0)), logit, eager=False),
    Case(
        "Discriminator, with features",
        lambda: d.Discriminator((1,), width=4, depth=1, features=gauss(), key=jr.key(0)),
        logit,
        eager=False,
    ),
    Case("Conditions", lambda: d.Conditions(jnp.arange(3), 4)),
    Case("ConsistencyModel", network, logit, eager=False),
    Case("Pair", lambda: d.Pair(gauss(), gauss())),
    Case("ConsistencyObjective", lambda: d.ConsistencyObjective(jnp.array([2.0, 1.0, 0.0])), consistency, eager=False),
    Case("TeacherData", lambda: d.TeacherData(gauss(), d.Conditions(None, 4))),
    Case("LawPolicy", policy, lambda p: p.log_prob(jnp.asarray(1))),
    Case("AutoregressivePolicy", lambda: d.AutoregressivePolicy(2, 2, width=4, key=jr.key(0)), tokens, eager=False),
    Case("Tracked", lambda: d.Tracked(policy())),
    Case(
        "FDPG",
        lambda: d.FDPG(JS(), target, num_draws=8),
        lambda v: v(d.Tracked(policy()), None, key=jr.key(0))[0],
        eager=False,
        zero_grad=True,
    ),
    Case("StudentSampler", d.StudentSampler, sample, grad=False, vmap=False),
    Case("Renoise", lambda: d.Renoise(jnp.array([2.0, 1.0])), sample, vmap=False),
]
