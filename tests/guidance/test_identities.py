"""Identities between methods over whole draws, in float64: what must agree, agrees to ten digits."""

import itertools

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from guidance.tools import gd, gg, mixture, parts, predict

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")
LEVELS = gd.karras(8, 0.05, 8.0)
START = 8.0 * np.random.default_rng(3).normal(size=(6, 3))
COND = np.arange(6) % 4


def draw(guidance, *, table=None, model=None, **kwargs):
    table = gd.heun(LEVELS) if table is None else table
    model = mixture() if model is None else model
    return gk.sample(
        table, model, 6, cond=jnp.asarray(COND), x_init=jnp.asarray(START), guidance=guidance, key=jr.key(0), **kwargs
    )


def same(first, second, rtol=1e-10):
    np.testing.assert_allclose(first.value, second.value, rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_off_is_the_condition_at_one_pass():
    plain = draw(None)
    law = mixture()
    off = {
        "cfg": gg.cfg(1.0),
        "apg": gg.apg(1.0, momentum=-0.5),
        "negative": gg.negative(1.0, 2),
        "autoguide": gg.autoguide(law, 1.0),
        "perturbed": gg.perturbed(law, 0.0),
        "gfcg": gg.gfcg(lambda x0: jnp.append(x0, 0.0), 1.0),
    }
    for name, guidance in off.items():
        draws = draw(guidance)
        same(draws, plain)
        assert draws.nfe.tolist() == [15] * 6, name


@pytest.mark.slow
def test_scale_zero_is_unconditional():
    plain = gk.sample(gd.heun(LEVELS), mixture(), 6, x_init=jnp.asarray(START), key=jr.key(0))
    for guidance in (gg.cfg(0.0), gg.perpneg(0.0, 2)):
        draws = draw(guidance)
        same(draws, plain)
        assert draws.nfe.tolist() == [15] * 6


@pytest.mark.slow
def test_a_network_guided_by_itself_is_not_guided():
    law = mixture()
    guided = draw(gg.autoguide(law, 3.0), model=law)
    same(guided, draw(None, model=law))
    assert guided.nfe.tolist() == [30] * 6  # two slots: that the networks are the same one is not looked for


@pytest.mark.slow
def test_projection_without_its_parts_is_cfg():
    same(draw(gg.apg(4.0, eta=1.0, norm_threshold=np.inf)), draw(gg.cfg(4.0)))


@pytest.mark.slow
def test_cfgpp_is_cfg_on_a_schedule():
    with np.errstate(all="raise"):
        scales = 0.6 / (1 - LEVELS[1:] / LEVELS[:-1])
    for table in (gd.ddim(LEVELS), gd.heun(LEVELS), gd.dpmpp(LEVELS)):
        same(draw(gg.cfgpp(0.6), table=table), draw(gg.cfg(scales), table=table), rtol=1e-12)


@pytest.mark.slow
def test_cfgpp_is_the_published_recursion_under_ddim():
    law, x = mixture(), START
    predict_at = lambda x, s, c: np.stack(
        [np.asarray(law(jnp.asarray(y), s, None if c is None else k)) for y, k in zip(x, COND, strict=True)]
    )
    for s, t in itertools.pairwise(LEVELS):
        with_cond, without = predict_at(x, s, 1), predict_at(x, s, None)
        x = without + 0.6 * (with_cond - without) + t / s * (x - without)
    np.testing.assert_allclose(draw(gg.cfgpp(0.6), table=gd.ddim(LEVELS)).value, x, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_guidance_by_the_exact_classifier_is_cfg():
    law = mixture()
    log_prob = lambda x, sigma, cond: law.log_density(x, sigma, cond) - law.log_density(x, sigma) - np.log(4)
    same(draw(gg.classifier(log_prob, 3.0), model=law), draw(gg.cfg(3.0), model=law))


@pytest.mark.slow
def test_gates_that_are_always_open():
    plain = draw(gg.cfg(3.0))
    for gate in (
        gg.interval(gg.cfg(3.0), 0.0, np.inf),
        gg.interval(gg.cfg(3.0), 0.0, np.inf, per="evaluation"),
        gg.adaptive(gg.cfg(3.0), 1.1),
        gg.step_adaptive(gg.cfg(3.0), 8),
        gg.policy(gg.cfg(3.0), np.ones(8, bool)),
    ):
        draws = draw(gate)
        same(draws, plain)
        assert draws.nfe.tolist() == [30] * 6


@pytest.mark.slow
def test_interval_by_steps_and_by_evaluations():
    table = gd.heun(LEVELS)
    inside = lambda level: (np.asarray(level) > 0.3) & (np.asarray(level) <= 3.0)
    for per, level in (("step", table.sigma_start), ("evaluation", table.sigma)):
        draws = draw(gg.interval(gg.cfg(3.0), 0.3, 3.0, per=per))
        assert draws.nfe.tolist() == [15 + int(inside(level).sum())] * 6
    # Where every evaluation starts a step, they are the same.
    first, second = (
        draw(gg.interval(gg.cfg(3.0), 0.3, 3.0, per=per), table=gd.ddim(LEVELS)) for per in ("step", "evaluation")
    )
    same(first, second)
    with pytest.raises(ValueError, match="per"):
        gg.interval(gg.cfg(3.0), 0.3, 3.0, per="row")


@pytest.mark.parametrize(
    "target", ["v", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eps", "score", "velocity"))]
)
def test_linear_sums_are_the_same_in_every_space(target):
    # Weights that sum to one commute with every conversion, which is affine in the prediction.
    x, with_cond, without, away = parts(other=2)
    schedule = {"velocity": gd.CondOT()}.get(target, gd.VP(0.1, 20.0))
    t = schedule.time(jnp.asarray(0.8))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    rates = {"alpha_dot": schedule.alpha_dot(t), "sigma_dot": schedule.sigma_dot(t)} if target == "velocity" else {}
    there = lambda d: gd.convert(jnp.asarray(d), "x0", target, alpha * x, alpha, sigma, **rates)
    mixed = there(without) + 3 * (there(with_cond) - there(without)) + 0.5 * (there(with_cond) - there(away))
    back = gd.convert(mixed, target, "x0", alpha * x, alpha, sigma, **rates)
    np.testing.assert_allclose(predict(gg.cfg(3.0) + gg.negative(1.5, 2))[0], back, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("skip", ["dynamic", "compact", "static", "phases"])
def test_batched_is_one_by_one_under_every_plan(skip):
    guidance = gg.rescale(gg.interval(gg.cfg(3.0) + gg.apg(2.0, momentum=-0.5), 0.1, 4.0), 0.3)
    sampler = gk.Sampler(gd.heun(LEVELS), guidance, skip=skip)
    same(draw(None, table=sampler), draw(None, table=sampler, batch_size=1))
