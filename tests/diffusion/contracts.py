"""Contract cases of schedules, denoisers, weights and objectives."""

import jax
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


def path(s):
    t = jnp.array([0.1, 0.5, 0.9])
    return s.alpha(t), s.sigma(t), s.time(s.noise_level(t))


def sampled(sampler):
    model = d.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
    keys = jax.vmap(jr.key)(jnp.arange(2))
    return sampler.draw(model, keys, cond=None, x_init=jr.normal(jr.key(1), (2, 2)), shape=(2,)).value


def trace(t):
    z = jnp.ones(3)
    return t(lambda z: z**2, z, t.probes(z, jr.key(0)))


def score(objective):
    return objective(jax.tree_util.Partial(jnp.negative), jr.normal(jr.key(1), (4, 2)), key=jr.key(3))[0]


def bound(objective):
    model = d.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
    return objective(model, jr.normal(jr.key(1), (4, 2)), key=jr.key(3))[0]


def couple(coupling):
    x = jr.normal(jr.key(1), (2, 4, 2))
    return coupling(x[0], x[1], None, key=jr.key(2))[1]


def white():
    return d.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))


def short(make=d.ancestral):
    return make(d.karras(2, 0.1, 5.0))


def table_error():
    return d.exact_error(short(), white())


def log_prob():
    zero = jnp.zeros(())
    return d.LogProb(zero, zero, jnp.zeros((), int), jnp.zeros(2), zero, zero, jnp.ones((), bool))


def measured(method):
    return lambda: d.Measurement(white(), jnp.array([[1.0, 2.0]]), jnp.ones(1), 0.3, method)


FIXED = {"grad": False, "vmap": False}
CASES += [
    Case("Tabulated", lambda: d.Tabulated(np.array([6.0, 1.0, -5.0])), path, rtol=1e-4, eager=False),
    Case("Polynomial", lambda: d.Polynomial(2.0), path, rtol=1e-4, eager=False),
    Case("Shifted", lambda: d.Shifted(d.CondOT(), 2.0), path, rtol=1e-4, eager=False),
    Case("Discrete", lambda: d.Discrete(np.array([0.1, 0.2, 0.3])), path, rtol=1e-4, eager=False),
    Case("KineticOptimal", lambda: d.KineticOptimal(np.zeros_like, num_nodes=16), path, rtol=1e-4, eager=False),
    Case("ExactTrace", d.ExactTrace, trace, eager=False, **FIXED),
    Case("Hutchinson", lambda: d.Hutchinson(2), trace, eager=False, **FIXED),
    Case("ExactError", table_error),
    Case("LogProb", log_prob),
    Case("FlowMeasure", lambda: d.FlowMeasure(white(), 0.1, 5.0)),
    Case("probability_flow", lambda: d.probability_flow(0.1, 5.0)),
    Case("Teleported", lambda: d.Teleported(short(), white(), 20.0)),
    Case("Replacement", lambda: d.Replacement(np.array([1.0, 0.0]), np.ones(2))),
    Case("DDRM", lambda: d.DDRM(d.karras(2, 0.1, 5.0), np.eye(2)[:1], np.ones(1), 0.3), sampled, eager=False, **FIXED),
    Case("PredictorCorrector", lambda: d.predictor_corrector(d.karras(2, 0.1, 5.0)), sampled, eager=False, **FIXED),
    Case("BrownianNoise", lambda: d.BrownianNoise(0.1, 5.0)),
    Case("Measurement", measured("mmps"), denoise, rtol=1e-4, eager=False),
    Case("Measurement, dps", measured("dps"), denoise, rtol=1e-4, eager=False),
    Case("IndependentCoupling", d.IndependentCoupling, couple, eager=False, **FIXED),
    Case("MinibatchOT", lambda: d.MinibatchOT(0.5), couple, eager=False, **FIXED),
    Case("ImplicitScoreMatching", d.ImplicitScoreMatching, score, eager=False, **FIXED),
    Case("SlicedScoreMatching", lambda: d.SlicedScoreMatching(2), score, eager=False, **FIXED),
    Case("LikelihoodBound", lambda: d.LikelihoodBound(0.1, 5.0), bound, eager=False, rtol=1e-4),
    Case(
        "VariationalBound", lambda: d.VariationalBound(d.karras(4, 0.1, 5.0, final=None)), bound, eager=False, rtol=1e-4
    ),
    Case("LearnedWeighting", d.LearnedWeighting),
    Case("WithUncertainty", lambda: d.WithUncertainty(white(), key=jr.key(0)), denoise, eager=False),
    Case("PowerEMA", lambda: d.PowerEMA.start(jnp.zeros(2))),
]
