"""Contract cases of guidance, used as it is meant to be: inside a draw."""

import functools

import jax.numpy as jnp
import jax.random as jr
from contract import Case

import genkit as gk


g = gk.guidance


def denoiser(x, sigma, cond=None):
    mean = 0.0 if cond is None else jnp.where(cond < 0, 0.0, 1.0 * cond)
    return mean + (x - mean) / (1 + sigma**2)


def weak(x, sigma, cond=None):
    return 0.9 * denoiser(x, sigma, cond) + 0.01


def grid():
    return gk.diffusion.karras(4, 0.1, 2.0)


def draw(guidance):
    table = gk.diffusion.ddim(grid())
    return gk.sample(table, denoiser, 3, shape=(2,), cond=1, guidance=guidance, key=jr.key(0)).value


def steered(guidance):
    table = gk.diffusion.ancestral(grid())
    return gk.sample(table, denoiser, 4, shape=(2,), cond=1, guidance=guidance, key=jr.key(0)).value


def rising(sigma):
    return 1 + sigma


def logits(x0):
    return jnp.stack([x0[0], -x0[0], x0[1]])


def log_prob(x, sigma, cond):
    return -jnp.sum((x - cond) ** 2) / (1 + sigma**2)


def loss(x0):
    return jnp.sum(x0**2)


def reward(x0):
    return -jnp.sum(x0**2)


def everything():
    first = g.interval(g.cfg(2.0), 0.2, 1.5) + g.apg(3.0, norm_threshold=1.0, momentum=-0.5) + g.negative(1.5, 2)
    return g.rescale(first + g.perpneg(1.2, 2) + g.autoguide(weak, 1.5), 0.5)


@functools.cache
def fit():
    table = gk.diffusion.ddim(grid())
    return g.fit_linear_ag(table, denoiser, g.cfg(2.0), 4, cond=1, shape=(2,), true_steps=[0], stop=2, key=jr.key(0))


def guided(model):
    return model(jnp.ones(2), jnp.asarray(0.7), jnp.asarray(1))


def searched():
    table = gk.diffusion.ddim(grid())
    return g.search_policy(table, denoiser, 2.0, 2, cond=1, shape=(2,), budget=6.0, num_updates=2, key=jr.key(0))


def weighted():
    slots = [
        g.Slot("cond"),
        g.Slot("uncond", cond="null"),
        *(g.Slot(f"other_{i}", cond=jnp.asarray(i)) for i in (2, 3, 4, 5)),
    ]
    weights = (0.5, g.Ramp(0.1, 0.3, 2.0), g.PowerCosine(1.2, 2.0), g.CFGPlusPlus(0.2), g.PerStep([0.1, 0.2, 0.1, 0.3]))
    return g.Linear(tuple(slots), weights)


def directed():
    maps = (g.Momentum(-0.5), g.ClipNorm(0.5, rms=True), g.ExponentialDamping(0.5), g.Project(0.2))
    direction = g.Direction(g.Slot("uncond", cond="null"), maps, g.FunctionOfSigma(rising))
    return g.dynamic_threshold(g.rescale(direction, 0.7), 0.9, limit=0.5) >> g.NormCap()


CASES = [
    Case("Linear, all weights", weighted, draw),
    Case("Direction, all maps and operations behind", directed, draw),
    Case("sum of many", everything, draw, eager=False),
    Case("adaptive", lambda: g.adaptive(g.interval(g.gfcg(logits, 3.0), 0.0, 1.5), 0.999), draw, eager=False),
    Case(
        "classifier", lambda: g.classifier(log_prob, 0.5) + g.loss_guidance(loss, 0.5, num_draws=2), draw, eager=False
    ),
    Case("LinearFit", fit, lambda f: draw(g.linear_ag(f)), vmap=False, eager=False, dtype=False),
    Case("LinearSampler", lambda: g.LinearSampler(gk.diffusion.ddim(grid()), g.cfg(2.0), true_steps=(0,), stop=2)),
    Case("PolicyFit", searched),
    Case("Guided", lambda: g.Guided(denoiser, g.cfg(2.0)), guided, eager=False),
    Case("reflect", lambda: g.reflect(weak, 0.2, 1.5), draw, eager=False, zero_grad=True),
    Case("steer", lambda: g.steer(reward, 2), steered, eager=False, grad=False),
    Case("fkc", lambda: g.fkc({1: 2.0, None: -0.5}, 2), steered, eager=False),
    Case("Slot", lambda: g.Slot("uncond", cond="null")),
]
