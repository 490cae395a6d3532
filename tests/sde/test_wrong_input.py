"""What a user can get wrong: every error names the argument, what came, and where."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest

import genkit.noise as gn
import genkit.sde as gs
from genkit.sde._model import _check_coefficient
from genkit.sde._simulate import check_parts


CHEAP = gn.ma_fbm(2, 0.1, 10.0)
DRIFT, ONE, NOISE = gs.OrnsteinUhlenbeck(1.0), gs.Constant(1.0), gs.GaussianNoise(0.1)
TS = np.array([0.5, 1.0])


def model(
    drift: Any = DRIFT, diffusion: Any = ONE, lift: Any = CHEAP, hurst: Any = 0.5, horizon: Any = 1.0, **kwargs: Any
):
    return gs.FractionalSDE(drift, diffusion, lift, hurst, horizon, **kwargs)


def student(x):
    return dist.StudentT(4.0, x, 0.1)


def neural(sde, observed, **kwargs):
    return gs.NeuralGuide(sde, observed, width=4, depth=1, key=jr.key(0), **kwargs)


def refuses(cases):
    for match, call in cases:
        with pytest.raises(ValueError, match=match):
            call()


def test_coefficients_are_named():
    pair = {"x0": np.zeros(2)}
    state = (jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((1,), np.float32))
    refuses([
        ("`diffusion`.*diagonal", lambda: model(diffusion=gs.Constant(np.eye(2)), **pair)),
        ("`diffusion`.*coordinates", lambda: model(diffusion=gs.Constant(np.ones(3)))),
        ("`drift`.*coordinates", lambda: model(drift=gs.OrnsteinUhlenbeck(np.ones(3)), **pair)),
        ("`diffusion`.*0.5.*Constant", lambda: _check_coefficient("diffusion", 0.5, state, "", ((1,),))),
        ("`drift`.*function.*got 0.5", lambda: _check_coefficient("drift", 0.5, state, "", ((1,),))),
        ("`horizon`.*finite", lambda: model(horizon=np.inf)),
        ("`horizon`.*finite", lambda: model(horizon=1e40)),
    ])  # fmt: skip


def test_a_hurst_function_is_looked_at_where_the_steps_are():
    leaves = model(hurst=lambda t: 0.5 + t)
    observed = gs.Observed(TS, np.zeros(2), NOISE)
    where = r"`hurst`.*\[0.01, 0.99\].*got 1.0 at t = 0.5"
    refuses([
        (where, lambda: gs.simulate(leaves, TS, key=jr.key(0))),
        (where, lambda: gs.kalman(leaves, observed, steps_per_interval=1)),
        (where, lambda: gs.LinearGuide(leaves, observed)),
        (r"-0.0.* at t = 0.75", lambda: gs.simulate(model(hurst=lambda t: jnp.array([0.5, 0.7 - t]), x0=np.zeros(2)),
                                                    TS, key=jr.key(0))),
        ("`hurst`.*0.5 with lift=brownian", lambda: model(lift=gn.brownian(), hurst=lambda t: 0.5 + 0.3 * t)),
        ("`hurst`.*0.5 with lift=brownian", lambda: model(lift=gn.brownian(), hurst=gs.LearnedHurst(0.6))),
        ("`hurst`.*bounds", lambda: model(hurst=gs.LearnedHurst(0.5, lo=0.001, hi=0.9))),
        ("`hurst`.*bounds", lambda: model(hurst=gs.LearnedHurst(0.5, hi=0.999))),
    ])  # fmt: skip
    late = gs.simulate(leaves, np.array([0.2, 0.4]), key=jr.key(1)).x  # what is not reached does no harm
    assert bool(jnp.isfinite(late).all())


def test_rows_that_do_not_fit_the_likelihood():
    sde, wide = model(), gs.Observed(TS, np.ones((2, 2)), student)
    guide = neural(sde, wide)
    pair, thin = model(x0=np.zeros(2)), gs.Observed(TS, np.ones(2), NOISE)
    unlike = gs.Observed(TS, np.ones((2, 2, 3)), lambda x: dist.Normal(jnp.zeros((3, 2)) + x, 1.0))
    refuses([
        (r"`y`.*1 entries a row.*\(2,\)", lambda: gs.elbo(sde, guide, wide, key=jr.key(0))),
        (r"`y`.*1 entries a row.*\(2,\)", lambda: gs.iwelbo(sde, guide, wide, key=jr.key(0))),
        (r"`y`.*1 entries a row.*\(2,\)", lambda: gs.forecast(sde, guide, wide, TS, num_paths=2, key=jr.key(0))),
        (r"`y`.*2 entries a row.*\(1,\)", lambda: gs.elbo(pair, neural(pair, thin, linear=False), thin,
                                                          key=jr.key(0))),
        (r"`y`.*\(3, 2\).*\(2, 3\)", lambda: unlike.log_likelihood(jnp.zeros((2, 1)))),
        ("`y`.*one row per time", lambda: gs.Observed(TS[:1], 0.3, NOISE)),
    ])  # fmt: skip
    assert gs.Observed(TS, np.ones((2, 6)), unlike.likelihood).log_likelihood(jnp.zeros((2, 1))).shape == ()


def test_guides_of_other_models_and_observations():
    sde, observed = model(), gs.Observed(TS, np.ones(2), NOISE)
    linear, net = gs.LinearGuide(sde, observed), neural(sde, observed, linear=False)
    fewer = gs.Observed(TS[:1], np.ones(1), NOISE)
    pair = gs.Observed(TS, np.ones((2, 2)), NOISE)
    other = model(lift=gn.ma_fbm(3, 0.1, 10.0))
    second = model(lift=gn.ma_fbm(2, 0.1, 10.0, kind="II"))
    wide, varying = model(x0=np.zeros(2)), model(hurst=lambda t: 0.3)
    cases = []
    for guide in (linear, net):
        cases += [
            ("`guide`.*dim = 2; got one made for 1", lambda g=guide: gs.elbo(wide, g, pair, key=jr.key(0))),
            ("`guide`.*= 3; got one made for 2", lambda g=guide: gs.elbo(other, g, observed, key=jr.key(0))),
            ("`guide`.*rank = 0", lambda g=guide: gs.elbo(second, g, observed, key=jr.key(0))),
            ("`guide`.*got one made for", lambda g=guide: gs.elbo(varying, g, observed, key=jr.key(0))),
            ("`guide`.*made for 1 observation times.*for 2", lambda g=guide: gs.elbo(sde, g, fewer, key=jr.key(0))),
            ("`guide`.*observation times", lambda g=guide: gs.forecast(sde, g, fewer, TS, num_paths=2, key=jr.key(0))),
            ("`guide`.*dim = 2", lambda g=guide: gs.simulate(wide, TS, guide=g, key=jr.key(0))),
        ]  # fmt: skip
    cases += [
        ("`guide`.*step = exact", lambda: gs.elbo(model(step="exact"), linear, observed, key=jr.key(0))),
        # Run-time type checks, on in tests alone, would come first.
        ("`guide`.*NoneType.*LinearGuide", lambda: check_parts(sde, None, observed)),
        ("`guide`.*Observed.*order", lambda: check_parts(sde, observed, linear)),
        ("`sde`.*LinearGuide.*order", lambda: check_parts(linear, sde, observed)),
        ("`observed`.*LinearGuide", lambda: check_parts(sde, linear, linear)),
    ]
    refuses(cases)
    check_parts(sde, None, optional=True)
    for guide in (linear, net):
        check_parts(sde, guide, observed)
        check_parts(model(hurst=0.8, step="exponential"), guide, observed)


def test_observations_beyond_the_horizon_of_a_neural_guide():
    sde, late = model(), gs.Observed(np.array([0.5, 1.5]), np.ones(2), student)
    guide = neural(sde, late)
    refuses([
        (r"`observed.ts`.*horizon.*1.5", lambda: gs.elbo(sde, guide, late, key=jr.key(0))),
        (r"`observed.ts of the guide`.*horizon.*1.5", lambda: gs.simulate(sde, TS, guide=guide, key=jr.key(0))),
    ])  # fmt: skip


def test_too_many_steps():
    refuses([("`max_step`.*at most", lambda: gs.simulate(model(), TS, max_step=1e-30, key=jr.key(0)))])


@pytest.mark.key_reuse  # the same key again, on purpose
def test_a_blow_up_in_the_first_step_names_the_initial_state():
    steep = model(drift=lambda t, x: x**3, lift=gn.brownian(), x0=1e30)
    observed = gs.Observed(TS, np.ones(2), student)
    where = r"blew up in step 0 \(t = 0, length 0.5\), state before it \[1.e\+30\]"
    guide = neural(steep, observed)
    refuses([
        (where, lambda: gs.simulate(steep, TS, key=jr.key(0))),
        (where, lambda: gs.elbo(steep, guide, observed, num_particles=2, key=jr.key(0))),
    ])  # fmt: skip


@pytest.mark.slow
def test_a_blow_up_after_the_last_observation():
    bend = lambda t, x: jnp.where(t > 0.6, 1e30 * (1 + x**2) ** 3, -x)
    observed = gs.Observed(np.array([0.5]), np.ones(1), student)
    sde = model(drift=bend)
    guide = neural(sde, observed)
    times = np.array([0.5, 0.75, 1.0])
    refuses([("blew up in step [12]", lambda: gs.forecast(sde, guide, observed, times, num_paths=2, key=jr.key(0)))])


@pytest.mark.key_reuse  # the same key again, on purpose
def test_an_undefined_likelihood_is_told_from_a_blow_up():
    sde = model(lift=gn.brownian(), x0=-1.0, diffusion=gs.Constant(0.01))
    counts = gs.Observed(np.array([0.25, 0.5]), np.array([1, 2]), lambda x: dist.Poisson(jnp.sqrt(x + 0.7)))
    guide = neural(sde, counts)
    where = r"`likelihood`.*got nan at observation 0 \(t = 0.25, y = \[1.\]\) for the state \[-0.7"
    refuses([
        (where, lambda: gs.elbo(sde, guide, counts, num_particles=2, key=jr.key(0))),
        (where, lambda: gs.forecast(sde, guide, counts, np.array([0.25]), num_paths=2, key=jr.key(0))),
    ])  # fmt: skip


@pytest.mark.slow
@pytest.mark.key_reuse  # the same key again, on purpose
def test_impossible_paths_weigh_nothing():
    """A density of zero is an answer, not an error, as long as some path is possible."""
    sde = model(lift=gn.brownian(), diffusion=gs.Constant(0.5))

    strict = lambda half: lambda x: Inside(x, half)
    near, far = (gs.Observed(TS[:1], np.array([y]), strict(0.3)) for y in (0.0, 50.0))
    guide = neural(sde, near)
    draws = gs.log_weights(sde, guide, near, num_particles=64, key=jr.key(0))
    assert bool(jnp.isneginf(draws).any())
    assert bool(jnp.isfinite(draws).any())
    bound = gs.iwelbo(sde, guide, near, num_particles=64, key=jr.key(0))
    np.testing.assert_allclose(bound, jax.nn.logsumexp(draws) - np.log(64), rtol=1e-6)
    assert float(gs.forecast(sde, guide, near, TS, num_paths=64, key=jr.key(0)).ess) > 1
    with pytest.raises(ValueError, match="`observed`.*none of 64"):
        gs.forecast(sde, neural(sde, far), far, TS, num_paths=64, key=jr.key(0))


class Inside(dist.Uniform):
    """A uniform law around x that is strict about its support."""

    def __init__(self, x, half):
        super().__init__(x - half, x + half)

    def log_prob(self, value):
        return jnp.where((value >= self.low) & (value <= self.high), super().log_prob(value), -jnp.inf)


def test_laws_of_the_start_that_no_guide_can_take():
    for law, match in (
        (dist.Dirichlet(jnp.ones(2)), "`x0`.*Simplex"),
        (dist.Poisson(1.0), "`x0`.*Integer"),
        (dist.HalfCauchy(1.0), "`x0`.*finite mean and variance"),
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), dist.transforms.SigmoidTransform()), "`x0`.*gives none"),
    ):
        sde = model(lift=gn.brownian(), x0=law)
        observed = gs.Observed(TS[:1], np.ones((1, sde.dim)), student)
        guide = neural(sde, observed)
        with pytest.raises(ValueError, match=match):
            gs.elbo(sde, guide, observed, key=jr.key(1))
