"""The verb `sample`: keys per draw, batches, checks, one compiled program."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree
from tqdm import tqdm

from genkit._core._checks import NonFiniteError, check, check_count, check_finite, check_key, describe, fail
from genkit._core._known import is_known
from genkit.sampling._checks import check_guidance, check_levels
from genkit.sampling._denoiser import Denoiser, as_denoiser
from genkit.sampling._draws import Draws
from genkit.sampling._sampler import AbstractSampler, Sampler, as_sampler, at_steps
from genkit.sampling._table import Table


# Draw i takes fold_in(key, i); what is fitted before drawing takes a number that no draw has.
_FIT = 2**32 - 1


def sample(
    sampler: PyTree,
    denoiser: Callable,
    num_samples: int,
    *,
    key: Key[Array, ""],
    cond: PyTree = None,
    guidance: PyTree = None,
    x_init: PyTree = None,
    shape: tuple[int, ...] | int | None = None,
    batch_size: int | None = None,
    trajectory: bool = False,
) -> Draws:
    """Draw from a model with a sampler, in compiled batches.

    Draw `i` depends on `fold_in(key, i)`, its own condition and its own initial state, never on `batch_size` or on the
    other draws. One program is compiled per shape; other values (grid, scales, conditions, weights) reuse it.

    Args:
        sampler: a `Table`, such as `gk.diffusion.heun(grid)`, or a sampler.
        denoiser: a `Denoiser`, or any callable pytree `(x, sigma, cond=None) -> x0` for one example.
        num_samples: number of draws `n`.
        cond: condition: a scalar for all draws, or an array with one entry per draw `(n, ...)`; `None` for none.
        guidance: a guidance, a step transform, a population, or a tuple of these; not if the sampler brings one.
        x_init: states at the first noise level `(n, *shape)`, that is `x0 + sigma_max * eps`; drawn if not given.
        shape: shape of one example; required where neither the denoiser nor `x_init` tells.
        batch_size: draws per batch, by default all at once; the last batch is padded. A multiple of the population.
        trajectory: also return the states at the levels of the grid.
        key: typed PRNG key.

    Returns:
        `Draws`: `.value` `(n, *shape)`, `.nfe` `(n,)`, `.nfe_logical` `(n,)`, `.info`, `.trajectory`
        `(n, num_steps + 1, *shape)` or `None`.

    Raises:
        TypeError: for a legacy key, or arguments of another kind.
        ValueError: for shapes that do not fit, labels out of range, a missing condition, guidance given twice, noise
            levels outside the range of the denoiser.
        NonFiniteError: if a draw (or `x_init`) holds NaN or infinity; names the draw and the noise level where it
            arose, and keeps all draws of its batch in `error.draws`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jax.numpy.zeros(2), jax.numpy.eye(2))
        >>> table = gk.diffusion.heun(gk.diffusion.karras(10, 0.01, 80.0))
        >>> draws = gk.sample(table, denoiser, 5, key=jax.random.key(0))
        >>> draws.value.shape, int(draws.nfe[0])
        ((5, 2), 19)
    """
    check_key(key)
    check_count("num_samples", num_samples)
    # A bare table is wrapped where it is compiled: on the host, making a `Sampler` costs as much as rows of a small
    # network.
    if not isinstance(sampler, Table) or guidance is not None:
        sampler = _with_guidance(as_sampler(sampler), guidance)
    sampler = _strong(sampler)
    # The facts are asked of the wrapped model; the program takes the model as it came, so that no wrapper shows in it.
    facts = as_denoiser(denoiser)
    check_levels(sampler.levels, facts)
    block = 1
    if isinstance(sampler, AbstractSampler):
        block = sampler.block_size
    size = _batch_size(num_samples, batch_size, block)
    x_init = _check_x_init(x_init, num_samples)
    shape = _shape(shape, facts, x_init)
    cond = _check_cond(cond, facts, num_samples, block)
    if isinstance(sampler, AbstractSampler):
        sampler = sampler.fitted_to(denoiser, cond=cond, shape=shape, key=jax.random.fold_in(key, _FIT))
    if isinstance(sampler, Sampler):
        if sampler.guidance is not None:
            check_guidance(sampler.guidance, sampler.table, denoiser, cond)
        if sampler.skip == "static":
            sampler = sampler.prepared(shape, cond)
    table = _table(sampler)
    batches = []
    starts = range(0, num_samples, size)
    # A bar costs as much as a row of a small network, and one batch has no use for it.
    bar = starts
    if len(starts) > 1:
        bar = tqdm(starts, desc="sample", unit="batch", disable=None, delay=2)
    for start in bar:
        rows = np.arange(start, start + size, dtype=np.int32)
        # Padding repeats the last draw's condition and state under keys that no draw has.
        held = np.minimum(rows, num_samples - 1)
        inputs = (cond, x_init)
        if len(starts) > 1:
            inputs = jax.tree.map(lambda leaf, held=held: leaf[held], inputs)
        draws, finite = _draw(sampler, denoiser, key, rows, inputs, shape, trajectory)
        if trajectory and table is not None:
            draws = eqx.tree_at(lambda d: d.trajectory, draws, at_steps(table, draws.trajectory))

        def retrace(rows: np.ndarray = rows, inputs: PyTree = inputs) -> Draws:
            return _draw(sampler, denoiser, key, rows, inputs, shape, True)[0]

        draws = _check_draws(draws, finite, start, num_samples, table, retrace)
        batches.append(draws)
    return _join(batches, num_samples, size)


@eqx.filter_jit
def _draw(
    sampler: AbstractSampler | Table,
    denoiser: Callable,
    key: Array,
    rows: Array | np.ndarray,
    inputs: PyTree,
    shape: tuple[int, ...],
    trajectory: bool,
) -> tuple[Draws, Array]:
    """One batch, compiled, and which of its draws are finite."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(rows)
    cond, x_init = inputs
    extra = {}
    if trajectory:
        extra["trajectory"] = True
    draws = as_sampler(sampler).draw(denoiser, keys, cond=cond, x_init=x_init, shape=shape, **extra)
    return draws, jnp.all(jnp.isfinite(draws.value), axis=tuple(range(1, draws.value.ndim)))


def _strong(tree: PyTree) -> PyTree:
    """Numbers made from Python numbers, of a definite dtype: `2.0` and `jnp.float32(2)` must not compile twice."""

    def is_weak(leaf: PyTree) -> bool:
        return isinstance(leaf, jax.Array) and leaf.weak_type

    def definite(leaf: PyTree) -> PyTree:
        if not is_weak(leaf):
            return leaf
        value = leaf
        if leaf.ndim == 0 and is_known(leaf):
            value = np.asarray(leaf)  # through the host, which compiles nothing
        return jnp.asarray(value, leaf.dtype)

    if not any(map(is_weak, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(definite, tree)


def _table(sampler: AbstractSampler | Table) -> Table | None:
    """The table that a sampler runs; `None` for those that run none."""
    if isinstance(sampler, Table):
        return sampler
    if isinstance(sampler, Sampler):
        return sampler.table
    return None


def _with_guidance(sampler: AbstractSampler, guidance: PyTree) -> AbstractSampler:
    """Give the sampler the guidance of the call, refusing two of them."""
    if guidance is None:
        return sampler
    if not sampler.takes_guidance:
        raise ValueError(
            f"`guidance` must be None with {type(sampler).__name__}, which takes none: outside a table there are no "
            "fixed steps, and what a guidance remembers would be wrong after the rejected steps of an adaptive solver; "
            f"got {type(guidance).__name__}. One that remembers nothing is passed as a denoiser, "
            "`gk.guidance.Guided(denoiser, guidance)`."
        )
    if sampler.guidance is not None:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            "`guidance` must be given once; got one in the sampler and one in the call. "
            "Drop one, or pass the bare table."
        )
    if isinstance(sampler, Sampler):
        return dataclasses.replace(sampler, guidance=guidance, patterns=None)
    return eqx.tree_at(lambda s: s.guidance, sampler, guidance, is_leaf=lambda leaf: leaf is None)


def _batch_size(num_samples: int, batch_size: int | None, block: int) -> int:
    """Draws per batch."""
    hint = f"Each block of {block} draws is one population."
    expected = f"a multiple of {block}"
    check(num_samples % block == 0, "num_samples", expected, num_samples, hint)
    if batch_size is None:
        return num_samples
    check_count("batch_size", batch_size)
    check(batch_size % block == 0, "batch_size", expected, batch_size, hint)
    return min(batch_size, num_samples)


def _check_x_init(x_init: PyTree, num_samples: int) -> Array | None:
    """The initial states as floating numbers, one per draw."""
    if x_init is None:
        return None
    x_init = _strong(jnp.asarray(x_init))
    if jnp.issubdtype(x_init.dtype, jnp.integer):
        x_init = x_init.astype(jnp.result_type(float))
    check(bool(jnp.issubdtype(x_init.dtype, jnp.floating)), "x_init", "of a floating dtype", x_init)
    if x_init.ndim == 0 or len(x_init) != num_samples:
        expected = f"of shape (num_samples, *shape) with num_samples = {num_samples}"
        fail("x_init", expected, f"shape {x_init.shape}")
    check_finite("x_init", x_init)
    return x_init


def _shape(shape: tuple[int, ...] | int | None, denoiser: Denoiser, x_init: Array | None) -> tuple[int, ...]:
    """The shape of one example, from whoever knows it; all who do must agree."""
    known = {}
    if isinstance(shape, (int, np.integer)):
        known["the argument `shape`"] = (int(shape),)
    elif shape is not None:
        known["the argument `shape`"] = tuple(shape)
    own = denoiser.shape
    if own is not None:
        known["the denoiser"] = tuple(own)
    if x_init is not None:
        known["`x_init`"] = x_init.shape[1:]
    if not known:
        raise ValueError(
            "`shape` must be given where neither the denoiser nor `x_init` tells the shape of one example; got None. "
            "Pass, say, `shape=(2,)`."
        )
    if len(set(known.values())) > 1:
        fail("shape", "the same wherever it is known", ", ".join(f"{what} from {who}" for who, what in known.items()))
    return next(iter(known.values()))


def _check_cond(cond: PyTree, denoiser: Denoiser, num_samples: int, block: int) -> Array | None:
    """One condition per draw; labels in range."""
    if cond is None:
        return None
    try:
        cond = _strong(jnp.asarray(cond))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`cond` must be a number or an array of numbers; got {describe(cond)}.") from error
    integer = jnp.issubdtype(cond.dtype, jnp.integer)
    floating = jnp.issubdtype(cond.dtype, jnp.floating)
    if not (integer or floating):
        raise TypeError(f"`cond` must hold integers (labels) or floating numbers; got {describe(cond)}.")
    labels = denoiser.num_labels
    if labels is not None and integer and is_known(cond):
        found = np.asarray(cond)
        wrong = found[(found < -1) | (found >= labels)]
        if wrong.size:
            fail("cond", f"labels from 0 to {labels - 1}, or -1 for none", f"{wrong.ravel()[0]}")
    if integer:
        cond = cond.astype(jnp.int32)
    elif labels is not None and cond.ndim <= 1:
        raise TypeError(
            f"`cond` must hold integer labels from 0 to {labels - 1}, or -1 for none; got {describe(cond)}."
        )
    if cond.ndim == 0:
        return jnp.broadcast_to(cond, (num_samples,))
    if len(cond) != num_samples:
        hint = "Give a scalar for all draws, or one entry per draw."
        fail("cond", f"a scalar or of length {num_samples}", f"shape {cond.shape}", hint)
    if block > 1 and is_known(cond):
        blocks = np.asarray(cond).reshape(-1, block, *cond.shape[1:])
        same = np.array_equal(blocks, np.broadcast_to(blocks[:, :1], blocks.shape), equal_nan=bool(floating))
        check(same, "cond", lambda: f"the same within each population of {block} draws", cond)
    return cond


def _check_draws(
    draws: Draws, finite: Array, start: int, num_samples: int, table: Table | None, retrace: Callable[[], Draws]
) -> Draws:
    """Refuse draws that hold NaN or infinity, saying where they arose."""
    if not is_known(finite):
        value = eqx.error_if(draws.value, ~jnp.all(finite), "`gk.sample`: a draw holds NaN or infinity.")
        return eqx.tree_at(lambda d: d.value, draws, value)
    real = np.asarray(finite)[: num_samples - start]
    if real.all():
        return draws
    first = int(np.flatnonzero(~real)[0])
    where = ""
    if table is not None:
        states = np.asarray(retrace().trajectory)[first]
        broken = ~np.isfinite(states).reshape(len(states), -1).all(axis=1)
        row = max(int(np.argmax(broken)) - 1, 0)
        level = float(np.asarray(table.sigma)[row])
        where = f", first after row {row} of the sampler (noise level {level:g})"
    error = NonFiniteError(
        f"draws must be finite; got NaN or infinity in {int((~real).sum())} of {real.size} draws of a batch, draw "
        f"{start + first}{where}. Check the denoiser at that noise level, the scale of the guidance, and `x_init`; "
        "`error.draws` keeps the batch."
    )
    error.draws = draws
    raise error


def _join(batches: list[Draws], num_samples: int, size: int) -> Draws:
    """Concatenate batches and drop the padding, whose evaluations count for the draws of the last batch."""
    total = len(batches) * size
    if total == num_samples and len(batches) == 1:
        return batches[0]
    last = batches[-1]
    real = size - (total - num_samples)
    if real < size:
        extra = jnp.sum(last.nfe[real:])
        share = extra // real + (jnp.arange(size) < extra % real)
        batches = [*batches[:-1], eqx.tree_at(lambda d: d.nfe, last, last.nfe + share)]

    # Reports may have one entry per population: the fraction that is real is the same.
    def join(*parts: Array) -> Array:
        return jnp.concatenate(parts)[: len(parts) * len(parts[0]) * num_samples // total]

    return jax.tree.map(join, *batches)
