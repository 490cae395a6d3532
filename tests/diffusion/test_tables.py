"""Tables: measured orders and variances against their exact values, and hand-written loops of the same methods."""

import itertools

import jax
import numpy as np
import pytest
from table_reference import EIGENVALUES, flow_map, gaussian, output_variance, run_table

import genkit as gk
from genkit.diffusion._samplers._charts import DataInLogLevel


gd = gk.diffusion
SIGMA_MIN, SIGMA_MAX = 0.02, 10.0

# Root mean square errors on Gaussian data (eigenvalues 4, 1, 1/4, 1/100), Karras grid from 10 to 0.02, at 12, 24, ...
# 384 steps (half as many for Heun's two evaluations each), as tabulated for these methods; and the order they measure.
FLOW = {
    "ddim": (gd.ddim, 1, "1.2e-01 6.1e-02 3.1e-02 1.5e-02 7.7e-03 3.9e-03", 1.00),
    "heun": (gd.heun, 2, "1.2e-01 2.7e-02 6.4e-03 1.6e-03 3.8e-04 9.6e-05", 2.01),
    "dpmpp 2": (gd.dpmpp, 1, "2.8e-02 6.5e-03 1.6e-03 3.8e-04 9.5e-05 2.4e-05", 2.01),
    "dpmpp 3, cold": (lambda g: gd.dpmpp(g, 3), 1, "4.2e-03 6.2e-04 2.4e-04 7.2e-05 1.9e-05 5.0e-06", 1.95),
    "dpmpp 3, warm": (
        lambda g: gd.dpmpp(g, 3, warm_start=True), 1, "1.2e-02 1.2e-03 1.4e-04 1.7e-05 2.2e-06 2.7e-07", 3.01,
    ),
    "unipc 2": (lambda g: gd.unipc(g, 2), 1, "1.7e-02 2.0e-03 2.5e-04 3.0e-05 3.8e-06 4.7e-07", 3.00),
    "unipc 3": (gd.unipc, 1, "8.8e-03 5.4e-04 3.4e-05 2.2e-06 1.4e-07 9.1e-09", 3.92),
    # Not tabulated elsewhere; these pin what was measured once.
    "dpmpp 2, warm": (
        lambda g: gd.dpmpp(g, 2, warm_start=True), 1, "4.7e-02 1.0e-02 2.4e-03 5.7e-04 1.4e-04 3.5e-05", 2.01,
    ),
    "unipc 1": (lambda g: gd.unipc(g, 1), 1, "4.7e-02 1.2e-02 3.1e-03 7.8e-04 2.0e-04 4.9e-05", 2.00),
}  # fmt: skip

# Largest relative error of the output variance, log-uniform grid, 16, 32, ... 256 steps.
VARIANCE = {
    "ancestral": (gd.ancestral, "0.31 0.17 0.091 0.047 0.024"),
    "ddim": (gd.ddim, "0.18 0.092 0.047 0.024 0.012"),
    "heun": (gd.heun, "0.042 0.0099 0.0024 0.0006 0.00015"),
    "dpmpp 1, stochastic": (lambda g: gd.dpmpp(g, 1, stochastic=True), "0.31 0.17 0.091 0.047 0.024"),
    "dpmpp 2, stochastic": (lambda g: gd.dpmpp(g, 2, stochastic=True), "0.044 0.012 0.0031 0.00078 0.0002"),
    "dpmpp 2, stochastic, warm": (lambda g: gd.dpmpp(g, 2, True, True), "0.12 0.027 0.0065 0.0016 0.0004"),
    "dpmpp 3, stochastic, warm": (lambda g: gd.dpmpp(g, 3, True, True), "0.071 0.0077 0.0014 0.00028 6.6e-05"),
    "dpmpp 3, stochastic": (lambda g: gd.dpmpp(g, 3, stochastic=True), "0.072 0.01 0.0022 0.00053 0.00013"),
}


def grid_of(steps, make=gd.karras):
    return make(steps + 1, SIGMA_MIN, SIGMA_MAX, final=None)


def assert_digits(found, printed):
    """Equal to two printed digits; .551 of the last one, because they were rounded twice (first to three)."""
    wanted = np.array(printed.split(), float)
    np.testing.assert_array_less(np.abs(np.array(found) - wanted), 0.551 * 10 ** (np.floor(np.log10(wanted)) - 1))


def slope(errors):
    return float(np.log2(errors[-2] / errors[-1]))


@pytest.mark.parametrize("name", FLOW)
def test_order_of_convergence_on_gaussian_data(name):
    make, evaluations, printed, order = FLOW[name]
    counts = [n // (2 if name == "heun" else 1) for n in (12, 24, 48, 96, 192, 384)]
    tables = [make(grid_of(n)) for n in counts]
    start = SIGMA_MAX * np.ones(4)
    exact = flow_map(start, SIGMA_MAX, SIGMA_MIN)
    errors = [np.sqrt(np.mean((run_table(t, gaussian(), start) - exact) ** 2)) for t in tables]
    assert_digits(errors, printed)
    assert slope(errors) == pytest.approx(order, abs=0.006)
    # The promised order, by regression over the last four resolutions.
    regression = -np.polyfit(np.log(counts[-4:]), np.log(errors[-4:]), 1)[0]
    assert regression > tables[0].order - 0.15
    del evaluations


@pytest.mark.parametrize("name", VARIANCE)
def test_output_variance_is_exact_without_monte_carlo(name):
    make, printed = VARIANCE[name]
    errors = []
    for n in (16, 32, 64, 128, 256):
        table = make(grid_of(n, gd.log_uniform))
        found = output_variance(table, SIGMA_MAX)
        errors.append(float(np.max(np.abs(found / (EIGENVALUES + SIGMA_MIN**2) - 1))))
    assert_digits(errors, printed)
    assert slope(errors) > table.order - 0.07


def test_churn_is_exact_where_the_flow_is():
    # The error of Heun's method vanishes with the step, and the noise is exact: so must be the variance.
    errors = []
    for n in (64, 128, 256):
        table = gd.heun(grid_of(n), churn=(2.0, 0.05, 8.0, 1.0))
        found = output_variance(table, SIGMA_MAX)
        errors.append(float(np.max(np.abs(found / (EIGENVALUES + SIGMA_MIN**2) - 1))))
    assert errors[-1] < 4e-4 and slope(errors) > 1.9
    # A share of the level that does not shrink with the step adds ever more noise to errors that shrink: below order 1.
    errors = []
    for n in (64, 128, 256, 512):
        found = output_variance(gd.heun(grid_of(n, gd.log_uniform), churn=(0.1 * n, 0.0, 20.0, 1.0)), SIGMA_MAX)
        errors.append(float(np.max(np.abs(found / (EIGENVALUES + SIGMA_MIN**2) - 1))))
    assert slope(errors) < 1


# Hand-written loops of the same methods, from their published pseudo-code.


def denoise(x, sigma):
    """Not linear, so that a wrong order of operations shows."""
    return np.tanh(x / (1 + sigma**2)) - 0.3 * x / (2 + sigma**2)


def normals(seed=0):
    table = np.random.default_rng(seed).normal(size=(64, 2, 3))
    return lambda row, stream: table[row, stream]


START = np.array([8.0, -3.0, 1.0])
GRIDS = [
    gd.karras(9, 0.02, 10.0),
    gd.log_uniform(9, 0.05, 8.0),
    np.array([9.0, 5.0, 4.5, 2.0, 1.9, 0.7, 0.6, 0.2, 0.1]),
]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=["karras", "log", "irregular"])


def loop_ddim(grid, x, eta, noise):
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        d = denoise(x, s)
        fresh = eta * t * np.sqrt(1 - t**2 / s**2)
        x = d + np.sqrt(t**2 - fresh**2) * (x - d) / s + fresh * noise(i, 0)
    return x


def loop_ancestral(grid, x, noise):
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        up = min(t, np.sqrt(t**2 * (s**2 - t**2) / s**2))
        down = np.sqrt(t**2 - up**2)
        x = x + (x - denoise(x, s)) / s * (down - s) + up * noise(i, 0)
    return x


def loop_heun(grid, x, churn, noise):
    strength, low, high, scale = churn or (0.0, 0.0, np.inf, 0.0)
    row = -1
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        gamma = min(strength / (len(grid) - 1), np.sqrt(2) - 1) if low <= s <= high else 0.0
        hat = s * (1 + gamma)
        row += 1 if i == 0 else 2
        x = x + scale * np.sqrt(hat**2 - s**2) * noise(row, 0)
        slope_now = (x - denoise(x, hat)) / hat
        after = x + (t - hat) * slope_now
        if t > 0:
            slope_next = (after - denoise(after, t)) / t
            after = x + (t - hat) * (slope_now + slope_next) / 2
        x = after
    return x


def loop_dpmpp(grid, x, order):
    past = []
    for s, t in itertools.pairwise(grid):
        d = denoise(x, s)
        if t == 0:
            return d
        lam, h = -np.log(s), np.log(s / t)
        if not past or order == 1:
            x = t / s * x - np.expm1(-h) * d
        elif len(past) == 1 or order == 2:
            r = (lam - past[-1][0]) / h
            x = t / s * x - np.expm1(-h) * ((1 + 1 / (2 * r)) * d - past[-1][1] / (2 * r))
        else:
            r0, r1 = (lam - past[-1][0]) / h, (past[-1][0] - past[-2][0]) / h
            d10, d11 = (d - past[-1][1]) / r0, (past[-1][1] - past[-2][1]) / r1
            d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
            x = t / s * x - np.expm1(-h) * d + (np.expm1(-h) / h + 1) * d1
            x = x - ((np.expm1(-h) + h) / h**2 - 0.5) * d2
        past.append((lam, d))
    return x


def loop_dpmpp_sde(grid, x, order, noise):
    past = []
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        d = denoise(x, s)
        if t == 0:
            return d
        lam, h = -np.log(s), np.log(s / t)
        k = 2 * h
        x = np.exp(-k) * x - np.expm1(-k) * d
        if past and order == 2:
            x = x + 0.5 * -np.expm1(-k) * (d - past[-1][1]) / ((lam - past[-1][0]) / h)
        elif len(past) == 1 and order == 3:
            x = x + (np.expm1(-k) / k + 1) * (d - past[-1][1]) / ((lam - past[-1][0]) / h)
        elif order == 3 and past:
            r0, r1 = (lam - past[-1][0]) / h, (past[-1][0] - past[-2][0]) / h
            d10, d11 = (d - past[-1][1]) / r0, (past[-1][1] - past[-2][1]) / r1
            d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
            phi2 = np.expm1(-k) / k + 1
            x = x + phi2 * d1 - (phi2 / k - 0.5) * d2
        x = x + t * np.sqrt(-np.expm1(-2 * h)) * noise(i, 0)
        past.append((lam, d))
    return x


def unipc_update(x, lam, end, past, new, order):
    """One predictor (`new` None) or corrector update from the state x at lam; `past` newest first, as (lambda, D)."""
    h = end - lam
    ratios, slopes = [], []
    for k in range(1, order):
        r = (past[k][0] - lam) / h
        ratios.append(r)
        slopes.append((past[k][1] - past[0][1]) / r)
    ratios.append(1.0)
    b_h, phi, factorial, system, right = np.expm1(-h), np.expm1(-h) / -h - 1, 1, [], []
    for k in range(1, order + 1):
        system.append(np.power(ratios, k - 1))
        right.append(phi * factorial / b_h)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    system, right = np.array(system), np.array(right)
    x = np.exp(-h) * x - np.expm1(-h) * past[0][1]
    if new is None:
        rho = [0.5] if order == 2 else np.linalg.solve(system[:-1, :-1], right[:-1])
    else:
        rho = [0.5] if order == 1 else np.linalg.solve(system, right)
        slopes.append(new - past[0][1])
    return x - b_h * sum((r * s for r, s in zip(rho, slopes, strict=True)), np.zeros_like(x))


def loop_unipc(grid, x, order):
    past, corrected = [], x
    for i, (s, t) in enumerate(itertools.pairwise(grid)):
        d = denoise(x, s)
        if i > 0:
            corrected = unipc_update(corrected, past[0][0], -np.log(s), past, d, min(order, i))
        past.insert(0, (-np.log(s), d))
        if t == 0:
            return d
        x = unipc_update(corrected, past[0][0], -np.log(t), past, None, min(order, i + 1))
    return x


@each_grid
@pytest.mark.parametrize(
    ("table", "loop"),
    [
        (gd.ddim, lambda g: loop_ddim(g, START, 0.0, normals())),
        (lambda g: gd.ddim(g, eta=0.6), lambda g: loop_ddim(g, START, 0.6, normals())),
        (gd.ancestral, lambda g: loop_ancestral(g, START, normals())),
        (gd.heun, lambda g: loop_heun(g, START, None, normals())),
        (lambda g: gd.heun(g, (5.0, 0.1, 7.0, 1.01)), lambda g: loop_heun(g, START, (5.0, 0.1, 7.0, 1.01), normals())),
        (lambda g: gd.dpmpp(g, 1), lambda g: loop_dpmpp(g, START, 1)),
        (gd.dpmpp, lambda g: loop_dpmpp(g, START, 2)),
        (lambda g: gd.dpmpp(g, 3), lambda g: loop_dpmpp(g, START, 3)),
        (lambda g: gd.dpmpp(g, 1, True), lambda g: loop_dpmpp_sde(g, START, 1, normals())),
        (lambda g: gd.dpmpp(g, 2, True), lambda g: loop_dpmpp_sde(g, START, 2, normals())),
        (lambda g: gd.dpmpp(g, 3, True), lambda g: loop_dpmpp_sde(g, START, 3, normals())),
        (lambda g: gd.unipc(g, 1), lambda g: loop_unipc(g, START, 1)),
        (lambda g: gd.unipc(g, 2), lambda g: loop_unipc(g, START, 2)),
        (gd.unipc, lambda g: loop_unipc(g, START, 3)),
    ],
)
def test_tables_equal_hand_written_loops(grid, table, loop):
    np.testing.assert_allclose(run_table(table(grid), denoise, START, normals()), loop(grid), rtol=1e-12, atol=1e-12)


# The coefficient generator.


@pytest.mark.parametrize("tau2", [0.0, 0.3, 1.0])
def test_generated_weights_integrate_polynomials_exactly(tau2):
    from scipy.integrate import quad

    nodes, start, end = [0.9, 0.4, -0.2], 0.9, 1.7
    weights = DataInLogLevel(tau2).weights(np.exp(-np.array(nodes)).tolist(), np.exp(-start), np.exp(-end))
    rate = 1 + tau2
    for power in range(3):
        exact = quad(lambda u, p=power: rate * np.exp(-rate * (end - u)) * u**p, start, end, epsabs=1e-14)[0]
        assert weights @ np.power(nodes, power) == pytest.approx(exact, abs=1e-13)


def test_one_node_gives_ddim_also_to_zero_noise():
    assert DataInLogLevel().weights([2.0], 2.0, 0.5)[0] == pytest.approx(0.75, abs=1e-15)
    last = gd.dpmpp(np.array([2.0, 0.0]), warm_start=True)
    assert last.a[0] == 0 and last.b[0].sum() == 1


def test_tiny_steps_keep_their_digits():
    weights = DataInLogLevel().weights([np.exp(-1.0), np.exp(-0.999999)], np.exp(-1.0), np.exp(-1.000001))
    assert weights.sum() == pytest.approx(-np.expm1(-1e-6), rel=1e-12)


# Facts and structure.


def test_facts():
    grid = gd.karras(12, 0.01, 80.0)
    facts = {
        "ddim": (gd.ddim(grid), 1, 12),
        "ancestral": (gd.ancestral(grid), 1, 12),
        "heun": (gd.heun(grid), 2, 23),
        "churn": (gd.heun(grid, (1.0, 0.0, 80.0, 1.0)), 2, 23),
        "dpmpp 3": (gd.dpmpp(grid, 3), 2, 12),
        "dpmpp 3 warm": (gd.dpmpp(grid, 3, warm_start=True), 3, 16),
        "dpmpp 2 warm": (gd.dpmpp(grid, 2, warm_start=True), 2, 13),
        "unipc": (gd.unipc(grid), 3, 12),
    }
    for table, order, nfe in facts.values():
        assert (table.order, table.nfe, table.num_steps) == (order, nfe, 12)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(table))
        assert table.b.dtype == np.float64


def test_the_last_step_to_zero_returns_the_prediction():
    for make in (gd.ddim, gd.heun, gd.dpmpp, gd.unipc, lambda g: gd.dpmpp(g, 3, warm_start=True)):
        calls = []

        def watched(x, sigma, calls=calls):
            calls.append(denoise(x, sigma))
            return calls[-1]

        last = run_table(make(gd.karras(6, 0.05, 10.0)), watched, START)
        np.testing.assert_allclose(last, calls[-1], rtol=1e-14)


def test_short_grids_work():
    for grid in ([2.0, 0.0], [2.0, 1.0], [2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.5]):
        for make in (gd.ddim, gd.heun, gd.unipc, lambda g: gd.dpmpp(g, 3), lambda g: gd.dpmpp(g, 3, warm_start=True)):
            assert np.isfinite(run_table(make(np.array(grid)), denoise, START)).all()


def test_rows_of_a_step_share_index_and_ends():
    table = gd.dpmpp(gd.karras(5, 0.1, 10.0), 3, warm_start=True)
    for i in range(table.num_steps):
        rows = table.step == i
        assert len(set(table.sigma_start[rows])) == 1 == len(set(table.sigma_next[rows]))
        np.testing.assert_array_equal(table.corrector[rows], [False, *[True] * (rows.sum() - 1)])
        assert table.sigma[rows][0] == table.sigma_start[rows][0]


def test_padding_changes_nothing():
    for make in (gd.heun, gd.unipc, gd.ancestral):
        table = make(gd.karras(5, 0.1, 10.0))
        longer = table.pad(table.num_rows + 3)
        assert (longer.nfe, longer.order, longer.num_steps) == (table.nfe, table.order, table.num_steps)
        both = [run_table(t, denoise, START, normals()) for t in (table, longer)]
        np.testing.assert_array_equal(*both)
    assert table.pad(table.num_rows) is table


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda g: gd.ddim(g[::-1]), "strictly descending"),
        (lambda g: gd.ddim(-g), "strictly descending"),
        (lambda g: gd.ddim(g - 1), "non-negative"),
        (lambda g: gd.ddim(g, eta=1.5), "eta"),
        (lambda g: gd.ddim(g, eta=np.nan), "eta"),
        (lambda g: gd.heun(g, churn=(1.0, 2.0)), "churn"),
        (lambda g: gd.heun(g, churn=(-1.0, 0.0, 1.0, 1.0)), "churn"),
        (lambda g: gd.dpmpp(g, order=4), "order"),
        (lambda g: gd.unipc(g, order=0), "order"),
        (lambda g: gd.ddim(g).pad(2), "num_rows"),
        (lambda g: jax.jit(lambda s: gd.ddim(g * s).b)(1.0), "concrete"),
    ],
)
def test_wrong_input(make, says):
    with pytest.raises(ValueError, match=says):
        make(gd.karras(5, 0.1, 10.0))
