"""The further tables against hand-written loops of the same methods, from their published pseudo-code."""

import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from table_reference import run_table

import genkit as gk


gd = gk.diffusion


def denoise(x, sigma):
    """Not linear, so that a wrong order of operations shows."""
    return np.tanh(x / (1 + sigma**2)) - 0.3 * x / (2 + sigma**2)


def normals(seed=0):
    table = np.random.default_rng(seed).normal(size=(64, 2, 3))
    return lambda row, stream: table[row, stream]


START = np.array([8.0, -3.0, 1.0])
GRIDS = [gd.karras(9, 0.02, 10.0), np.array([9.0, 5.0, 4.5, 2.0, 1.9, 0.7, 0.6, 0.2, 0.1])]


def noise_of(x, sigma):
    return (x - denoise(x, sigma)) / sigma


def loop_multistep(grid, x, order, clock):
    """Coefficients by adaptive quadrature of the Lagrange polynomials."""
    past = []
    for s, t in itertools.pairwise(grid):
        if t == 0:
            return denoise(x, s)
        past = [(clock(s), noise_of(x, s)), *past[: order - 1]]
        total = 0.0
        for j, (node, eps) in enumerate(past):
            others = [other for k, (other, _) in enumerate(past) if k != j]
            basis = lambda u, n=node, o=others: np.prod([(clock(u) - m) / (n - m) for m in o])
            total = total + quad(basis, s, t, epsabs=1e-13, epsrel=1e-13)[0] * eps
        x = x + total
    return x


def loop_dpm_solver_3(grid, x):
    for s, t in itertools.pairwise(grid):
        if t == 0:
            return denoise(x, s)
        h, r1, r2 = np.log(s / t), 1 / 3, 2 / 3
        s1, s2 = s * np.exp(-r1 * h), s * np.exp(-r2 * h)
        eps = noise_of(x, s)
        first = noise_of(x - s1 * np.expm1(r1 * h) * eps, s1)
        u2 = x - s2 * np.expm1(r2 * h) * eps - s2 * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * (first - eps)
        second = noise_of(u2, s2)
        x = x - t * np.expm1(h) * eps - t / r2 * (np.expm1(h) / h - 1) * (second - eps)
    return x


def loop_dpm_solver_2(grid, x):
    for s, t in itertools.pairwise(grid):
        if t == 0:
            return denoise(x, s)
        h, m = np.log(s / t), np.sqrt(s * t)
        x = x - t * np.expm1(h) * noise_of(x - m * np.expm1(h / 2) * noise_of(x, s), m)
    return x


def loop_dpmpp_2s(grid, x):
    for s, t in itertools.pairwise(grid):
        if t == 0:
            return denoise(x, s)
        h, d = np.log(s / t), denoise(x, s)
        m = s * np.exp(-h / 2)
        x = t / s * x - np.expm1(-h) * denoise(m / s * x - np.expm1(-h / 2) * d, m)
    return x


def loop_ipndm(grid, x):
    past = []
    for s, t in itertools.pairwise(grid):
        if t == 0:
            return denoise(x, s)
        past = [noise_of(x, s), *past[:3]]
        uniform = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
        mixed = sum(w * e for w, e in zip(uniform[len(past) - 1], past, strict=True))
        x = x + (t - s) * mixed
    return x


def loop_velocity(grid, x, noise=None):
    """Second-order Adams-Bashforth of the velocity along straight paths, in their own coordinates."""
    time, past = grid / (1 + grid), None
    z = (1 - time[0]) * x
    for a, b in itertools.pairwise(time):
        sigma = a / (1 - a)
        d = denoise(z / (1 - a), sigma)
        if b == 0:
            return d
        u = (z - (1 - a) * d) / a - d
        slope = 0.0 if past is None else (u - past[1]) / (a - past[0])
        z = z + (b - a) * u + (b - a) ** 2 / 2 * slope
        past = (a, u)
    return z / (1 - time[-1])


def loop_rosenbrock(grid, x, sigma_data):
    """First order in the angle, with the network's output."""
    for s, t in itertools.pairwise(grid):
        d = denoise(x, s)
        if t == 0:
            return d
        norm = np.hypot(s, sigma_data)
        f = (d - sigma_data**2 / norm**2 * x) * norm / (s * sigma_data)
        z = x / norm - f * (np.arctan(t / sigma_data) - np.arctan(s / sigma_data))
        x = z * np.hypot(t, sigma_data)
    return x


def loop_score(grid, x, noise, variance):
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        score = (denoise(x, s) - x) / s**2
        if t == 0:
            return denoise(x, s)
        x = x + variance(s, t) * score + np.sqrt(variance(s, t)) * noise(i, 0)
    return x


def loop_sa(grid, x, order, tau, noise):
    """Predict, evaluate, correct the same step with the same noise; coefficients by adaptive quadrature."""
    rate, past = 1 + tau**2, []  # past: (clock, prediction), newest first

    def step(x, s, t, nodes, z):
        lam, end = -np.log(s), -np.log(t)
        total = np.exp(-rate * (end - lam)) * x + t * np.sqrt(-np.expm1(-2 * tau**2 * (end - lam))) * z
        for j, (node, value) in enumerate(nodes):
            others = [other for k, (other, _) in enumerate(nodes) if k != j]
            kernel = lambda u, n=node, o=others: (
                rate * np.exp(-rate * (end - u)) * np.prod([(u - m) / (n - m) for m in o])
            )
            total = total + quad(kernel, lam, end, epsabs=1e-13, epsrel=1e-13)[0] * value
        return total

    d = denoise(x, grid[0])
    past = [(-np.log(grid[0]), d)]
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        if t == 0:
            return past[0][1]
        z = noise(i, 0)
        predicted = step(x, s, t, past[:order], z)
        if i == len(grid) - 2:
            return predicted
        new = (-np.log(t), denoise(predicted, t))
        x = step(x, s, t, [new, *past[:order]], z)
        past = [new, *past]
    return x


def loop_restart(grid, x, lo, hi, times, steps, noise):
    levels = np.unique(np.append(grid, lo))[::-1]
    row = 0

    def descend(x, levels):
        nonlocal row
        for s, t in itertools.pairwise(levels):
            row += 1
            slope_now = noise_of(x, s)
            after = x + (t - s) * slope_now
            if t > 0:
                row += 1
                after = x + (t - s) * (slope_now + noise_of(after, t)) / 2
            x = after
        return x

    x = descend(x, levels[levels >= lo])
    for _ in range(times):
        x = x + np.sqrt(hi**2 - lo**2) * noise(row - 1, 0)
        x = descend(x, np.append(np.linspace(hi ** (1 / 7), lo ** (1 / 7), steps + 1)[:-1] ** 7, lo))
    return descend(x, levels[levels <= lo])


PAIRS = {
    "lms": (gd.lms, lambda g: loop_multistep(g, START, 4, lambda u: u)),
    "ipndm": (gd.ipndm, lambda g: loop_multistep(g, START, 4, lambda u: u)),
    "deis 2": (lambda g: gd.deis(g, 2), lambda g: loop_multistep(g, START, 2, np.log)),
    "deis 3": (gd.deis, lambda g: loop_multistep(g, START, 3, np.log)),
    "deis, sigma": (lambda g: gd.deis(g, clock="sigma"), lambda g: loop_multistep(g, START, 3, lambda u: u)),
    "dpm-solver 2": (gd.dpm_solver, lambda g: loop_dpm_solver_2(g, START)),
    "dpm-solver 3": (lambda g: gd.dpm_solver(g, 3), lambda g: loop_dpm_solver_3(g, START)),
    "dpm-solver++ 2S": (lambda g: gd.dpm_solver(g, 2, "x0"), lambda g: loop_dpmpp_2s(g, START)),
    "ipndm, uniform": (lambda g: gd.ipndm(g, uniform=True), lambda g: loop_ipndm(g, START)),
    "velocity": (gd.velocity_ab, lambda g: loop_velocity(g, START)),
    "rosenbrock": (lambda g: gd.rosenbrock(g, 1, 0.6), lambda g: loop_rosenbrock(g, START, 0.6)),
    "euler-maruyama": (gd.euler_maruyama, lambda g: loop_score(g, START, normals(), lambda s, t: 2 * s * (s - t))),
    "reverse": (gd.reverse_diffusion, lambda g: loop_score(g, START, normals(), lambda s, t: s**2 - t**2)),
    "sa 2": (lambda g: gd.sa(g, 2, 0.7), lambda g: loop_sa(g, START, 2, 0.7, normals())),
    "sa 3": (gd.sa, lambda g: loop_sa(g, START, 3, 1.0, normals())),
    "restart": (lambda g: gd.restart(g, 0.3, 3.0, 2, 3), lambda g: loop_restart(g, START, 0.3, 3.0, 2, 3, normals())),
}


@pytest.mark.parametrize("grid", GRIDS, ids=["karras", "irregular"])
@pytest.mark.parametrize("name", PAIRS)
def test_tables_equal_hand_written_loops(name, grid):
    table, loop = PAIRS[name]
    np.testing.assert_allclose(run_table(table(grid), denoise, START, normals()), loop(grid), rtol=1e-10, atol=1e-10)


def test_short_grids_and_last_steps():
    makers = [gd.deis, gd.lms, gd.ipndm, gd.velocity_ab, gd.rosenbrock, gd.dpm_solver, gd.euler_maruyama, gd.sa]
    makers += [gd.reverse_diffusion, lambda g: gd.deis(g, 4, True), lambda g: gd.dpm_solver(g, 3)]
    makers += [lambda g: gd.restart(g, 2.0, 3.0)]
    for grid in ([2.0, 0.0], [2.0, 1.0], [2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.5, 0.0]):
        for make in makers:
            calls = []

            def watched(x, sigma, calls=calls):
                calls.append(denoise(x, sigma))
                return calls[-1]

            last = run_table(make(np.array(grid)), watched, START, normals())
            assert np.isfinite(last).all()
            if grid[-1] == 0:
                np.testing.assert_allclose(last, calls[-1], rtol=1e-12)
