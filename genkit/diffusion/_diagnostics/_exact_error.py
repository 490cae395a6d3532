"""The distribution of a table's draws on Gaussian data in closed form: no draws, no Monte Carlo."""

from types import ModuleType
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genkit._core._checks import check, check_choice, describe, is_concrete
from genkit.diffusion._denoisers._gaussian import GaussianDenoiser
from genkit.sampling import HISTORY, Table


_STARTS = ("exact", "white")

# What the recurrence carries: the state, the base and the history.
_CARRIED = 2 + HISTORY


# Concrete tables are run on the host, so that rows are NumPy arrays; traced ones give JAX's.
_Row = Float[Array, " d"] | Float[np.ndarray, " d"]
_Scalar = Float[Array, ""] | Float[np.ndarray, ""] | float
_Numbers = Array | np.ndarray


class ExactError(eqx.Module):
    """Mean and variance of the draws of a table on Gaussian data, beside those that they should have.

    All arrays have one entry per principal direction of the data.

    Args:
        mean: mean of the draws.
        variance: variance of the draws.
        gain: derivative of the draw by the initial state (noise, if any, held fixed).
        exact_mean: mean of the data with the noise of the last level.
        exact_variance: variance of the data with the noise of the last level.
        exact_gain: derivative of the exact probability flow from the first to the last level.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> table = gk.diffusion.ddim(gk.diffusion.karras(10, 0.02, 10.0, final=None))
        >>> error = gk.diffusion.exact_error(table, gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2)))
        >>> error.variance.shape
        (2,)
    """

    mean: _Row
    variance: _Row
    gain: _Row
    exact_mean: _Row
    exact_variance: _Row
    exact_gain: _Row

    @property
    def bias(self) -> _Scalar:
        """Largest absolute error of the mean."""
        return _numbers(self.mean).max(abs(self.mean - self.exact_mean))

    @property
    def relative_variance(self) -> _Scalar:
        """Largest relative error of the variance, over the directions that have any."""
        xp = _numbers(self.variance)
        some = self.exact_variance > 0
        return xp.max(xp.where(some, abs(self.variance / xp.where(some, self.exact_variance, 1) - 1), 0))

    @property
    def flow(self) -> _Scalar:
        """Root mean square error of the gain: what the solver does wrong per unit of the initial state."""
        xp = _numbers(self.gain)
        return xp.sqrt(xp.mean((self.gain - self.exact_gain) ** 2))

    @property
    def wasserstein(self) -> _Scalar:
        """Wasserstein-2 distance of the distribution of the draws from the exact one."""
        xp = _numbers(self.variance)
        spread = xp.sqrt(self.variance) - xp.sqrt(self.exact_variance)
        return xp.sqrt(xp.sum((self.mean - self.exact_mean) ** 2 + spread**2))

    @property
    def kl(self) -> _Scalar:
        """Kullback-Leibler divergence of the draws from the exact distribution, in nats; both must have a density."""
        xp = _numbers(self.variance)
        ratio = self.variance / self.exact_variance
        shift = (self.mean - self.exact_mean) ** 2 / self.exact_variance
        return 0.5 * xp.sum(ratio - 1 - xp.log(ratio) + shift)


def exact_error(table: Table, gaussian: GaussianDenoiser, *, start: str = "exact") -> ExactError:
    r"""Push Gaussian data through a table in closed form.

    On Gaussian data the denoiser is affine, so that state, base and history are Gaussian together. Their joint mean and
    covariance, a matrix of six by six for each principal direction, obey the recurrence of the table. The result is
    exact to rounding, noise included, and differentiable by the columns of the table: grids and coefficients can be
    learned by it. Concrete tables are run on the host in float64.

    Args:
        table: a sampler.
        gaussian: the data.
        start: distribution of the initial state: `"exact"`, the data with the noise of the first level; `"white"`,
            centered noise of that level, from which `genkit.sample` starts.

    Returns:
        `ExactError`; its properties `bias`, `relative_variance`, `flow`, `wasserstein` and `kl` sum it up.

    Raises:
        TypeError: if `table` or `gaussian` is of another kind.
        ValueError: for an unknown start.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.diffusion.GaussianDenoiser(jnp.zeros(4), jnp.array([4.0, 1.0, 0.25, 0.01]))
        >>> grid = gk.diffusion.log_uniform(17, 0.02, 10.0, final=None)
        >>> round(float(gk.diffusion.exact_error(gk.diffusion.ancestral(grid), data).relative_variance), 2)
        0.3
    """
    if not isinstance(table, Table):
        raise TypeError(f"`table` must be a `genkit.Table`; got {describe(table)}. Other samplers have no exact error.")
    if not isinstance(gaussian, GaussianDenoiser):
        raise TypeError(f"`gaussian` must be a `GaussianDenoiser`; got {describe(gaussian)}.")
    check_choice("start", start, _STARTS)
    check(np.ndim(table.sigma) == 1, "table", "one table", "a stack of tables", "Use `jax.vmap` over the stack.")
    concrete = all(is_concrete(leaf) for leaf in jax.tree.leaves((table, gaussian)))
    xp = jnp
    if concrete:
        # On the host in float64, also inside a trace: there is nothing to wait for.
        xp = np
        gaussian = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gaussian)
    along = gaussian.mean.ravel()
    if gaussian.basis is not None:
        along = along @ gaussian.basis
    variances = xp.broadcast_to(gaussian.variances, gaussian.shape).ravel()
    first_level = xp.asarray(table.sigma)[0]
    last_level = xp.asarray(table.sigma_next)[-1]
    total = variances + first_level**2
    if start == "exact":
        state = _initial(xp, along, total)
    else:
        state = _initial(xp, 0 * along, 0 * variances + first_level**2)
    rows = _rows(table, variances, xp)
    if concrete:
        end = _host_loop(rows, along, state)
    else:
        end = _traced_loop(rows, along, state)
    exact = variances + last_level**2
    # The state is the first entry of the joint vector.
    return ExactError(
        mean=end.mean[:, 0],
        variance=end.cov[:, 0, 0],
        gain=end.gain[:, 0],
        exact_mean=along,
        exact_variance=exact,
        exact_gain=xp.sqrt(exact / total),
    )


class _Joint(NamedTuple):
    """State, base and history together, in each direction: mean, covariance, and derivative by the initial state."""

    mean: _Numbers
    cov: _Numbers
    gain: _Numbers


class _Coefficients(NamedTuple):
    """The columns of a table that act on Gaussian data, one row after the other."""

    kept: _Numbers  # share of the state in the prediction, in each direction
    slot: _Numbers  # one where the row writes its prediction
    p: _Numbers
    q: _Numbers
    a: _Numbers
    b: _Numbers
    c: _Numbers
    d: _Numbers
    e: _Numbers
    c_stage: _Numbers
    evaluate: _Numbers


def _numbers(array: _Numbers | np.generic) -> ModuleType:
    """The array library of `array`."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np
    return jnp


def _initial(xp: ModuleType, mean: _Numbers, variance: _Numbers) -> _Joint:
    """The joint vector before the first row: state and base are the initial state, the history is empty."""
    filled = xp.asarray([1.0, 1.0] + HISTORY * [0.0])
    return _Joint(
        mean=mean[:, None] * filled,
        cov=variance[:, None, None] * xp.outer(filled, filled),
        gain=0 * mean[:, None] + filled,
    )


def _rows(table: Table, variances: _Numbers, xp: ModuleType) -> _Coefficients:
    """The columns of the table, with the share of the state in each prediction."""
    sigma = xp.asarray(table.sigma)
    evaluate = xp.asarray(table.evaluate)
    total = variances + sigma[:, None] ** 2
    # A direction without variance stays at the mean, also at zero noise, where the quotient is 0 / 0.
    kept = xp.where(total > 0, variances / xp.where(total > 0, total, 1), 0)
    return _Coefficients(
        kept=kept * evaluate[:, None],
        slot=xp.eye(HISTORY)[xp.asarray(table.slot)],
        p=xp.asarray(table.p),
        q=xp.asarray(table.q),
        a=xp.asarray(table.a),
        b=xp.asarray(table.b),
        c=xp.asarray(table.c),
        d=xp.asarray(table.d),
        e=xp.asarray(table.e),
        c_stage=xp.asarray(table.c_stage),
        evaluate=evaluate,
    )


def _step(xp: ModuleType, state: _Joint, row: _Coefficients, along: _Numbers) -> _Joint:
    """One row: the joint vector goes through an affine map of its own in every direction, and noise is added."""
    # The prediction is kept * state + (1 - kept) * mean of the data, and enters the history in one slot.
    predict = (row.p + row.q * row.kept)[:, None]
    push = xp.concatenate([predict, 0 * predict, 0 * row.kept[:, None] + xp.zeros(HISTORY)], -1)
    shift = row.q * (row.evaluate - row.kept) * along
    old = xp.eye(_CARRIED)[2:] * (1 - row.slot)[:, None]
    history = old + row.slot[:, None] * push[:, None, :]
    history_shift = row.slot * shift[:, None]
    base = row.a * xp.eye(_CARRIED)[1] + xp.tensordot(history, row.b, axes=((1,), (0,)))
    base_shift = history_shift @ row.b
    y = row.d * base + xp.tensordot(history, row.e, axes=((1,), (0,)))
    y_shift = row.d * base_shift + history_shift @ row.e
    matrix = xp.concatenate([y[:, None], base[:, None], history], 1)
    offset = xp.concatenate([y_shift[:, None], base_shift[:, None], history_shift], 1)
    # Noise of the base reaches the state through its weight there; noise of the stage is the state's alone.
    of_base = xp.concatenate([xp.stack([row.d * row.c, row.c]), xp.zeros(HISTORY)])
    of_stage = xp.eye(_CARRIED)[0] * row.c_stage
    noise = xp.outer(of_base, of_base) + xp.outer(of_stage, of_stage)
    return _Joint(
        mean=(matrix @ state.mean[:, :, None])[:, :, 0] + offset,
        cov=matrix @ state.cov @ xp.swapaxes(matrix, 1, 2) + noise,
        gain=(matrix @ state.gain[:, :, None])[:, :, 0],
    )


def _host_loop(rows: _Coefficients, along: _Numbers, state: _Joint) -> _Joint:
    """The recurrence in NumPy."""
    for row in zip(*rows, strict=True):
        state = _step(np, state, _Coefficients(*row), along)
    return state


def _traced_loop(rows: _Coefficients, along: _Numbers, state: _Joint) -> _Joint:
    """The recurrence as a scan."""
    dtype = jnp.result_type(along, *rows)
    along = jnp.asarray(along, dtype)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    rows = jax.tree.map(lambda column: jnp.asarray(column, dtype), rows)

    def body(state: _Joint, row: _Coefficients) -> tuple[_Joint, None]:
        return _step(jnp, state, row, along), None

    return jax.lax.scan(body, state, rows)[0]
