"""Data sets and batches: the digits' fixed split, toy laws against their definitions, wrong input."""

import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stats import assert_distribution, assert_frequencies, assert_mean

import genkit as gk


data = gk.data


def test_digits_are_the_same_everywhere():
    digits = data.digits()
    assert digits.x_train.shape == (1400, 1, 8, 8) and digits.x_test.shape == (397, 1, 8, 8)
    assert digits.x_train.dtype == np.float32 and digits.y_train.dtype == np.int32
    levels = 8 * digits.x_train + 8
    assert np.all(levels == np.round(levels)) and levels.min() == 0 and levels.max() == 16
    assert np.bincount(digits.y_test).tolist() == [39, 40, 39, 40, 40, 40, 40, 40, 39, 40]
    both = np.concatenate([digits.x_train, digits.x_test]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    assert np.array_equal(np.sort((8 * both + 8).sum(1)), np.sort(load_digits().data.sum(1)))
    # The split is part of every published figure: it may not move.
    digest = hashlib.sha256(digits.x_test.tobytes() + digits.y_test.tobytes()).hexdigest()
    assert digest == "d6e5855ab5a90d00eadad32ebda9e80417d7af551e0a442832c5cdcb0ef5dc17"


def test_batches_pair_rows_and_depend_on_the_key_alone():
    x = jnp.arange(20.0).reshape(10, 2)
    batches = data.Batches((x, jnp.arange(10)), batch_size=2000)
    rows, labels = batches(jr.key(0))
    assert batches.num_examples == 10
    np.testing.assert_array_equal(rows, x[labels])
    assert_frequencies(np.asarray(labels), np.full(10, 0.1))
    np.testing.assert_array_equal(batches(jr.key(0))[1], labels)
    assert not np.array_equal(batches(jr.key(1))[1], labels)


def test_batches_are_traced_not_closed_over():
    traces = []

    @eqx.filter_jit
    def run(batches, key):
        traces.append(1)
        return batches(key)

    for scale in (1.0, 2.0):
        run(data.Batches(scale * jnp.ones((6, 2)), batch_size=3), jr.key(0))
    assert len(traces) == 1
    assert data.Batches({"a": np.ones(4), "b": np.ones((4, 2))}, 2)(jr.key(0))["b"].shape == (2, 2)


TOYS = {
    "two_moons": (data.two_moons, 2),
    "ring": (data.ring, 2),
    "eight_gaussians": (data.eight_gaussians, 2),
    "swiss_roll": (data.swiss_roll, 2),
    "pinwheel": (data.pinwheel, 2),
    "checkerboard": (data.checkerboard, 2),
    "two_gaussians": (data.two_gaussians, 2),
}


@pytest.mark.parametrize(("draw", "dim"), TOYS.values(), ids=TOYS)
def test_toys_are_traceable_and_reproducible(draw, dim):
    run = jax.jit(lambda key: draw(500, key=key))
    points = run(jr.key(0))
    assert points.shape == (500, dim) and points.dtype == jnp.float32
    assert np.all(np.isfinite(points)) and np.abs(points).max() < 5
    np.testing.assert_allclose(points, run(jr.key(0)))
    assert not np.allclose(points, run(jr.key(1)))
    assert data.Generated(draw, batch_size=7)(jr.key(0)).shape == (7, dim)


def test_two_moons_lie_on_their_arcs():
    points = np.asarray(data.two_moons(4000, noise=0.0, key=jr.key(0)))
    up = np.abs(np.hypot(points[:, 0] + 0.5, points[:, 1] + 0.25) - 1) < 1e-5
    down = np.abs(np.hypot(points[:, 0] - 0.5, points[:, 1] - 0.25) - 1) < 1e-5
    assert np.all(up | down)
    assert np.all(points[up & ~down, 1] >= -0.25 - 1e-5) and np.all(points[down & ~up, 1] <= 0.25 + 1e-5)
    assert_mean(points, np.zeros(2))


def test_ring_modes_and_noise():
    points = np.asarray(data.ring(8000, num_modes=4, radius=3.0, noise=0.2, key=jr.key(0)))
    angle = np.arctan2(points[:, 1], points[:, 0])
    mode = np.round(angle / (np.pi / 2)).astype(int) % 4
    assert_frequencies(mode, np.full(4, 0.25))
    assert_mean(points[mode == 1], np.array([0.0, 3.0]))
    assert_mean((points[mode == 0, 0] - 3.0) ** 2, 0.04)


def test_swiss_roll_and_pinwheel_by_their_formulas():
    roll = np.asarray(data.swiss_roll(2000, dim=3, noise=0.0, key=jr.key(0)))
    radius = np.hypot(roll[:, 0], roll[:, 1])
    np.testing.assert_allclose(roll[:, 0], radius * np.cos(3 * np.pi * radius), atol=1e-5)
    assert_distribution(roll[:, 2], lambda z: np.clip((z + 1) / 2, 0, 1))
    wheel = np.asarray(data.pinwheel(2000, num_arms=3, radial_std=0.0, tangential_std=0.0, key=jr.key(0)))
    np.testing.assert_allclose(np.hypot(wheel[:, 0], wheel[:, 1]), 1.0, atol=1e-5)
    turn = (np.arctan2(wheel[:, 1], wheel[:, 0]) - 0.25 * np.e) / (2 * np.pi / 3)
    np.testing.assert_allclose(turn, np.round(turn), atol=1e-4)


def test_checkerboard_is_uniform_on_dark_cells():
    points = np.asarray(data.checkerboard(16_000, num_cells=4, key=jr.key(0)))
    column, row = np.floor(points + 2).astype(int).T
    assert np.all((column + row) % 2 == 0)
    assert_frequencies((4 * row + column) // 2, np.full(8, 0.125))


def test_two_gaussians_weight_and_distance():
    points = np.asarray(data.two_gaussians(4000, distance=6.0, noise=0.3, weight=0.2, key=jr.key(0)))
    right = points[:, 0] > 0
    assert_frequencies(right.astype(int), [0.8, 0.2])
    assert_mean(points[right], np.array([3.0, 0.0]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: data.Batches((), 2), "at least one array"),
        (lambda: data.Batches((jnp.ones(3), jnp.ones(4)), 2), "one leading axis in common"),
        (lambda: data.Batches(jnp.ones(()), 2), "one leading axis in common"),
        (lambda: data.Batches(jnp.ones((0, 2)), 2), "at least one example"),
        (lambda: data.Batches(jnp.ones(3), 0), "`batch_size` must be an integer >= 1"),
        (lambda: data.Batches(jnp.array([1.0, jnp.nan]), 2), "1 NaN or infinite of 2 entries, first at"),
        (lambda: data.Generated(data.two_moons, 0), "`batch_size` must be an integer >= 1"),
        (lambda: data.two_moons(0, key=jr.key(0)), "`num_samples` must be an integer >= 1"),
        (lambda: data.checkerboard(3, num_cells=3, key=jr.key(0)), "`num_cells` must be even"),
        (lambda: data.swiss_roll(3, dim=4, key=jr.key(0)), "`dim` must be 2 or 3"),
    ],
)
def test_wrong_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_types():
    with pytest.raises((ValueError, TypeError)):
        data.Generated("two_moons", 3)
    with pytest.raises((ValueError, TypeError)):
        data.Batches(jnp.ones(3), 2.5)
