"""The verb `sample` and the drawing loop without guidance: values, counts, compilation, batches, wrong input."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stats import assert_variance
from table_reference import EIGENVALUES, output_variance, run_table

import genkit as gk
from genkit.sampling import AbstractSampler, Draws, Row


gd = gk.diffusion
GRID = gd.karras(6, 0.05, 10.0)


class Gaussian(eqx.Module):
    """Gaussian data of diagonal covariance; with labels, of mean `label + 1`."""

    eigenvalues: jax.Array
    num_labels: int | None = eqx.field(static=True, default=None)

    def __init__(self, eigenvalues=EIGENVALUES, num_labels=None):
        self.eigenvalues = jnp.asarray(eigenvalues, jnp.result_type(float))
        self.num_labels = num_labels

    @property
    def shape(self):
        return self.eigenvalues.shape

    def __call__(self, x, sigma, cond=None):
        mean = 0.0 if cond is None else jnp.where(cond < 0, 0.0, cond + 1.0)
        return mean + (x - mean) * self.eigenvalues / (self.eigenvalues + sigma**2)


def curved(x, sigma, cond=None):
    return jnp.tanh(x / (1 + sigma**2)) - 0.3 * x / (2 + sigma**2)


def curved_numpy(x, sigma):
    return np.tanh(x / (1 + sigma**2)) - 0.3 * x / (2 + sigma**2)


SAMPLERS = {
    "ddim": gd.ddim,
    "heun": gd.heun,
    "dpmpp": lambda g: gd.dpmpp(g, 3),
    "dpmpp, warm": lambda g: gd.dpmpp(g, 3, warm_start=True),
    "unipc": gd.unipc,
}


# Values.


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_loop_equals_the_reference_runner(name, x64):
    # Padded to one row count, so that the five share one program.
    table = SAMPLERS[name](GRID).pad(12)
    start = 10.0 * np.random.default_rng(0).normal(size=(3, 2))
    draws = gk.sample(table, curved, 3, key=jr.key(0), x_init=start)
    np.testing.assert_allclose(draws.value, run_table(table, curved_numpy, start), rtol=1e-12, atol=1e-13)
    assert draws.value.dtype == jnp.float64


def test_noise_enters_where_the_table_says(x64):
    # One row that keeps nothing of the state, then one that passes on the base, or the state that was evaluated.
    def value_of(last, **noise):
        rows = [Row(1.0, 1.0, 0.5, 0, a=0.0, **noise), Row(0.5, 0.5, 0.0, 1, p=1.0, q=0.0, **last)]
        table = gk.Table.from_rows(rows, order=1)
        return gk.sample(table, curved, 20_000, key=jr.key(1), shape=(2,)).value

    base, state = {"a": 2.0}, {"a": 0.0, "b": {1: 3.0}}
    assert_variance(value_of(base, c=0.7), 4 * 0.49, gaussian=True)
    assert_variance(value_of(state, c=0.7), 9 * 0.49, gaussian=True)
    assert (value_of(base, c_stage=0.5) == 0).all()
    assert_variance(value_of(state, c_stage=0.5), 9 * 0.25, gaussian=True)
    assert_variance(value_of(state, c=0.7, c_stage=0.5), 9 * (0.49 + 0.25), gaussian=True)


def test_stochastic_draws_have_the_variance_of_their_table():
    table = gd.dpmpp(gd.log_uniform(12, 0.05, 10.0), 2, stochastic=True)
    draws = gk.sample(table, Gaussian(), 20_000, key=jr.key(2))
    # The state is drawn with variance sigma_max^2, without that of the data.
    start = run_table(table, lambda x, s: x * EIGENVALUES / (EIGENVALUES + s**2), np.ones(4), lambda *_: np.zeros(4))
    assert_variance(draws.value, output_variance(table, 10.0) - start**2 * EIGENVALUES, gaussian=True)


def test_rows_have_noise_of_their_own():
    table = gd.ancestral(np.array([3.0, 2.0, 1.0, 0.5]))
    silent = lambda x, sigma, cond=None: 0.0 * x
    states = np.asarray(gk.sample(table, silent, 4000, key=jr.key(3), shape=(1,), trajectory=True).trajectory)[..., 0]
    steps = states[:, 1:] - states[:, :-1] * table.a
    correlation = np.corrcoef(np.concatenate([states[:, :1], steps], axis=1).T)
    assert np.abs(correlation - np.eye(4)).max() < 4.9 / np.sqrt(4000)


def test_init_is_where_the_draw_starts():
    draws = gk.sample(gd.ddim(np.array([5.0, 1e-3])), lambda x, s, cond=None: x, 5000, key=jr.key(4), shape=(2,))
    assert_variance(draws.value, 25.0, gaussian=True)


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc"])
def test_trajectory_holds_the_levels_of_the_grid(name):
    draws = gk.sample(SAMPLERS[name](GRID), Gaussian(), 3, key=jr.key(0), trajectory=True, batch_size=2)
    assert draws.trajectory.shape == (3, len(GRID), 4)
    np.testing.assert_array_equal(draws.trajectory[:, -1], draws.value)
    plain = gk.sample(SAMPLERS[name](GRID), Gaussian(), 3, key=jr.key(0))
    np.testing.assert_allclose(plain.value, draws.value, rtol=1e-5, atol=1e-6)
    assert plain.trajectory is None
    direct = gk.Sampler(SAMPLERS[name](GRID)).draw(
        Gaussian(), jr.split(jr.key(0), 2), cond=None, x_init=None, shape=(4,), trajectory=True
    )
    assert direct.trajectory.shape == (2, len(GRID), 4)


def test_a_bare_table_and_a_sampler_are_the_same():
    table = gd.dpmpp(GRID)
    first = gk.sample(table, Gaussian(), 3, key=jr.key(0)).value
    np.testing.assert_array_equal(first, gk.sample(gk.Sampler(table), Gaussian(), 3, key=jr.key(0)).value)


def test_a_sampler_of_ones_own():
    class OneStep(AbstractSampler):
        def draw(self, model, keys, *, cond, x_init, shape):
            value = jax.vmap(lambda key: model(jr.normal(key, shape)))(keys)
            ones = jnp.ones(len(keys), jnp.int32)
            return Draws(value, ones, ones)

    draws = gk.sample(OneStep(), lambda z: 2 * z, 5, key=jr.key(0), shape=(3,), batch_size=2)
    assert draws.value.shape == (5, 3) and draws.nfe.tolist() == [1, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="takes none"):
        gk.sample(OneStep(), lambda z: z, 2, key=jr.key(0), shape=(3,), guidance=gk.guidance.cfg(2.0))


# Counts: told by a callback inside the denoiser, not by the report alone.


def watched(calls):
    def denoise(x, sigma, cond=None):
        jax.debug.callback(lambda _: calls.append(1), x)
        return x / (1 + sigma**2)

    return denoise


@pytest.mark.parametrize(("n", "batch_size", "evaluated"), [(6, None, 6), (6, 3, 6), (7, 3, 9), (2, 5, 2), (5, 4, 8)])
def test_executed_counts_include_padding(n, batch_size, evaluated):
    calls = []
    draws = gk.sample(gd.heun(GRID), watched(calls), n, key=jr.key(0), shape=(2,), batch_size=batch_size)
    jax.effects_barrier()
    assert len(calls) == 11 * evaluated == int(draws.nfe.sum())
    assert draws.nfe_logical.tolist() == [11] * n
    assert draws.value.shape == (n, 2) and draws.nfe.shape == (n,)


def test_idle_rows_evaluate_nothing():
    calls = []
    table = gd.heun(GRID, churn=(1.0, 0.0, 10.0, 1.0))
    draws = gk.sample(table.pad(20), watched(calls), 1, key=jr.key(0), shape=(2,))
    jax.effects_barrier()
    assert len(calls) == table.nfe == 11 == int(draws.nfe[0])


# Independence of batches.


@pytest.mark.parametrize("table", [gd.heun(GRID), gd.ancestral(GRID)], ids=["heun", "ancestral"])
def test_draws_do_not_depend_on_batch_size(table):
    whole = gk.sample(table, Gaussian(), 7, key=jr.key(5))
    for batch_size in (1, 2, 3, 7, 10):
        part = gk.sample(table, Gaussian(), 7, key=jr.key(5), batch_size=batch_size)
        np.testing.assert_allclose(part.value, whole.value, rtol=2e-6, atol=1e-7)
    fewer = gk.sample(table, Gaussian(), 3, key=jr.key(5))
    np.testing.assert_allclose(fewer.value, whole.value[:3], rtol=2e-6, atol=1e-7)


def test_draws_of_equal_batches_are_bitwise_equal():
    table = gd.ancestral(GRID)
    one = gk.sample(table, Gaussian(num_labels=3), 6, key=jr.key(6), cond=jnp.array([0, 1, 2, 0, 1, 2]), batch_size=3)
    # Same draws, other company: the members of the second batch differ.
    two = gk.sample(table, Gaussian(num_labels=3), 6, key=jr.key(6), cond=jnp.array([0, 1, 2, 2, -1, 0]), batch_size=3)
    np.testing.assert_array_equal(one.value[:3], two.value[:3])
    mixed = gk.sample(table, Gaussian(num_labels=3), 6, key=jr.key(6), cond=jnp.array([0, 2, 2, 0, 0, 2]), batch_size=3)
    for i in (0, 2, 3, 5):
        np.testing.assert_array_equal(one.value[i], mixed.value[i])


def test_a_condition_per_draw_and_one_for_all():
    labels = jnp.array([0, 2, -1, 1, 0])
    each = gk.sample(gd.heun(GRID), Gaussian(num_labels=3), 5, key=jr.key(7), cond=labels, batch_size=2)
    for i, label in enumerate(labels.tolist()):
        alone = gk.sample(gd.heun(GRID), Gaussian(num_labels=3), 5, key=jr.key(7), cond=label)
        np.testing.assert_allclose(each.value[i], alone.value[i], rtol=2e-6, atol=1e-6)


# Compilation.


def test_six_samplers_three_grids_one_compilation(compilations):
    makers = [
        gd.ddim, lambda g: gd.ddim(g, 0.4), gd.ancestral, lambda g: gd.dpmpp(g, 3),
        lambda g: gd.dpmpp(g, 2, stochastic=True), gd.unipc,
        lambda g: gd.heun(g[::2]).pad(8), lambda g: gd.dpmpp(g[2:], warm_start=True).pad(8),
    ]  # fmt: skip
    vp = gd.time_uniform(gd.VP(0.1, 20.0), 8, t_min=0.01, t_max=1.0)
    grids = [gd.karras(8, 0.02, 10.0), gd.log_uniform(8, 0.02, 10.0), vp]
    model = Gaussian()
    tables = [make(grid) for make in makers for grid in grids]
    keys = [jr.key(i) for i in range(len(tables))]
    gk.sample(tables[0], model, 4, key=keys[0])
    with compilations() as count:
        values = [gk.sample(table, model, 4, key=key).value for table, key in zip(tables[1:], keys[1:], strict=True)]
    assert count() == 0
    assert all(np.isfinite(v).all() for v in values)


def test_a_second_call_with_other_values_compiles_nothing(compilations):
    labels, other = jnp.array([0, 1, 2, 0, 1, 2]), jnp.array([2, 2, 1, 0, 0, -1])
    first, second = Gaussian(num_labels=3), Gaussian(EIGENVALUES + 1, num_labels=3)
    keys = jr.key(0), jr.key(1)
    start, farther = jnp.ones((6, 4)), jnp.asarray(np.full((6, 4), 2.0, np.float32))
    gk.sample(gd.heun(GRID), first, 6, key=keys[0], cond=labels, x_init=start, batch_size=4)
    with compilations() as count:
        gk.sample(gd.heun(GRID * 1.5), second, 6, key=keys[1], cond=other, x_init=farther, batch_size=4)
    assert count() == 0


def test_draw_is_pure_and_composes():
    table, keys = gd.heun(GRID), jr.split(jr.key(0), 3)
    draw = lambda model: gk.Sampler(table).draw(model, keys, cond=None, x_init=None, shape=(4,)).value
    np.testing.assert_allclose(jax.jit(draw)(Gaussian()), draw(Gaussian()), rtol=1e-5, atol=1e-6)
    inside = jax.jit(lambda key: gk.sample(table, Gaussian(), 3, key=key).value)(jr.key(9))
    np.testing.assert_allclose(inside, gk.sample(table, Gaussian(), 3, key=jr.key(9)).value, rtol=1e-5, atol=1e-6)


# Derivatives.


def test_gradients_through_a_table_are_finite_and_right(x64):
    table = gd.unipc(GRID)
    start = jnp.asarray(10.0 * np.random.default_rng(0).normal(size=(3, 2)))

    def loss(t):
        return jnp.sum(gk.sample(t, curved, 3, key=jr.key(0), x_init=start).value ** 2)

    gradient = eqx.filter_grad(loss)(jax.tree.map(jnp.asarray, table))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    for name, at in (("a", (3,)), ("b", (4, 1)), ("d", (2,)), ("e", (2, 0)), ("q", (1,)), ("sigma", (3,))):
        column = np.asarray(getattr(table, name))
        bump = np.zeros_like(column)
        bump[at] = 1e-6
        move = lambda s, n=name, c=column, b=bump: eqx.tree_at(lambda t: getattr(t, n), table, c + s * b)
        slope = (loss(move(1)) - loss(move(-1))) / 2e-6
        np.testing.assert_allclose(getattr(gradient, name)[at], slope, rtol=1e-6, atol=1e-7)


def test_gradients_with_respect_to_the_model_and_noise_scale():
    table = gd.ancestral(GRID)
    loss = lambda model: jnp.mean(gk.sample(table, model, 3, key=jr.key(0)).value ** 2)
    gradient = eqx.filter_grad(loss)(Gaussian())
    assert np.isfinite(gradient.eigenvalues).all() and (gradient.eigenvalues != 0).all()


def test_tables_stack_and_vmap():
    tables = [gd.ddim(GRID), gd.unipc(GRID), gd.ancestral(GRID)]
    keys = jr.split(jr.key(3), 4)
    draw = lambda table: gk.Sampler(table).draw(Gaussian(), keys, cond=None, x_init=None, shape=(4,)).value
    stacked = jax.vmap(draw)(jax.tree.map(lambda *leaves: np.stack(leaves), *tables))
    for i, table in enumerate(tables):
        np.testing.assert_allclose(stacked[i], draw(table), rtol=1e-5, atol=1e-6)


# Wrong input.


def good(**kwargs):
    call = {"sampler": gd.ddim(GRID), "denoiser": Gaussian(num_labels=3), "num_samples": 4, "key": jr.key(0), "cond": 1}
    call |= kwargs
    return gk.sample(call.pop("sampler"), call.pop("denoiser"), call.pop("num_samples"), **call)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"cond": 3}, "labels from 0 to 2"),
        ({"cond": [0, 1, 2, -2]}, "labels from 0 to 2"),
        ({"cond": [0, 1]}, "scalar or of length 4"),
        ({"shape": (3,)}, r"\(3,\) from the argument `shape`, \(4,\) from the denoiser"),
        ({"x_init": np.ones((4, 5))}, r"\(5,\) from `x_init`"),
        ({"x_init": np.ones((3, 4))}, "num_samples = 4"),
        ({"x_init": np.full((4, 4), np.nan)}, "`x_init` must be finite"),
        ({"denoiser": curved}, "`shape` must be given"),
        ({"sampler": gk.Sampler(gd.ddim(GRID), gk.guidance.cfg(2.0)), "guidance": gk.guidance.cfg(2.0)}, "given once"),
        ({"guidance": gk.guidance.cfg(2.0), "cond": None}, "`cond` must be given"),
        ({"denoiser": lambda x, sigma, cond: x[:2], "shape": (4,)}, "keeps the shape"),
    ],
)
def test_wrong_values(change, says):
    with pytest.raises(ValueError, match=says):
        good(**change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"key": jr.key_data(jr.key(0))}, r"typed JAX PRNG key|Key\["),
        ({"sampler": "heun"}, "`sampler` must be"),
        ({"denoiser": 3.0}, "denoiser"),
        ({"guidance": 4.0}, "`guidance` must be"),
        ({"cond": "seven"}, "`cond`"),
        ({"cond": True}, "`cond`"),
        ({"cond": 1.0}, "integer labels"),
    ],
)
def test_wrong_kinds(change, says):
    with pytest.raises(TypeError, match=says):
        good(**change)


def test_non_finite_draws_are_named():
    def breaks(x, sigma, cond=None):
        return jnp.where((sigma < 1.0) & (x[0] > 0), jnp.nan, x / (1 + sigma**2))

    table = gd.heun(GRID)
    with pytest.raises(gk.NonFiniteError, match="noise level") as caught:
        gk.sample(table, breaks, 8, key=jr.key(0), shape=(2,), batch_size=4)
    draws = caught.value.draws
    assert draws.value.shape == (4, 2)
    bad = ~np.isfinite(draws.value).all(axis=1)
    assert 0 < bad.sum() < 4
    # The first level below 1 is evaluated by the corrector of the step that ends there.
    level = GRID[GRID < 1.0][0]
    row = int(np.flatnonzero(table.sigma == level)[0])
    assert f"after row {row} of the sampler (noise level {level:g})" in str(caught.value)
    assert f"draw {int(np.flatnonzero(bad)[0])}," in str(caught.value)


def test_non_finite_draws_inside_jit_are_not_silent():
    broken = lambda x, sigma, cond=None: x * jnp.nan
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        jax.block_until_ready(
            jax.jit(lambda k: gk.sample(gd.ddim(GRID), broken, 2, key=k, shape=(2,)).value)(jr.key(0))
        )


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([Row(-1.0, 1.0, 0.5, 0)], "sigma"),
        ([Row(1.0, 1.0, 0.5, 0, c=np.nan)], "c"),
        ([Row(1.0, 1.0, 0.5, 1)], "step"),
        ([Row(1.0, 1.0, 0.5, 0), Row(1.0, 1.0, 0.5, 2)], "step"),
        ([Row(1.0, 1.0, 0.5, 0, b={1: 1.0}), Row(1.0, 1.0, 0.5, 1)], "predictions made so far"),
        ([Row(1.0, 1.0, 0.5, 0)] * 5 + [Row(1.0, 1.0, 0.5, 0, b=dict.fromkeys(range(5), 1.0))], "at most 4"),
    ],
)
def test_wrong_tables(rows, says):
    with pytest.raises(ValueError, match=says):
        gk.Table.from_rows(rows, order=1)


def test_every_callable_is_a_denoiser():
    """Flax's `Partial(apply, params)` is a pytree that JAX compares by value; bound methods and the like are not."""

    def apply(params, x, sigma, cond=None):
        return params["a"] * x / (1 + sigma**2)

    class Bound:
        params = {"a": jnp.array(0.9)}  # noqa: RUF012 - a stand-in for a library's object

        def apply(self, x, sigma, cond=None):
            return apply(self.params, x, sigma, cond)

    callables = [
        jax.tree_util.Partial(apply, Bound.params),
        functools.partial(apply, Bound.params),
        lambda x, sigma, cond=None: apply(Bound.params, x, sigma),
        Bound().apply,
    ]
    for guidance, cond in ((None, None), (gk.guidance.cfg(2.0), np.zeros(4, int))):
        drawn = [
            gk.sample(gd.heun(GRID), call, 4, shape=(2,), guidance=guidance, cond=cond, key=jr.key(0)).value
            for call in callables
        ]
        for other in drawn[1:]:
            np.testing.assert_allclose(other, drawn[0], rtol=1e-6)


def test_a_denoiser_of_two_arguments_is_told():
    with pytest.raises(TypeError, match=r"\(x, sigma, cond=None\).*three arguments.*lambda"):
        gk.sample(gd.heun(GRID), lambda x, sigma: x, 4, shape=(2,), key=jr.key(0))
