"""Contract cases of schedules, denoisers, weights and objectives."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from contract import Case

import genkit as gk


d = gk.diffusion


def schedule(s):
    t = jnp.array([0.1, 0.5, 0.9])
    return s.alpha(t), s.sigma(t), s.log_snr(t), s.drift(t), s.diffusion(t), s.time(s.noise_level(t))


def weight(w):
    return w(jnp.asarray(0.7))


def denoise(model):
    return model(jr.normal(jr.key(2), (2,)), jnp.asarray(0.7))


def law(model):
    return denoise(model), model.log_density(jnp.ones(2), jnp.asarray(0.7))


def mixture():
    covs = jnp.array([0.5, 1.0])[:, None, None] * jnp.eye(2)
    return d.MixtureDenoiser(jnp.array([0.3, 0.7]), jnp.array([[0.0, 1.0], [2.0, 0.0]]), covs, labels=np.array([0, 1]))


def network(prediction, **kwargs):
    return lambda: d.Preconditioned(gk.nn.MLP((2,), width=8, depth=1, key=jr.key(0)), prediction, **kwargs)


def objective(value):
    model = network("F")()
    return value(model, jr.normal(jr.key(1), (4, 2)), key=jr.key(3))[0]


CASES = [
    Case("EDM", d.EDM, schedule, grad=False, vmap=False),  # no parameters
    Case("CondOT", d.CondOT, schedule, grad=False, vmap=False),
    Case("VE", lambda: d.VE(0.01, 10.0), schedule, rtol=1e-4),
    Case("VP", lambda: d.VP(0.1, 20.0), schedule, rtol=1e-4),
    Case("SubVP", lambda: d.SubVP(0.1, 20.0), schedule, rtol=1e-4),
    Case("Cosine", lambda: d.Cosine(0.008), schedule, rtol=1e-4),
    Case("EDMWeight", lambda: d.EDMWeight(0.5), weight),
    Case("MinSNRWeight", lambda: d.MinSNRWeight(1.0), weight),
    Case("EpsWeight", d.EpsWeight, weight, grad=False, vmap=False),
    Case("VWeight", d.VWeight, weight, grad=False, vmap=False),
    *(
        Case(f"Preconditioned, {p}", network(p, schedule=s()), denoise, rtol=1e-4)
        for p, s in {
            "F": d.EDM,
            "eps": d.VP,
            "v": d.VP,
            "x0": d.Cosine,
            "velocity": d.CondOT,
            "score": d.VP,
        }.items()
    ),
    Case("GaussianDenoiser", lambda: d.GaussianDenoiser(jnp.ones(2), jnp.diag(jnp.array([1.0, 2.0]))), law, rtol=1e-4),
    Case("GaussianDenoiser, diagonal", lambda: d.GaussianDenoiser(jnp.ones(2), jnp.array([1.0, 2.0])), law, rtol=1e-4),
    Case("MixtureDenoiser", mixture, law, rtol=1e-4),
    Case(
        "EmpiricalDenoiser",
        lambda: d.EmpiricalDenoiser(jr.normal(jr.key(0), (5, 2)), labels=np.array([0, 0, 1, 1, 1])),
        law,
        rtol=1e-4,
    ),
    Case("DenoisingScoreMatching", d.DenoisingScoreMatching, objective, eager=False, rtol=1e-4),
    Case("FlowMatching", d.FlowMatching, objective, eager=False, rtol=1e-4),
]
