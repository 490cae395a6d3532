"""What a table does to Gaussian data, exactly: no draws, no Monte Carlo."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genkit._core._checks import check, check_choice, describe, is_concrete
from genkit._core._table import HISTORY, Table

from ._analytic import GaussianDenoiser


_STARTS = ("exact", "white")

# What the recurrence carries: the state, the base and the history.
_CARRIED = 2 + HISTORY


# Concrete tables are run on the host, so that rows are NumPy arrays; traced ones give JAX's.
_Row = Float[Array, " d"] | Float[np.ndarray, " d"]


class ExactError(eqx.Module):
    """The law of the draws of a table on Gaussian data, beside the law that they should have.

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
    def bias(self) -> Any:
        """Largest absolute error of the mean."""
        return _numbers(self.mean).max(abs(self.mean - self.exact_mean))

    @property
    def relative_variance(self) -> Any:
        """Largest relative error of the variance, over the directions that have any."""
        xp = _numbers(self.variance)
        some = self.exact_variance > 0
        return xp.max(xp.where(some, abs(self.variance / xp.where(some, self.exact_variance, 1) - 1), 0))

    @property
    def flow(self) -> Any:
        """Root mean square error of the gain: what the solver does wrong per unit of the initial state."""
        xp = _numbers(self.gain)
        return xp.sqrt(xp.mean((self.gain - self.exact_gain) ** 2))

    @property
    def wasserstein(self) -> Any:
        """Wasserstein-2 distance of the law of the draws from the exact one."""
        xp = _numbers(self.variance)
        spread = xp.sqrt(self.variance) - xp.sqrt(self.exact_variance)
        return xp.sqrt(xp.sum((self.mean - self.exact_mean) ** 2 + spread**2))

    @property
    def kl(self) -> Any:
        """Kullback-Leibler divergence of the law of the draws from the exact one, in nats; both must have a density."""
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
        start: the law of the initial state: `"exact"`, the data with the noise of the first level; `"white"`, centered
            noise of that level, from which `genkit.sample` starts.

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
    leaves = jax.tree.leaves((table, gaussian))
    concrete = all(is_concrete(leaf) for leaf in leaves)
    check(np.ndim(table.sigma) == 1, "table", "one table", "a stack of tables", "Use `jax.vmap` over the stack.")
    if concrete:
        gaussian = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gaussian)
    along = gaussian.mean.ravel() if gaussian.basis is None else gaussian.mean.ravel() @ gaussian.basis
    variances = (np if concrete else jnp).broadcast_to(gaussian.variances, gaussian.shape).ravel()
    xp = np if concrete else jnp
    sigma, end = xp.asarray(table.sigma)[0], xp.asarray(table.sigma_next)[-1]
    first_mean = along if start == "exact" else 0 * along
    first_variance = variances + sigma**2 if start == "exact" else 0 * variances + sigma**2
    state = _initial(xp, first_mean, first_variance)
    rows = _rows(table, variances, xp)
    mean, cov, gain = _host_loop(rows, along, state) if concrete else _traced_loop(rows, along, state)
    total, exact = variances + sigma**2, variances + end**2
    return ExactError(mean[:, 0], cov[:, 0, 0], gain[:, 0], along, exact, xp.sqrt(exact / total))


def _numbers(array: Any) -> Any:
    """The array library of `array`."""
    return np if isinstance(array, (np.ndarray, np.generic)) else jnp


def _initial(xp: Any, mean: Any, variance: Any) -> tuple[Any, Any, Any]:
    """Joint mean, covariance and gain before the first row: state and base are the initial state, the history empty."""
    filled = xp.asarray([1.0, 1.0] + HISTORY * [0.0])
    return mean[:, None] * filled, variance[:, None, None] * xp.outer(filled, filled), 0 * mean[:, None] + filled


def _rows(table: Table, variances: Any, xp: Any) -> tuple[Any, ...]:
    """The columns of the table, the share of the state in the prediction `(rows, d)` among them."""
    sigma = xp.asarray(table.sigma)
    total = variances + sigma[:, None] ** 2
    kept = xp.where(total > 0, variances / xp.where(total > 0, total, 1), 0)
    kept = kept * xp.asarray(table.evaluate)[:, None]
    slot = xp.eye(HISTORY)[xp.asarray(table.slot)]
    columns = [xp.asarray(getattr(table, name)) for name in ("p", "q", "a", "b", "c", "d", "e", "c_stage", "evaluate")]
    return (kept, slot, *columns)


def _step(xp: Any, state: tuple[Any, Any, Any], row: tuple[Any, ...], along: Any) -> tuple[Any, Any, Any]:
    """One row: the joint vector goes through an affine map of its own in every direction, and noise is added."""
    mean, cov, gain = state
    kept, slot, p, q, a, b, c, d, e, c_stage, evaluate = row
    # The prediction is kept * state + (1 - kept) * mean of the data, and enters the history in one slot.
    predict = (p + q * kept)[:, None]
    zero = 0 * predict
    push = xp.concatenate([predict, zero, 0 * kept[:, None] + xp.zeros(HISTORY)], -1)
    shift = q * (evaluate - kept) * along
    old = xp.eye(_CARRIED)[2:] * (1 - slot)[:, None]
    history = old + slot[:, None] * push[:, None, :]
    history_shift = slot * shift[:, None]
    base = a * xp.eye(_CARRIED)[1] + xp.tensordot(history, b, axes=((1,), (0,)))
    base_shift = history_shift @ b
    y = d * base + xp.tensordot(history, e, axes=((1,), (0,)))
    y_shift = d * base_shift + history_shift @ e
    matrix = xp.concatenate([y[:, None], base[:, None], history], 1)
    offset = xp.concatenate([y_shift[:, None], base_shift[:, None], history_shift], 1)
    first = xp.concatenate([xp.stack([d * c, c]), xp.zeros(HISTORY)])
    second = xp.eye(_CARRIED)[0] * c_stage
    moved = lambda v: (matrix @ v[:, :, None])[:, :, 0]
    cov = matrix @ cov @ xp.swapaxes(matrix, 1, 2) + xp.outer(first, first) + xp.outer(second, second)
    return moved(mean) + offset, cov, moved(gain)


def _host_loop(rows: tuple[Any, ...], along: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The recurrence in NumPy."""
    for row in zip(*rows, strict=True):
        state = _step(np, state, row, along)
    return state


def _traced_loop(rows: tuple[Any, ...], along: Any, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The recurrence as a scan."""
    dtype = jnp.result_type(along, *rows)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    rows = tuple(jnp.asarray(column, dtype) for column in rows)
    body = lambda carry, row: (_step(jnp, carry, row, jnp.asarray(along, dtype)), None)
    return jax.lax.scan(body, state, rows)[0]
