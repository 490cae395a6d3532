"""Steering, exact products by weights, and reflection: known laws and evidences, evaluations counted."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stats import z_score

import genkit as gk


gd, gg = gk.diffusion, gk.guidance


def normal(mean=0.0, variance=1.0):
    return gd.GaussianDenoiser(jnp.full(1, mean), jnp.asarray(variance))


def pair():
    """N(1, 1/4) under label 0, N(-1/2, 1) under label 1, N(0, 4) under label 2, N(0, 1) without."""
    laws = [normal(1.0, 0.25), normal(-0.5, 1.0), normal(0.0, 4.0), normal()]

    def denoise(x, sigma, cond=None):
        label = 3 if cond is None else jnp.where(cond < 0, 3, cond)
        return jnp.stack([law(x, sigma) for law in laws])[label]

    return denoise


FINE = gd.ancestral(gd.karras(400, 0.005, 10.0))


# Steering.


def test_steering_tilts_a_gaussian():
    # Reward 1.5 x on N(0, 1): the target is N(1.5, 1), the evidence exp(9 / 8).
    k, scale = 2048, 1.5
    draws = gk.sample(FINE, normal(), k, guidance=gg.steer(lambda x0: scale * x0[0], k), key=jr.key(0))
    value = np.asarray(draws.value)[:, 0]
    # Resampling correlates the particles: their effective number is taken to be a tenth.
    error = z_score(3) / np.sqrt(k / 10)
    assert abs(value.mean() - scale) < error and abs(value.std() - 1) < error
    assert abs(float(draws.info["log_evidence"][0]) - scale**2 / 2) < error
    assert draws.nfe.tolist() == [400] * k


def own_variance(table, variance=1.0):
    """Variance of the draws of N(0, variance) by a table of first-order steps: its own law, which is linear."""
    total = float(table.sigma[0]) ** 2
    columns = (np.asarray(column, float) for column in (table.sigma, table.a, table.c))
    for s, kept, fresh in zip(*columns, strict=True):
        total = (kept + (1 - kept) * variance / (variance + s**2)) ** 2 * total + fresh**2
    return total


@pytest.mark.parametrize("make", [gd.euler_maruyama, gd.ancestral, gd.reverse_diffusion])
def test_steering_tilts_the_law_of_the_sampler_itself(make):
    # Gains in reward telescope, so that coarse steps steer exactly, too: towards the tilt of what they draw unguided.
    table, k, scale = make(gd.karras(64, 0.005, 10.0)), 2048, 1.5
    variance = own_variance(table)
    draws = gk.sample(table, normal(), k, guidance=gg.steer(lambda x0: scale * x0[0], k), key=jr.key(0))
    value, error = np.asarray(draws.value)[:, 0], z_score(3) / np.sqrt(k / 10)
    assert abs(value.mean() - scale * variance) < error and abs(value.std() - variance**0.5) < error
    assert abs(float(draws.info["log_evidence"][0]) - scale**2 * variance / 2) < error


STEERING = [  # weight of the reward, particles, mean
    (1.5, 4, 0.894),
    (1.5, 64, 1.418),
    (1.5, 4096, 1.5),
    (3.0, 4, 1.477),
    (3.0, 64, 2.755),
    (3.0, 4096, 3.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "k", "mean"), STEERING)
def test_steering_by_the_exact_reverse_kernel(scale, k, mean):
    # D6: 64 steps of the exact kernel of N(0, 1), a look at the weights in every fourth: the target is N(scale, 1), and
    # its evidence scale^2 / 2, to any number of steps. Few particles fall short by a known amount.
    grid = gd.karras(64, 0.005, 20.0)
    table = gd.ancestral(grid)
    s, t = grid[:-1], grid[1:]
    table = eqx.tree_at(lambda rows: rows.c, table, np.sqrt((1 + t**2) * (s**2 - t**2) / (1 + s**2)))
    assert own_variance(table) == pytest.approx(1, abs=0.01)
    n = 16 * 4096
    steering = gg.steer(lambda x0: scale * x0[0], k, every=4)
    draws = gk.sample(table, normal(), n, guidance=steering, key=jr.key(0), batch_size=4 * 4096)
    found, evidence = float(draws.value.mean()), np.exp(np.asarray(draws.info["log_evidence"], float))
    # For few particles the reference is one run of other steps: within a tenth. For many the law itself is known.
    assert found == pytest.approx(mean, abs=0.1 if k < 4096 else 0.05)
    # The evidence is unbiased for any number of particles, though not its logarithm.
    if scale == 1.5:
        error = z_score(6) * evidence.std(ddof=1) / np.sqrt(len(evidence))
        assert abs(evidence.mean() - np.exp(scale**2 * own_variance(table) / 2)) < error


def test_few_particles_are_biased_and_weights_may_be_kept():
    # One table of 16 populations of 4: the mean falls short of the target, as it must.
    steering = lambda **kw: gg.steer(lambda x0: 1.5 * x0[0], 4, **kw)
    draw = lambda g: gk.sample(gd.ancestral(gd.karras(60, 0.01, 10.0)), normal(), 1024, guidance=g, key=jr.key(1))
    few = draw(steering())
    assert 0.5 < float(few.value.mean()) < 1.2
    assert few.info["log_evidence"].shape == (256,) and not few.info["log_weights"].any()
    # Never resampled and never moved: draws of the prior with weights exp(r), to rounding.
    weighted = draw(steering(ess=0.0, resample_last=False))
    plain = draw(None)
    np.testing.assert_allclose(weighted.value, plain.value, rtol=1e-5, atol=1e-6)
    rewards = 1.5 * np.asarray(plain.value).reshape(256, 4)
    np.testing.assert_allclose(weighted.info["log_weights"], rewards, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(weighted.info["log_evidence"], np.log(np.exp(rewards).mean(1)), rtol=1e-4, atol=1e-4)


def test_a_reward_that_fails_removes_the_particle():
    forbidden = lambda x0: jnp.where(x0[0] < 0, jnp.nan, 0.0)
    table = gd.ancestral(gd.karras(60, 0.01, 10.0))
    draws = gk.sample(table, normal(), 256, guidance=gg.steer(forbidden, 256), key=jr.key(2))
    assert float(draws.value.min()) >= 0 and int(draws.info["reward_failed"][0]) > 0
    assert np.isfinite(draws.info["log_evidence"]).all()


# Products by weights.


@pytest.mark.parametrize(
    "make",
    [gd.ancestral, *(pytest.param(m, marks=pytest.mark.slow) for m in (gd.euler_maruyama, gd.reverse_diffusion))],
)
@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({0: 2.0, None: -1.0}, [(1.0, 0.25, 2.0), (0.0, 1.0, -1.0)]),
        ({0: 2.0}, [(1.0, 0.25, 2.0)]),
        ({0: 1.0, 1: 1.0, 2: -1.0}, [(1.0, 0.25, 1.0), (-0.5, 1.0, 1.0), (0.0, 4.0, -1.0)]),
    ],
)
def test_products_by_weights(weights, parts, make):
    precision = sum(w / v for _, v, w in parts)
    mean = sum(w * m / v for m, v, w in parts) / precision
    # log of the integral of the product of Gaussians to powers.
    evidence = sum(-w * (m**2 / v + np.log(2 * np.pi * v)) / 2 for m, v, w in parts)
    evidence += precision * mean**2 / 2 + np.log(2 * np.pi / precision) / 2
    k = 2048
    table = make(gd.karras(400, 0.005, 10.0))
    draws = gk.sample(table, pair(), k, shape=(1,), guidance=gg.fkc(weights, k), key=jr.key(3))
    value = np.asarray(draws.value)[:, 0]
    # Effective number a tenth, as above, and the error of 400 steps, of the order of a hundredth.
    sd, error = precision**-0.5, z_score(3) / np.sqrt(k / 10)
    assert abs(value.mean() - mean) < sd * error + 0.01
    assert abs(value.std() - sd) < sd * error + 0.01
    assert abs(float(draws.info["log_evidence"][0]) - evidence) < error + 0.05
    assert draws.nfe.tolist() == [400 * len(weights)] * k


@pytest.mark.slow
def test_exact_guidance_differs_from_guidance():
    # D2: (m, s_c, s_u) = (1, 1/2, 1), w = 2: tilted mean 1.143 and standard deviation .378; guidance 1.373, .252.
    k = 2048
    exact = gk.sample(
        FINE, pair(), k, shape=(1,), cond=0, guidance=gg.fkc({"given": 2.0, None: -1.0}, k), key=jr.key(4)
    )
    guided = gk.sample(
        gd.heun(gd.karras(64, 0.002, 80.0)), pair(), k, shape=(1,), cond=0, guidance=gg.cfg(2.0), key=jr.key(4)
    )
    error = z_score(2) / np.sqrt(k / 10)
    assert (
        abs(float(exact.value.mean()) - 1.143) < 0.378 * error and abs(float(exact.value.std()) - 0.378) < 0.378 * error
    )
    assert abs(float(guided.value.mean()) - 1.373) < 0.252 * error and float(guided.value.std()) < 0.3


def test_populations_want_noise():
    for guidance, name in ((gg.steer(lambda x0: x0[0], 4), "steer"), (gg.fkc({0: 2.0}, 4), "fkc")):
        for table in (
            gd.ddim(gd.karras(8, 0.1, 5.0)),
            gd.heun(gd.karras(8, 0.1, 5.0)),
            gd.ddim(gd.karras(8, 0.1, 5.0), 0.5),
            gd.unipc(gd.karras(8, 0.1, 5.0)),
        ):
            with pytest.raises(ValueError, match=rf"{name}.*noise.*ancestral"):
                gk.sample(table, pair(), 4, shape=(1,), guidance=guidance, key=jr.key(0))


# Reflection.


def by_hand(grid, start, strong, weak, active, level="next"):
    """DDIM with reflection, in numpy."""
    x = np.asarray(start, np.float64)
    step = lambda y, s, t, law, at: law(y, at) + t / s * (y - law(y, at))
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        if i < len(grid) - 2 and t > 0 and active(s):
            after = step(x, s, t, strong, s)
            x = step(after, t, s, weak, t if level == "next" else s)
        x = step(x, s, t, strong, s)
    return x


@pytest.mark.parametrize("level", ["next", "start"])
def test_reflection(level, x64):
    grid = gd.karras(6, 0.1, 5.0)
    strong, weak = normal(1.0, 0.5), normal(0.2, 2.0)
    laws = [lambda y, s, m=m, v=v: m + (y - m) * v / (v + s**2) for m, v in ((1.0, 0.5), (0.2, 2.0))]
    start = jnp.asarray(5 * np.random.default_rng(0).normal(size=(4, 1)))
    reflection = gg.reflect(weak, 0.3, 4.0, level=level)
    draws = gk.sample(gd.ddim(grid), strong, 4, x_init=start, guidance=reflection, key=jr.key(0))
    active = lambda s: 0.3 < s <= 4.0
    np.testing.assert_allclose(draws.value, by_hand(grid, start, *laws, active, level), rtol=1e-10)
    assert draws.nfe.tolist() == [6 + 2 * sum(active(s) for s in grid[:-2])] * 4


def test_reflection_on_itself_vanishes_with_the_step(x64):
    strong, start = normal(1.0, 0.5), jnp.asarray([[3.0], [-2.0]])
    move = []
    for num_steps in (20, 40):
        table = gd.ddim(gd.karras(num_steps, 0.1, 5.0))
        plain = gk.sample(table, strong, 2, x_init=start, key=jr.key(0))
        mirrored = gk.sample(table, strong, 2, x_init=start, guidance=gg.reflect(strong), key=jr.key(0))
        move.append(float(jnp.max(jnp.abs(mirrored.value - plain.value))))
    assert move[1] < 0.6 * move[0]


def test_reflection_is_guidance_by_the_weak_model_to_first_order(x64):
    # One reflection moves the state by sigma (sigma - sigma') (s_strong - s_weak).
    strong, weak, x = normal(1.0, 0.5), normal(0.2, 2.0), jnp.asarray([[0.7]])
    ratio = []
    for step in (0.02, 0.01):
        grid = np.array([1.0, 1.0 - step, 0.9])
        run = lambda g, grid=grid: float(
            gk.sample(gd.ddim(grid), strong, 1, x_init=x, guidance=g, key=jr.key(0)).value[0, 0]
        )
        score = float(strong(x[0], 1.0)[0] - weak(x[0], 1.0)[0])
        ratio.append((run(gg.reflect(weak)) - run(None)) / (step * score))
    # What is left of the move after the rest of the flow, the same for both; the rest is of second order.
    assert ratio[0] == pytest.approx(ratio[1], rel=0.03) and 0.7 < ratio[1] < 1.0


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: gg.steer(lambda x: x, 1), ValueError, "num_particles"),
        (lambda: gg.steer(3.0, 4), TypeError, "reward"),
        (lambda: gg.steer(lambda x: x, 4, ess=1.5), ValueError, "ess"),
        (lambda: gg.steer(lambda x: x, 4, every=0), ValueError, "every"),
        (lambda: gg.fkc({}, 4), ValueError, "weights"),
        (lambda: gg.fkc({"null": 1.0}, 4), ValueError, "weights"),
        (lambda: gg.reflect(3.0), TypeError, "weak"),
        (lambda: gg.reflect(normal(), 2.0, 1.0), ValueError, "sigma_lo"),
        (lambda: gg.reflect(normal(), level="now"), ValueError, "level"),
    ],
)
def test_wrong_values(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_wrong_rewards():
    with pytest.raises(ValueError, match="reward"):
        gk.sample(FINE, normal(), 4, guidance=gg.steer(lambda x0: x0, 4), key=jr.key(0))
