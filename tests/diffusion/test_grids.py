"""Grids: the published formulas, exact ends, and every wrong input."""

import numpy as np
import pytest

import genkit as gk
from genkit.diffusion._schedules._grids import check_grid


def test_karras_is_uniform_in_the_root():
    grid = gk.diffusion.karras(9, 0.02, 10.0, rho=3.0, final=None)
    assert grid.dtype == np.float64 and grid.shape == (9,)
    assert grid[0] == 10.0 and grid[-1] == 0.02
    np.testing.assert_allclose(np.diff(grid ** (1 / 3)), np.diff(grid ** (1 / 3))[0], rtol=1e-12)


def test_log_uniform_has_equal_ratios():
    grid = gk.diffusion.log_uniform(7, 0.1, 50.0)
    np.testing.assert_allclose(grid[1:-1] / grid[:-2], (0.1 / 50) ** (1 / 6), rtol=1e-12)
    assert grid[0] == 50.0 and grid[-2] == 0.1 and grid[-1] == 0


def test_time_uniform_follows_the_schedule():
    class Clock:
        def noise_level(self, t):
            return t**2

    np.testing.assert_allclose(gk.diffusion.time_uniform(Clock(), 3, t_min=1.0, t_max=3.0), [9, 4, 1, 0])
    bare = gk.diffusion.time_uniform(Clock(), 3, t_min=1.0, t_max=3.0, final=None)
    np.testing.assert_allclose(bare, [9, 4, 1])
    levels = gk.diffusion.time_uniform(gk.diffusion.VP(0.1, 20.0), 5, t_min=1e-3, t_max=1.0)
    assert (np.diff(levels) < 0).all() and levels.dtype == np.float64


def test_a_final_level_may_be_positive():
    assert gk.diffusion.karras(3, 0.1, 1.0, final=0.05)[-1] == 0.05


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gk.diffusion.karras(0, 0.1, 1.0), "num_steps"),
        (lambda: gk.diffusion.karras(4, -0.1, 1.0), "sigma_min"),
        (lambda: gk.diffusion.karras(4, 0.1, np.nan), "sigma_max"),
        (lambda: gk.diffusion.karras(4, 1.0, 0.1), "smaller than `sigma_max`"),
        (lambda: gk.diffusion.karras(4, 0.1, 1.0, rho=0.0), "rho"),
        (lambda: gk.diffusion.karras(4, 0.1, 1.0, final=0.5), "strictly descending"),
        (lambda: gk.diffusion.log_uniform(4, 0.0, 1.0), "sigma_min"),
        (lambda: gk.diffusion.log_uniform(1, 0.1, 1.0, final=None), "num_steps"),
        (lambda: gk.diffusion.time_uniform(gk.diffusion.EDM(), 4, t_min=2.0, t_max=1.0), "t_min"),
        (lambda: gk.diffusion.time_uniform(gk.diffusion.CondOT(), 4, t_min=0.1, t_max=1.0), "t_max"),
        (lambda: check_grid([1.0, 2.0]), r"grid\[0\] = 1, grid\[1\] = 2"),
        (lambda: check_grid([2.0, 1.0, 1.0]), "strictly descending"),
        (lambda: check_grid([1.0, -1.0]), "non-negative"),
        (lambda: check_grid([1.0]), "at least two"),
        (lambda: check_grid([[1.0, 0.5]]), "one row"),
        (lambda: check_grid([np.inf, 1.0]), "finite"),
        (lambda: check_grid([1.0, np.nan]), "finite"),
    ],
)
def test_wrong_input(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_words_are_no_grid():
    with pytest.raises(TypeError, match="grid"):
        check_grid("karras")
