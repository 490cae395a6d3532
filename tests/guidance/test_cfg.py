"""Classifier-free guidance and intervals: identities, exact answers, and evaluations counted by a callback."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import quad

import genkit as gk


gd, gg = gk.diffusion, gk.guidance
GRID = gd.karras(8, 0.05, 20.0)


class Pair:
    """Two Gaussians, N(m, s_c^2) under the condition and N(0, s_u^2) without; counts what is evaluated."""

    def __init__(self, mean=1.0, cond_std=0.5, uncond_std=1.0):
        self.mean, self.cond_std, self.uncond_std, self.calls = mean, cond_std, uncond_std, []

    def __call__(self, x, sigma, cond=None):
        none = cond is None
        jax.debug.callback(lambda *_: self.calls.append("null" if none else "cond"), x)
        null = jnp.asarray(none) | (jnp.zeros((), bool) if none else cond < 0)
        mean, variance = jnp.where(null, 0.0, self.mean), jnp.where(null, self.uncond_std, self.cond_std) ** 2
        return mean + (x - mean) * variance / (variance + sigma**2)


def draw(guidance, *, table=None, pair=None, n=4, cond=0, skip="dynamic", **kwargs):
    pair = Pair() if pair is None else pair
    sampler = gk.Sampler(gd.heun(GRID) if table is None else table, guidance, skip=skip)
    draws = gk.sample(sampler, pair, n, key=jr.key(0), shape=(2,), cond=cond, **kwargs)
    jax.effects_barrier()
    assert len(pair.calls) == int(draws.nfe.sum())
    return draws


def same(first, second, rtol=1e-12):
    np.testing.assert_allclose(first.value, second.value, rtol=rtol, atol=1e-13)


def test_scale_one_is_off_and_evaluates_once(x64):
    pair = Pair()
    draws = draw(gg.cfg(1.0), pair=pair)
    same(draws, draw(None))
    assert draws.nfe.tolist() == [15] * 4 and set(pair.calls) == {"cond"}


def test_scale_zero_is_unconditional_and_evaluates_once(x64):
    pair = Pair()
    draws = draw(gg.cfg(0.0), pair=pair)
    same(draws, draw(None, cond=None))
    assert draws.nfe.tolist() == [15] * 4 and set(pair.calls) == {"null"}


def test_the_formula(x64):
    table = gd.ddim(np.array([2.0, 0.0]))
    start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    draws = draw(gg.cfg(3.0), table=table, x_init=start)
    cond = 1 + (np.asarray(start) - 1) * 0.25 / 4.25
    null = np.asarray(start) / 5
    np.testing.assert_allclose(draws.value, null + 3 * (cond - null), rtol=1e-12)
    assert draws.nfe.tolist() == draws.nfe_logical.tolist() == [2] * 4


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.0])
def test_guided_flow_of_gaussian_pairs_is_exact(scale, x64):
    # The guided probability flow of Gaussians is linear, with a closed solution for infinite initial noise:
    # std s_c^w s_u^(1-w), and the mean below.
    mean, cond_std, uncond_std = 1.0, 0.5, 1.0
    spread = cond_std**scale * uncond_std ** (1 - scale)
    delta, ratio = uncond_std**2 - cond_std**2, (cond_std / uncond_std) ** 2
    integral = quad(lambda y: (1 - y**2) ** (-1 - scale / 2), 0, np.sqrt(1 - ratio))[0]
    center = mean * scale * spread / np.sqrt(delta) * integral
    table = gd.unipc(gd.karras(200, 1e-3, 2000.0))
    start = jnp.array([[0.0, 2000.0]])
    value = gk.sample(table, Pair(), 1, key=jr.key(0), cond=0, x_init=start, guidance=gg.cfg(scale)).value[0]
    # sigma_max = 2000 leaves a relative error of the order of 1 / sigma_max in the mean.
    assert float(value[0]) == pytest.approx(center, abs=2e-3)
    assert float(value[1] - value[0]) == pytest.approx(spread, rel=2e-4)


def test_published_pair():
    # (m, s_c, s_u) = (1, 1/2, 1), w = 2, Heun with 64 steps from 80: mean 1.37323, standard deviation 0.25183.
    with jax.enable_x64(True):
        table = gd.heun(gd.karras(64, 0.002, 80.0))
        start = jnp.array([[0.0, 80.0]])
        value = gk.sample(table, Pair(), 1, key=jr.key(0), cond=0, x_init=start, guidance=gg.cfg(2.0)).value[0]
        # The state starts from N(0, 80^2), so the standard deviation is that slope itself.
        assert f"{float(value[0]):.4f}" == "1.3732"
        assert f"{float(value[1] - value[0]):.4f}" == "0.2518"


def test_interval_over_everything_is_cfg(x64):
    wide = draw(gg.interval(gg.cfg(3.0), 0.0, np.inf))
    same(wide, draw(gg.cfg(3.0)))
    assert wide.nfe.tolist() == [30] * 4


@pytest.mark.parametrize("skip", ["dynamic", "static", "compact"])
def test_interval_skips_outside(skip, x64):
    low, high = 0.3, 5.0
    table = gd.heun(GRID)
    draws = draw(gg.interval(gg.cfg(3.0), low, high), skip=skip)
    inside = (low < table.sigma_start) & (table.sigma_start <= high)
    assert draws.nfe.tolist() == draws.nfe_logical.tolist() == [15 + int(inside.sum())] * 4

    # By hand: both evaluations of a Heun step follow its start.
    x = np.asarray(draw(None, table=gd.ddim(GRID), trajectory=True).trajectory[:, 0])
    predict = lambda x, s, on: (
        (1 + (x - 1) * 0.25 / (0.25 + s**2)) * (3.0 if on else 1.0) - (2.0 if on else 0.0) * x / (1 + s**2)
    )
    for s, t in itertools.pairwise(GRID):
        on = low < s <= high
        slope = (x - predict(x, s, on)) / s
        after = x + (t - s) * slope
        if t > 0:
            after = x + (t - s) * (slope + (after - predict(after, t, on)) / t) / 2
        x = after
    np.testing.assert_allclose(draws.value, x, rtol=1e-11)


def test_interval_ends():
    # Lower end excluded, upper end included, at the start of the step.
    grid = np.array([4.0, 2.0, 1.0, 0.5])
    count = lambda low, high: int(draw(gg.interval(gg.cfg(2.0), low, high), table=gd.ddim(grid), n=1).nfe[0])
    assert [count(1.0, 4.0), count(1.0, 3.9), count(0.9, 4.0), count(4.0, 9.0)] == [5, 4, 6, 3]


def test_interval_of_an_off_guidance_evaluates_once():
    assert draw(gg.interval(gg.cfg(1.0), 0.3, 5.0)).nfe.tolist() == [15] * 4


def test_intervals_nest(x64):
    inner = gg.interval(gg.interval(gg.cfg(3.0), 0.3, 20.0), 0.0, 5.0)
    same(draw(inner), draw(gg.interval(gg.cfg(3.0), 0.3, 5.0)))


def test_sweeping_never_recompiles(compilations):
    pair, table = lambda x, sigma, cond=None: x / (1 + sigma**2) * (1.0 if cond is None else 0.5), gd.heun(GRID)
    scales = [0.0, 1.0, 2.5, jnp.asarray(7.0), np.float32(3.0), 4]
    ends = [(0.1, 1.0), (0.0, np.inf), (1, 5), (jnp.asarray(0.2), 3.0)]
    keys = jr.key(0)
    run = lambda guidance: gk.sample(table, pair, 2, key=keys, shape=(2,), cond=0, guidance=guidance)
    # Made beforehand: converting a Python number to an array may compile, once, and is not what is counted.
    first = [gg.cfg(s) for s in scales]
    second = [gg.interval(gg.cfg(2.0), *e) for e in ends]
    run(first[0]), run(second[0])
    with compilations() as count:
        counts = [np.asarray(run(g).nfe).tolist()[0] for g in first + second]
    assert count() == 0
    assert counts[:6] == [15, 15, 30, 30, 30, 30]


def test_unlabeled_draws_need_a_condition():
    with pytest.raises(ValueError, match="`cond` must be given"):
        draw(gg.cfg(2.0), cond=None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gg.cfg(np.nan), "scale"),
        (lambda: gg.cfg(np.ones((2, 2))), "scale"),
        (lambda: gg.interval(gg.cfg(2.0), 2.0, 1.0), "sigma_lo"),
        (lambda: gg.interval(gg.cfg(2.0), -1.0, 1.0), "sigma_lo"),
        (lambda: gg.interval(gg.cfg(2.0), np.nan, 1.0), "sigma_lo"),
    ],
)
def test_wrong_values(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_interval_of_something_else():
    with pytest.raises(TypeError, match="guidance"):
        gg.interval(3.0, 0.0, 1.0)
