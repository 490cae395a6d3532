"""Contract cases of stochastic differential equations."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from contract import Case

import genkit as gk


s = gk.sde
TS = np.array([0.5, 1.0])


def sde(hurst=None):
    lift = gk.noise.ma_fbm(2, 0.1, 10.0)
    return s.FractionalSDE(
        s.OrnsteinUhlenbeck(1.0), s.Constant(0.5), lift, 0.7 if hurst is None else hurst, 1.0, x0=np.zeros(1)
    )


def observed():
    return s.Observed(TS, jnp.array([0.3, 0.1]), s.GaussianNoise(0.1))


def neural():
    return s.NeuralGuide(sde(), observed(), width=4, depth=1, key=jr.key(0))


def latent():
    model = sde(s.LearnedHurst(0.6))
    noise = s.GaussianNoise(0.5)
    guide = s.NeuralGuide(model, s.Observed(TS, jnp.zeros(2), noise), width=4, depth=1, linear=False, key=jr.key(0))
    return s.LatentSDE(model, noise, guide)


def objective(value):
    return value(latent(), jr.normal(jr.key(1), (2, 2, 1)), key=jr.key(3))[0]


def coefficient(f):
    return f(jnp.asarray(0.1), jnp.ones(2))


def path(model):
    return s.simulate(model, TS, key=jr.key(1)).x


def bound(guide):
    return s.elbo(sde(), guide, observed(), num_particles=2, key=jr.key(1))


def likelihood(noise):
    return noise(jnp.ones(2)).log_prob(jnp.zeros(2))


def forecast():
    guide = s.LinearGuide(sde(), observed())
    return s.forecast(sde(), guide, observed(), np.array([0.2, 0.7]), num_paths=3, key=jr.key(0))


CASES = [
    Case("OrnsteinUhlenbeck", lambda: s.OrnsteinUhlenbeck(2.0, mean=1.0), coefficient),
    Case("Constant", lambda: s.Constant(0.5), coefficient),
    Case("LearnedHurst", lambda: s.LearnedHurst(0.3), lambda h: h.value),
    Case("GaussianNoise", lambda: s.GaussianNoise(0.1), likelihood),
    Case("Observed", observed, lambda o: o.log_likelihood(jnp.ones((2, 1)))),
    # The programs below are deep, hence compared under compilation alone; a stack of clocks is not a clock.
    Case("FractionalSDE", sde, path, eager=False, vmap=False, rtol=1e-3),
    Case("LinearGuide", lambda: s.LinearGuide(sde(), observed()), bound, eager=False, vmap=False, rtol=1e-3),
    Case("NeuralGuide", neural, bound, eager=False, vmap=False, rtol=1e-3),
    Case("LatentSDE", latent, lambda m: path(m.sde), eager=False, vmap=False, rtol=1e-3),
    Case("NegativeELBO", lambda: s.NegativeELBO(TS), objective, grad=False, eager=False, vmap=False, rtol=1e-3),
    Case("PathSampler", lambda: s.PathSampler(2), lambda p: p.draw(latent(), jr.split(jr.key(0), 2), cond=None,
         x_init=None, shape=(2, 1)).value, grad=False, eager=False, vmap=False),
    Case("Paths", lambda: s.simulate(sde(), TS, key=jr.key(0)), lambda p: p.x),
    Case("Forecast", forecast, lambda f: f.ess),
    Case("FractionalSDE, law of the start", lambda: s.FractionalSDE(s.OrnsteinUhlenbeck(1.0), s.Constant(0.5),
         gk.noise.brownian(), 0.5, 1.0, x0=dist.Normal(jnp.zeros(2), jnp.ones(2)))),
]  # fmt: skip
