"""Further schedules and grids: closed forms, published tables, kinetic energies, the best grid of Gaussian data."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta, norm

import genkit as gk


gd = gk.diffusion


def every():
    return {
        "tabulated": gd.Tabulated(jnp.array([9.0, 4.0, 3.0, -1.0, -10.0])),
        "polynomial": gd.Polynomial(2.5),
        "shifted flow": gd.Shifted(gd.CondOT(), 3.0),
        "shifted cosine": gd.Shifted(gd.Cosine(), 2.0),
        "discrete": gd.Discrete(gd.ddpm_betas(100)),
        "zero terminal": gd.Discrete(gd.zero_terminal_snr(gd.ddpm_betas(100))),
        "kinetic": gd.KineticOptimal(lambda level: 0.5 * level**2 / (1 + level**2), 0.7),
    }


@pytest.mark.parametrize("name", every())
def test_derived_quantities_and_inverse(name, x64):
    schedule = every()[name]
    t = jnp.linspace(0.003, 0.996, 60)

    @jax.jit
    def look(schedule, t):
        level = schedule.noise_level(t)
        return (
            level,
            schedule.alpha(t),
            schedule.sigma(t),
            schedule.time(level),
            schedule.diffusion(t) ** 2,
            schedule.alpha_dot(t),
            schedule.noise_level(t + 1e-6) ** 2 - schedule.noise_level(t - 1e-6) ** 2,
            schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6),
        )

    level, alpha, sigma, back, square, alpha_dot, rise, fall = look(schedule, t)
    assert np.all(np.diff(level) > 0) and np.all(alpha > 0) and np.all(sigma > 0)
    np.testing.assert_allclose(back, t, rtol=1e-9)
    # g^2 = alpha^2 d(level^2)/dt and the rate of alpha, by central differences away from kinks.
    smooth = np.abs(np.asarray(t) * 100 % 1 - 0.5) < 0.49
    np.testing.assert_allclose(square[smooth], (alpha**2 * rise / 2e-6)[smooth], rtol=1e-5)
    np.testing.assert_allclose(alpha_dot[smooth], (fall / 2e-6)[smooth], rtol=1e-5, atol=1e-9)


def test_kinetic_paths_end_in_pure_noise():
    for num_nodes in (16, 64, 257):
        path = gd.KineticOptimal(np.zeros_like, num_nodes=num_nodes)
        assert float(path.alpha(1.0)) == 0 and float(path.noise_level(1.0)) == np.inf


@pytest.mark.parametrize("name", every())
def test_ends_of_the_noise_range_in_single_precision(name):
    # Round trips at extreme levels: what a network is told must be the level that it denoises.
    schedule = every()[name]
    levels = jnp.array([1e-4, 1e-2, 1.0, 50.0])
    if name == "tabulated":
        levels = jnp.array([0.02, 0.1, 1.0, 50.0])

    @jax.jit
    def look(schedule, levels):
        t = schedule.time(levels)
        return schedule.noise_level(t), schedule.alpha(t), schedule.sigma(t)

    back, alpha, sigma = look(schedule, levels)
    # Near t = 1 half a unit in the last place of t is `level * d(log level)/dt * 6e-8` of the level.
    np.testing.assert_allclose(back[:3], levels[:3], rtol=3e-6)
    np.testing.assert_allclose(back[3], levels[3], rtol=2e-4)
    assert np.isfinite(np.asarray([alpha, sigma])).all()

    @jax.jit
    def denoised(level):
        nets = [gd.Preconditioned(lambda x, t, cond: 0.3 * x, p, schedule=schedule) for p in ("v", "velocity")]
        return jnp.stack([net(jnp.ones(1) + level, level) for net in nets])

    for level in (0.0, 1e-3, 1e3):
        assert np.isfinite(np.asarray(denoised(jnp.asarray(level, jnp.float32)))).all()


def test_tabulated_follows_its_table_and_other_schedules(x64):
    t = np.linspace(0, 1, 201)
    inside = jnp.linspace(0.02, 0.98, 77)
    look = jax.jit(lambda schedule, t: (schedule.log_snr(t), schedule.alpha(t), schedule.sigma(t)))
    values = np.asarray(look(gd.VP(), jnp.asarray(t[1:]))[0])
    schedule = gd.Tabulated(np.concatenate([values[:1] + 3, values]))
    np.testing.assert_allclose(look(schedule, jnp.asarray(t[1:]))[0], values, rtol=1e-12)
    log_snr, alpha, sigma = look(schedule, inside)
    np.testing.assert_allclose(log_snr, look(gd.VP(), inside)[0], atol=2e-3)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-14)
    # A straight line stays one, also beyond the ends.
    line = gd.Tabulated(np.linspace(6.0, -6.0, 7))
    np.testing.assert_allclose(look(line, jnp.array([-0.1, 0.37, 1.2]))[0], [7.2, 1.56, -8.4], rtol=1e-12)


def test_named_relations(x64):
    t = jnp.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(gd.Polynomial(1.0).alpha(t), 1 - t, rtol=1e-12)
    shifted = gd.Shifted(gd.CondOT(), 3.0)
    np.testing.assert_allclose(shifted.sigma(t), 3 * t / (1 + 2 * t), rtol=1e-12)
    assert float(shifted.alpha(jnp.array(1.0))) == 0 and float(shifted.sigma(jnp.array(0.0))) == 0
    cosine = gd.Shifted(gd.Cosine(), 4.0)
    np.testing.assert_allclose(cosine.log_snr(t), gd.Cosine().log_snr(t) - 2 * np.log(4.0), rtol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_discrete_tables(kind, x64):
    betas = gd.ddpm_betas(50, kind)
    product = np.cumprod(1 - betas)
    schedule = gd.Discrete(betas)
    t = jnp.arange(1, 51) / 50
    np.testing.assert_allclose(schedule.alpha(t) ** 2, product, rtol=1e-11)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - product, rtol=1e-11)
    assert float(schedule.sigma(jnp.array(0.0))) == 0
    # One step of the chain, x' = sqrt(1 - beta) x + sqrt(beta) z, is the noising between two times.
    ratio = schedule.alpha(t[1:]) / schedule.alpha(t[:-1])
    np.testing.assert_allclose(ratio**2, 1 - betas[1:], rtol=1e-10)


def test_zero_terminal_signal(x64):
    betas = gd.ddpm_betas(100)
    rescaled = gd.zero_terminal_snr(betas)
    root = np.sqrt(np.cumprod(1 - betas))
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    schedule = gd.Discrete(rescaled)
    t = jnp.arange(1, 101) / 100
    np.testing.assert_allclose(schedule.alpha(t), expected, rtol=1e-9, atol=1e-15)
    assert float(schedule.alpha(jnp.array(1.0))) == 0 and float(schedule.sigma(jnp.array(1.0))) == 1
    # Finite at the end: a v-network there says what the data are.
    denoiser = gd.Preconditioned(lambda x, t, cond: -x / 3, "v", schedule=schedule)
    assert np.isfinite(np.asarray(denoiser(jnp.array([1e6]), jnp.array(1e6)))).all()


# Kinetic optimality: one dimension, +-m with Gaussian spread, unit second moment.


def mixture_error(m):
    """The error of the best denoiser of that mixture, by the trapezoidal rule, which is spectral here."""
    v = 1 - m**2

    def error(level):
        level = np.asarray(level)[..., None]
        scale = np.sqrt(v + level**2)
        x = (m + 9 * scale) * np.linspace(-1, 1, 4001)
        density = 0.5 * (norm.pdf(x, m, scale) + norm.pdf(x, -m, scale))
        mean = v / scale**2 * x + level**2 / scale**2 * m * np.tanh(m * x / scale**2)
        return 1 - np.sum(density * mean**2, -1) * (x[..., 1] - x[..., 0])

    return error


@pytest.mark.parametrize(
    ("m", "whole", "energies"),
    [
        (0.9, 0.25168, (0.0630, 0.4975, 0.1073)),
        (0.99, 0.54978, (0.2949, 0.7788, 0.5491)),
        (1.0, 0.69126, (0.4593, 0.9824, 0.8690)),
    ],
)
def test_kinetic_energies(m, whole, energies, x64):
    # Of two points the error is zero to rounding below level 0.05.
    raw, least = mixture_error(m), 0.05 if m == 1 else 0.0
    error = lambda level: np.where(level < least, 0.0, raw(np.maximum(level, least)))
    schedule = gd.KineticOptimal(error, num_nodes=96)
    assert float(schedule.angle.y[-1]) == pytest.approx(whole, abs=1e-4)
    assert float(schedule.energy) == pytest.approx(4 * np.sin(whole / 2) ** 2, abs=2e-4)
    # The energy along its own path, and along two others, by quadrature of the definition.
    nodes = np.linspace(0, 0.5 * np.pi, 300)[1:-1]
    share = error(np.tan(nodes)) / np.sin(nodes) ** 2

    @jax.jit
    def measured(schedule):
        t = jnp.linspace(1e-4, 1 - 1e-4, 2001)
        a, s, da, ds = schedule.alpha(t), schedule.sigma(t), schedule.alpha_dot(t), schedule.sigma_dot(t)
        psi = jnp.arctan2(s, a)
        rate = (da * s - a * ds) / s
        return jnp.trapezoid(da**2 + ds**2 - jnp.interp(psi, nodes, share) * jnp.sin(psi) ** 2 * rate**2, t)

    found = [float(measured(s)) for s in (schedule, gd.CondOT(), gd.Cosine(0.0))]
    np.testing.assert_allclose(found, energies, rtol=4e-3)


def test_the_kinetic_path_of_two_points(x64):
    # The tabulated path; below level 0.05 the error is zero to rounding.
    error = mixture_error(1.0)
    schedule = gd.KineticOptimal(
        lambda level: np.where(level < 0.05, 0.0, error(np.maximum(level, 0.05))), num_nodes=96
    )
    assert float(schedule.angle.y[-1]) == pytest.approx(0.69126, abs=2e-4)
    assert float(schedule.energy) == pytest.approx(0.4591, abs=2e-4)
    t = jnp.array([0.75, 0.5, 0.25])
    np.testing.assert_allclose(schedule.alpha(t), [0.8071, 0.8848, 0.9426], atol=3e-4)
    np.testing.assert_allclose(schedule.sigma(t), [0.5123, 0.3199, 0.1594], atol=3e-4)


def test_kinetic_limits(x64):
    t = jnp.linspace(0.0, 1.0, 11)
    spread = gd.KineticOptimal(lambda level: 0 * level)
    np.testing.assert_allclose(spread.alpha(t), 1 - t, atol=1e-9)
    np.testing.assert_allclose(spread.sigma(t), t, atol=1e-9)
    gaussian = gd.KineticOptimal(lambda level: level**2 / (1 + level**2))
    assert float(gaussian.energy) < 1e-6
    # k of d dimensions are filled: the speed at the data end is sqrt(1 - k / d), all along for a flat Gaussian.
    flat = gd.KineticOptimal(lambda level: 0.25 * level**2 / (1 + level**2))
    np.testing.assert_allclose(flat.angle.y[-1], 0.5 * np.pi * np.sqrt(0.75), rtol=1e-6)


def test_kinetic_path_from_data_and_from_a_denoiser():
    # Gaussian data of variance 4 in half the coordinates; the exact denoiser tells the error up to sampling.
    half = jr.normal(jr.key(0), (1024, 4))
    x = jnp.concatenate([2 * half / jnp.sqrt(jnp.mean(half**2, 0)), jnp.zeros((1024, 4))], axis=1)
    law = gd.GaussianDenoiser(jnp.zeros(8), jnp.array([4.0] * 4 + [0.0] * 4))
    schedule = gd.KineticOptimal.from_denoiser(law, x)
    assert float(schedule.scale) == pytest.approx(np.sqrt(2.0), rel=1e-5)
    # Error per coordinate: half of 4 s^2 / (4 + s^2) at s = sqrt(2) tan(psi), as a fraction of 2.
    tangent = lambda psi: 2 * np.tan(psi) ** 2
    speed = lambda psi: np.sqrt(1 - tangent(psi) / (4 + tangent(psi)) / np.sin(psi) ** 2)
    whole = quad(speed, 1e-6, 0.5 * np.pi - 1e-6)[0]
    # Over keys of the noise both angles spread by 1.6 %; five of these deviations are allowed.
    assert float(schedule.angle.y[-1]) == pytest.approx(whole, rel=0.08)
    # Two far points: the empirical law spreads over no dimension, so the data end is straight.
    points = gd.KineticOptimal.from_data(jnp.array([[1.0], [-1.0]]))
    assert float(points.angle.y[-1]) == pytest.approx(0.69126, rel=0.08)
    assert float(points.angle.slopes[0]) > 0.95


# Grids.


def test_grids_and_their_clocks(x64):
    grid = gd.angle_uniform(6, 0.02, 10.0, 0.5)
    np.testing.assert_allclose(np.diff(np.arctan(grid[:-1] / 0.5), 2), 0, atol=1e-12)
    quantiles = gd.beta_quantile(9, 0.02, 10.0, 0.6, 0.8)
    share = np.log(quantiles[:-1] / 0.02) / np.log(10 / 0.02)
    np.testing.assert_allclose(beta.cdf(share, 0.6, 0.8), np.linspace(1, 0, 9), atol=1e-9)
    flow = gd.beta_quantile(5, 0.02, 10.0, 1.0, 1.0, gd.CondOT(), None)
    np.testing.assert_allclose(np.diff(flow / (1 + flow), 2), 0, atol=1e-9)
    for levels in (grid, quantiles):
        assert (levels[0], levels[-2], levels[-1]) == (10.0, 0.02, 0.0)


def test_the_best_grid_of_gaussian_data():
    np.testing.assert_allclose(
        gd.gaussian_optimal(9, 0.02, 10.0, [0.25]), gd.angle_uniform(9, 0.02, 10.0, 0.5), rtol=2e-4
    )
    variances = np.array([4.0, 1.0, 0.25, 0.01])
    with jax.enable_x64(True):
        law = gd.GaussianDenoiser(jnp.zeros(4), jnp.asarray(variances))
    score = lambda grid: float(gd.exact_error(gd.ddim(grid), law).kl)
    n, ends = 12, (0.02, 10.0)
    best = gd.gaussian_optimal(n, *ends, variances, None)
    others = [
        gd.karras(n, *ends, final=None),
        gd.log_uniform(n, *ends, final=None),
        gd.angle_uniform(n, *ends, 0.5, None),
    ]
    assert score(best) < 0.95 * min(score(grid) for grid in others)
    # Stationary: moving any inner level to either side makes it worse.
    for i in range(1, n - 1):
        for factor in (0.98, 1.02):
            moved = best.copy()
            moved[i] *= factor
            assert score(moved) > score(best)
    assert len(gd.gaussian_optimal(1, *ends, [1.0])) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: gd.Tabulated(jnp.array([1.0, 2.0])), "log_snr"),
        (lambda: gd.Tabulated(jnp.array([1.0])), "log_snr"),
        (lambda: gd.Tabulated(jnp.array([1.0, -np.inf])), "log_snr"),
        (lambda: gd.Polynomial(0.0), "degree"),
        (lambda: gd.Shifted(gd.CondOT(), -1.0), "shift"),
        (lambda: gd.Shifted(3.0, 1.0), "schedule"),
        (lambda: gd.Discrete(np.array([0.1, 1.5])), "betas"),
        (lambda: gd.Discrete(np.array([1.0, 0.5])), "betas"),
        (lambda: gd.ddpm_betas(10, "quadratic"), "kind"),
        (lambda: gd.zero_terminal_snr(np.array([0.5])), "betas"),
        (lambda: gd.KineticOptimal(lambda level: 2 + 0 * level), "mmse"),
        (lambda: gd.KineticOptimal(lambda level: 0.0), "mmse"),
        (lambda: gd.KineticOptimal.from_data(jnp.zeros((4, 2))), "scale"),
        (lambda: gd.beta_quantile(5, 0.1, 1.0, 0.0), "a"),
        (lambda: gd.angle_uniform(5, 0.1, 1.0, 0.0), "sigma_data"),
        (lambda: gd.gaussian_optimal(5, 0.1, 1.0, [-1.0]), "variances"),
        (lambda: gd.gaussian_optimal(5, 2.0, 1.0, [1.0]), "sigma_min"),
    ],
)
def test_wrong_input(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()
