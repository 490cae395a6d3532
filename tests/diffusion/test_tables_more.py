"""The further tables: measured orders and variances, hand-written loops, and the exact error that measures them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from table_reference import EIGENVALUES, flow_map, gaussian, output_variance, run_table

import genkit as gk
from genkit.diffusion._samplers._charts import DataInLogLevel
from genkit.diffusion._samplers._multistep import multistep, table as make_table


gd = gk.diffusion
SIGMA_MIN, SIGMA_MAX = 0.02, 10.0


def data_in_log_level(grid, warm_start):
    """The fourth order of the family of DPM-Solver++, which has no public name."""
    chart = DataInLogLevel()
    return make_table(multistep(grid, chart, 4, start=chart if warm_start else None), 4, warm=warm_start)


# Root mean square errors on Gaussian data from 10 times the unit vector, Karras grid, at 12, 24, ... 384 evaluations,
# and the order they measure; the first nine as tabulated for these methods, the rest pinned as measured.
FLOW = {
    "lms 3, cold": (lambda g: gd.lms(g, 3), 1, "2.8e-02 4.9e-03 7.7e-04 1.2e-04 1.9e-05 3.4e-06", 2.48),
    "lms 4, cold": (gd.lms, 1, "2.1e-02 2.6e-03 3.1e-04 4.7e-05 9.6e-06 2.2e-06", 2.11),
    "exponential 3, cold": (
        lambda g: gd.sa(g, 3, 0.0, False), 1, "1.6e-02 1.9e-03 2.9e-04 5.2e-05 1.1e-05 2.4e-06", 2.16,
    ),
    "exponential 4, cold": (
        lambda g: data_in_log_level(g, False), 1, "6.6e-03 7.0e-04 1.5e-04 3.6e-05 8.7e-06 2.2e-06", 2.03,
    ),
    "exponential 4, warm": (
        lambda g: data_in_log_level(g, True), 1, "6.5e-03 2.2e-04 1.0e-05 5.4e-07 3.1e-08 1.9e-09", 4.05,
    ),
    "dpm-solver++ 2S": (
        lambda g: gd.dpm_solver(g, 2, "x0"), 2, "4.8e-02 1.3e-02 3.5e-03 8.9e-04 2.2e-04 5.6e-05", 1.99,
    ),
    "dpm-solver 3": (lambda g: gd.dpm_solver(g, 3), 3, "4.0e-03 2.2e-04 1.3e-05 8.8e-07 8.5e-08 1.1e-08", 2.99),
    "sa 3, tau 0": (lambda g: gd.sa(g, 3, 0.0), 1, "8.7e-03 5.2e-04 3.2e-05 2.0e-06 1.1e-07 6.3e-09", 4.19),
    "dpm-solver 2": (gd.dpm_solver, 2, "6.7e-02 1.6e-02 3.7e-03 9.2e-04 2.3e-04 5.7e-05", 2.01),
    "deis 3, cold": (gd.deis, 1, "2.0e-03 4.1e-04 1.1e-04 2.9e-05 7.8e-06 2.0e-06", 1.95),
    "deis 3, warm": (lambda g: gd.deis(g, 3, True), 1, "3.8e-03 5.5e-04 7.5e-05 9.7e-06 1.2e-06 1.6e-07", 2.99),
    "deis 4, warm": (lambda g: gd.deis(g, 4, True), 1, "2.6e-03 1.3e-04 6.5e-06 3.4e-07 1.9e-08 1.1e-09", 4.08),
    "lms 4, warm": (lambda g: gd.lms(g, 4, True), 1, "1.3e-02 1.7e-03 1.4e-04 1.0e-05 6.9e-07 4.5e-08", 3.95),
    "velocity 2": (gd.velocity_ab, 1, "1.7e-02 4.7e-03 1.2e-03 3.0e-04 7.6e-05 1.9e-05", 2.00),
    "velocity 3, warm": (
        lambda g: gd.velocity_ab(g, 3, True), 1, "4.5e-03 5.9e-04 7.9e-05 1.0e-05 1.3e-06 1.6e-07", 2.99,
    ),
    "rosenbrock 3, warm": (
        lambda g: gd.rosenbrock(g, 3, 1.0, True), 1, "1.1e-02 1.6e-03 2.1e-04 2.7e-05 3.4e-06 4.3e-07", 3.00,
    ),
    "ipndm, uniform": (lambda g: gd.ipndm(g, uniform=True), 1, "5.8e-03 1.5e-03 3.9e-04 9.9e-05 2.5e-05 6.3e-06", 1.99),
}  # fmt: skip

# Largest relative error of the output variance, log-uniform grid, 16, 32, ... 256 steps; the first four as tabulated.
VARIANCE = {
    "euler-maruyama": (gd.euler_maruyama, "0.24 0.11 0.054 0.027 0.013"),
    "reverse diffusion": (gd.reverse_diffusion, "0.53 0.23 0.11 0.052 0.026"),
    "sa 2, predictor": (lambda g: gd.sa(g, 2, 1.0, False), "0.11 0.027 0.0065 0.0016 0.0004"),
    "sa 3, predictor": (lambda g: gd.sa(g, 3, 1.0, False), "0.071 0.0077 0.0013 0.00028 6.6e-05"),
    "sa 1": (lambda g: gd.sa(g, 1), "0.16 0.047 0.012 0.0032 0.0008"),
    "sa 2": (lambda g: gd.sa(g, 2), "0.076 0.012 0.0020 0.00039 8.1e-05"),
    "sa 3": (gd.sa, "0.042 0.0054 0.0012 0.00027 6.5e-05"),
    "restart": (lambda g: gd.restart(g, 0.1, 1.0, 2, max(len(g) // 4, 2)), "0.097 0.022 0.0052 0.0013 0.00032"),
}


def data(eigenvalues=EIGENVALUES):
    with jax.enable_x64(True):
        return gd.GaussianDenoiser(jnp.zeros(len(eigenvalues)), jnp.asarray(eigenvalues))


def grid_of(steps, make=gd.karras):
    return make(steps + 1, SIGMA_MIN, SIGMA_MAX, final=None)


def assert_digits(found, printed):
    """Equal to two printed digits, allowing for rounding them twice."""
    wanted = np.array(printed.split(), float)
    np.testing.assert_array_less(np.abs(np.array(found) - wanted), 0.6 * 10 ** (np.floor(np.log10(wanted)) - 1))


@pytest.mark.parametrize("name", FLOW)
def test_order_of_convergence(name):
    make, evaluations, printed, order = FLOW[name]
    law = data()
    counts = [n // evaluations for n in (12, 24, 48, 96, 192, 384)]
    tables = [make(grid_of(n)) for n in counts]
    errors = [SIGMA_MAX * gd.exact_error(table, law).flow for table in tables]
    assert_digits(errors, printed)
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.006)
    assert -np.polyfit(np.log(counts[-4:]), np.log(errors[-4:]), 1)[0] > tables[0].order - 0.15


@pytest.mark.parametrize("name", VARIANCE)
def test_output_variance(name):
    make, printed = VARIANCE[name]
    law = data()
    tables = [make(grid_of(n, gd.log_uniform)) for n in (16, 32, 64, 128, 256)]
    errors = [gd.exact_error(table, law).relative_variance for table in tables]
    assert_digits(errors, printed)
    assert np.log2(errors[-2] / errors[-1]) > tables[-1].order - 0.07


EVERY = {
    "heun, churn": lambda g: gd.heun(g, (2.0, 0.05, 8.0, 1.0)),
    "ddim, eta": lambda g: gd.ddim(g, 0.5),
    "unipc": gd.unipc,
    "dpmpp": lambda g: gd.dpmpp(g, 3, warm_start=True),
    "deis": lambda g: gd.deis(g, 4, True),
    "sa": gd.sa,
    "restart": lambda g: gd.restart(g, 0.1, 1.0, 2, 3),
    "padded": lambda g: gd.ancestral(g).pad(40),
}


@pytest.mark.parametrize("name", EVERY)
def test_exact_error_agrees_with_pushed_noises(name):
    # An independent route: every unit noise is pushed through the table by itself.
    for table in (EVERY[name](grid_of(20)), EVERY[name](gd.karras(12, SIGMA_MIN, SIGMA_MAX))):
        error = gd.exact_error(table, data())
        np.testing.assert_allclose(error.variance, output_variance(table, SIGMA_MAX), rtol=1e-10)
        end = table.sigma_next[-1]
        np.testing.assert_allclose(error.exact_gain, flow_map(np.ones(4), SIGMA_MAX, end), rtol=1e-12)
        silent = run_table(table, gaussian(), np.ones(4), lambda r, s: 0.0)
        np.testing.assert_allclose(error.gain, silent, rtol=1e-9, atol=1e-14)


def test_exact_error_follows_the_mean_and_the_basis(x64):
    # A full covariance and a mean: the law in principal directions is the law of draws, to their standard error.
    cov = jnp.array([[1.0, 0.6], [0.6, 0.5]])
    law = gd.GaussianDenoiser(jnp.array([1.0, -2.0]), cov)
    table = gd.sa(gd.karras(8, 0.1, 5.0), 2)
    for start in ("exact", "white"):
        error = gd.exact_error(table, law, start=start)
        x_init = law.sample(20_000, key=jr.key(1)) if start == "exact" else jnp.zeros((20_000, 2))
        x_init = x_init + 5.0 * jr.normal(jr.key(2), x_init.shape)
        draws = gk.sample(table, law, 20_000, key=jr.key(3), x_init=x_init).value @ law.basis
        z = 5.5
        assert np.all(np.abs(draws.mean(0) - error.mean) < z * np.sqrt(error.variance / 20_000))
        np.testing.assert_allclose(draws.var(0), error.variance, rtol=z * np.sqrt(2 / 20_000))
        # Only the white start misses the mean of the data.
        assert (error.bias < 1e-9) == (start == "exact")
        expected = np.sum((error.mean - error.exact_mean) ** 2)
        expected += np.sum((np.sqrt(error.variance) - np.sqrt(error.exact_variance)) ** 2)
        np.testing.assert_allclose(error.wasserstein**2, expected)
        assert error.kl > 0


def test_the_rosenbrock_step_is_exact_on_gaussian_data_of_its_deviation():
    grid = gd.karras(6, SIGMA_MIN, SIGMA_MAX, final=None)
    assert gd.exact_error(gd.rosenbrock(grid, sigma_data=0.7), data([0.49])).flow < 1e-15
    assert gd.exact_error(gd.ddim(grid), data([0.49])).flow > 0.01


def test_tables_are_differentiable_and_vectorize(x64):
    # The gradient of the exact error by the stochasticity of every step, against finite differences; and eight samplers
    # as one stack, each as by itself.
    law = data()
    grid = gd.karras(6, 0.1, 5.0, final=None)
    makers = [gd.ddim, gd.ancestral, gd.dpmpp, gd.unipc, gd.deis, gd.lms, gd.sa, gd.rosenbrock]
    tables = [jax.tree.map(jnp.asarray, make(grid)) for make in makers]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tables)

    @jax.jit
    def both(stack):
        error = lambda table: gd.exact_error(table, law).wasserstein
        return jax.vmap(jax.value_and_grad(error, allow_int=True))(stack)

    values, slopes = both(stack)
    np.testing.assert_allclose(values, [gd.exact_error(make(grid), law).wasserstein for make in makers], rtol=1e-10)
    for k, name, at in ((1, "c", (2,)), (2, "b", (3, 1)), (7, "sigma", (1,)), (4, "a", (0,))):
        shifted = []
        for sign in (1, -1):
            column = np.array(getattr(makers[k](grid), name))
            column[at] += sign * 1e-5
            table = jax.tree.map(np.asarray, makers[k](grid))
            leaves = {f: getattr(table, f) for f in table.__dataclass_fields__} | {name: column}
            shifted.append(gd.exact_error(gk.Table(**leaves), law).wasserstein)
        np.testing.assert_allclose(
            getattr(slopes, name)[(k, *at)], (shifted[0] - shifted[1]) / 2e-5, rtol=1e-5, atol=1e-8
        )


def test_draws_of_samplers_side_by_side_are_those_of_each(x64):
    # With and without noise, with idle rows here and there: what one of them does not do, the others do not undo.
    grid = gd.karras(4, 0.1, 5.0)
    tables = [gd.ddim(grid), gd.ancestral(grid), gd.heun(grid, (2.0, 0.0, 10.0, 1.0)), gd.restart(grid, 0.5, 2.0)]
    tables = [table.pad(max(t.num_rows for t in tables)) for table in tables]
    keys = jax.vmap(lambda i: jr.fold_in(jr.key(0), i))(jnp.arange(3))
    law = data()

    @jax.jit
    def draw(table):
        found = gk.Sampler(table).draw(law, keys, cond=None, x_init=None, shape=(4,))
        return found.value, found.nfe

    value, nfe = jax.jit(jax.vmap(draw))(jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *tables))
    for i, table in enumerate(tables):
        alone, count = draw(table)
        np.testing.assert_allclose(value[i], alone, rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(nfe[i], count)
        assert int(count[0]) == table.nfe


def test_draws_are_differentiable_by_the_table(x64):
    law, grid = data(), gd.karras(4, 0.1, 5.0)
    x_init = 5 * jr.normal(jr.key(0), (2, 4))
    keys = jax.vmap(lambda i: jr.fold_in(jr.key(1), i))(jnp.arange(2))

    @jax.jit
    @jax.grad
    def slope(scale):
        table = jax.tree.map(jnp.asarray, gd.ancestral(grid))
        table = gk.Table(**{f: getattr(table, f) for f in table.__dataclass_fields__} | {"c": scale * table.c})
        return jnp.sum(gk.Sampler(table).draw(law, keys, cond=None, x_init=x_init, shape=(4,)).value ** 2)

    # Draws are affine in the scale of the noise, their squares quadratic: the slope is affine.
    first, second, third = slope(1.0), slope(2.0), slope(3.0)
    np.testing.assert_allclose(third - second, second - first, rtol=1e-9)


def test_stochasticity_that_depends_on_the_level():
    grid = gd.karras(9, 0.02, 10.0)
    table = gd.sa(grid, 2, lambda sigma: float(0.1 < sigma < 1.0))
    np.testing.assert_array_equal(table.c > 0, (table.sigma > 0.1) & (table.sigma < 1.0) & (table.sigma_next > 0))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda g: gd.deis(g, 5), "order"),
        (lambda g: gd.deis(g, clock="time"), "clock"),
        (lambda g: gd.lms(g, 0), "order"),
        (lambda g: gd.ipndm(g[::-1]), "strictly descending"),
        (lambda g: gd.rosenbrock(g, sigma_data=0.0), "sigma_data"),
        (lambda g: gd.dpm_solver(g, 4), "order"),
        (lambda g: gd.dpm_solver(g, 3, "x0"), "order"),
        (lambda g: gd.dpm_solver(g, 2, "score"), "prediction"),
        (lambda g: gd.sa(g, 4), "order"),
        (lambda g: gd.sa(g, tau=-1.0), "tau"),
        (lambda g: gd.sa(g, tau=np.nan), "tau"),
        (lambda g: gd.restart(g, 20.0, 30.0), "sigma_lo"),
        (lambda g: gd.restart(g, 1.0, 0.5), "sigma_hi"),
        (lambda g: gd.restart(g, 1.0, 2.0, 0), "num_restarts"),
        (lambda g: gd.exact_error(gd.ddim(g), data(), start="warm"), "start"),
    ],
)
def test_wrong_input(make, says):
    with pytest.raises(ValueError, match=says):
        make(gd.karras(5, 0.1, 10.0))


def test_the_exact_error_wants_a_table_and_a_gaussian():
    mixture = gd.MixtureDenoiser(jnp.ones(1), jnp.zeros((1, 4)), jnp.array(1.0))
    with pytest.raises(TypeError, match="gaussian"):
        gd.exact_error(gd.ddim(grid_of(3)), mixture)
    with pytest.raises(TypeError, match="table"):
        gd.exact_error(gk.Sampler(gd.ddim(grid_of(3))), data())
