"""Digits: bits per dimension on the held-out split, paths beside each other, what teleportation saves, inpainting.

These train models: run them by hand with `-m long`. Figures and the picture's place: `--junitxml=FILE -o
junit_family=xunit1`.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


gd = gk.diffusion
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long

LEVELS, DIM = 17, 64


def trained(name, num_steps=None):
    return gk.fit(gk.load(ROOT / "models" / f"{name}.py"), key=jr.key(0), num_steps=num_steps).ema


@pytest.fixture(scope="module")
def vp_model():
    return trained("digits_vp")


def test_bits_per_dimension_of_held_out_digits(record_property):
    model = trained("digits_density")
    ink = jnp.asarray(8 * gk.data.digits().x_test.reshape(-1, DIM) + 8).astype(int)
    x = gd.dequantize(ink, LEVELS, key=jr.key(1))
    bits_of = lambda values: gd.bits_per_dim(values, DIM, LEVELS, 1.0)

    @eqx.filter_jit
    def both(model, x):
        ends = {"sigma_min": 0.003, "sigma_max": 20.0, "rtol": 1e-3, "atol": 1e-3, "sigma_data": 0.35}
        one = lambda x: gd.log_prob(model, x, **ends)
        return jax.lax.map(one, x, batch_size=133), jax.vmap(lambda x: model.mixture.log_density(x, 0.0))(x)

    found, mixture = both(model, x)
    assert bool(found.ok.all())
    bits, before = bits_of(found.value), bits_of(mixture)
    error = lambda v: float(np.std(v, ddof=1) / np.sqrt(len(v)))
    record_property("bits per dimension", (float(bits.mean()), error(bits)))
    record_property("of the mixture alone", (float(before.mean()), error(before)))
    assert float(bits.mean()) + 5 * error(bits) < 2.60 < 2.674


@pytest.fixture(scope="module")
def both_paths():
    """Energy distances of draws along the kinetic and the straight path, and the energy of the first."""
    # The same network, steps and data; draws by few steps are compared with all digits.
    recipe = gk.load(ROOT / "models/digits_flow.py")
    data = gk.data.digits()
    reference = jnp.asarray(np.concatenate([data.x_train, data.x_test]).reshape(-1, DIM))
    kinetic = recipe.phases[0].objective.schedule
    found = {}
    for name, path in {"kinetic": kinetic, "straight": gd.CondOT()}.items():
        net = lambda key, path=path: gd.Preconditioned(recipe.build(key).net, "velocity", schedule=path)
        phase = gk.Phase(gd.FlowMatching(path, cond_dropout=0.1), recipe.phases[0].optimizer)
        model = gk.fit(recipe.replace(build=net, phases=phase), key=jr.key(0)).ema
        grid = gd.time_uniform(path, 8, t_min=0.02, t_max=0.99)
        table = gd.heun(grid)
        draws = gk.sample(table, model, 1000, key=jr.key(1), cond=jnp.arange(1000) % 10).value.reshape(1000, DIM)
        found[name] = float(gk.divergence.energy_distance(draws, reference))
    return found, float(kinetic.energy)


def test_both_paths_draw_digits(both_paths, record_property):
    found, energy = both_paths
    record_property("energy distance in 15 evaluations", found)
    record_property("energy of the kinetic path", energy)
    assert energy < 2.0
    assert max(found.values()) < 0.04  # two halves of the data are 0.01 apart or so


@pytest.mark.xfail(strict=True, reason="0.0190 against 0.0085: less energy does not make better draws here")
def test_the_kinetic_path_draws_about_as_well_as_the_straight_one(both_paths):
    found, _ = both_paths
    assert found["kinetic"] < 1.5 * found["straight"]


def test_teleportation_saves_evaluations_at_equal_quality(vp_model, record_property):
    model, data = vp_model, gk.data.digits()
    flat = data.x_train.reshape(-1, DIM)
    law = gd.GaussianDenoiser(jnp.asarray(flat.mean(0).reshape(1, 8, 8)), jnp.asarray(np.cov(flat.T)))
    score = lambda draws: float(gk.divergence.energy_distance(draws.reshape(-1, DIM), jnp.asarray(flat)))
    grid = gd.karras(24, 0.02, 80.0)
    starts = [80.0 * jr.normal(jr.key(k), (1000, 1, 8, 8)) for k in range(2, 8)]
    draw = lambda sampler: [gk.sample(sampler, model, 1000, key=jr.key(1), x_init=x) for x in starts]
    whole = draw(gd.heun(grid))
    scores = np.array([score(d.value) for d in whole])
    record_property("energy distance, and its spread from start to start", (scores.mean(), scores.std(ddof=1)))
    for share in (0.15, 0.3):
        # The Gaussian takes over at least this share of the evaluations, from 80 down; each step makes two.
        skip = int(np.ceil(share * whole[0].nfe[0] / 2))
        skipped = draw(gd.Teleported(gd.heun(grid[skip:]), law, 80.0))
        saved = 1 - float(skipped[0].nfe[0] / whole[0].nfe[0])
        # The same starts: what differs is the method. Equal: the mean difference is less than the change of the score
        # from one set of a thousand draws to another.
        gaps = np.array([score(d.value) for d in skipped]) - scores
        error = gaps.std(ddof=1) / np.sqrt(len(gaps))
        record_property(f"{saved:.0%} saved, from {grid[skip]:.1f} down", (gaps.mean(), error))
        assert saved >= share
        assert gaps.mean() < scores.std(ddof=1)


def test_inpainted_digits_keep_what_is_known(vp_model, tmp_path, record_property):
    model = vp_model
    sampler = gk.load(ROOT / "samplers/inpaint.py")
    known = sampler.guidance.y
    draws = gk.sample(sampler, model, 64, key=jr.key(0)).value
    np.testing.assert_array_equal(draws[:, :, :4], jnp.broadcast_to(known[:, :4], (64, 1, 4, 8)))
    # The other half is ink: mostly in range, and nearer to the true lower half than another digit's is.
    assert float(jnp.mean(jnp.abs(draws) < 1.2)) > 0.97
    # Drawn: the digit first, then what was made of its upper half.
    picture = tmp_path / "inpainted.png"
    gk.io.plot_grid(picture, np.concatenate([known[None], np.asarray(draws[:31])]), columns=8)
    assert picture.stat().st_size > 1000
    record_property("picture", str(picture))
    truth = float(jnp.mean((draws[:, :, 4:] - known[:, 4:]) ** 2))
    others = float(np.mean((gk.data.digits().x_train[:, :, 4:] - np.asarray(known)[:, 4:]) ** 2))
    record_property("squared error of the lower half, and of digits at random", (truth, others))
    assert truth < 0.9 * others
