"""Observations of a path: times, values, their distribution given the state, and which of them are there."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check, check_finite, check_interval, check_positive, check_shape, is_concrete


class GaussianNoise(eqx.Module):
    """The likelihood `y ~ N(x, scale^2)` per coordinate, its scale a leaf.

    Args:
        scale: standard deviation of the measurement error, positive, scalar or (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.sde import GaussianNoise
        >>> float(GaussianNoise(0.1)(jnp.array([2.0])).mean[0])
        2.0
    """

    scale: Array = eqx.field(converter=jnp.asarray)

    def __check_init__(self):
        check_positive("scale", self.scale)

    def __call__(self, x: Float[Array, " d"]) -> dist.Distribution:
        """The distribution of one observation given the state."""
        return dist.Normal(x, self.scale)


class Observed(eqx.Module):
    """Observations `y[i] ~ likelihood(x(ts[i]))`, at any increasing times, some possibly missing.

    Args:
        ts: times, increasing, non-negative, shape (n,).
        y: values, shape (n, ...), one row per time; (n,) is read as (n, 1). Masked rows may be NaN.
        likelihood: `likelihood(x) -> numpyro distribution` of one row, for a state x of shape (d,).
        mask: booleans (n,), True where observed; `None` means all.

    Raises:
        ValueError: if the times are not increasing and non-negative, shapes disagree, nothing is observed, or an
            observed value is not finite.

    Example:
        >>> import jax.numpy as jnp, genkit.sde as gs
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.1, jnp.nan]), gs.GaussianNoise(0.1),
        ...                        mask=jnp.array([True, False]))
        >>> observed.y.shape
        (2, 1)
    """

    ts: Any
    y: Array
    likelihood: Callable
    mask: Any

    def __init__(self, ts: Any, y: ArrayLike, likelihood: Callable, mask: Any = None):
        # Times and masks known on the host stay there, so that the step grid can be laid out when this is traced.
        self.ts = np.asarray(ts) if not isinstance(ts, jax.Array) else ts
        y = jnp.asarray(y, jnp.result_type(float, jnp.asarray(y)))
        self.y = y[:, None] if y.ndim == 1 else y
        self.likelihood = likelihood
        n = jnp.size(ts)
        self.mask = np.ones(n, bool) if mask is None else mask if isinstance(mask, jax.Array) else np.asarray(mask)

    def __check_init__(self):
        check_times("ts", self.ts)
        n = self.ts.shape[0]
        check(
            self.y.ndim > 0 and self.y.shape[0] == n,
            "y",
            f"of shape ({n}, ...), one row per time",
            f"shape {self.y.shape}",
        )
        check_shape("mask", self.mask, (n,))
        check(self.mask.dtype == bool, "mask", "boolean, True where observed", self.mask)
        check(callable(self.likelihood), "likelihood", "a function x -> numpyro law", self.likelihood)
        if is_concrete(self.mask):
            check(bool(np.asarray(self.mask).any()), "mask", "True somewhere", "all observations missing")
            if is_concrete(self.y):
                hint = "Mark missing rows in `mask`."
                check_finite("y", np.asarray(self.y)[np.asarray(self.mask)], hint)

    def filled(self) -> Array:
        """The values with masked rows set to zero, so that no NaN enters a computation."""
        keep = self.mask.reshape(-1, *([1] * (self.y.ndim - 1)))
        return jnp.where(keep, self.y, 0.0)

    def log_likelihood(self, x: Float[Array, " n d"]) -> Float[Array, ""]:
        """Log-density of the observed rows given the states `x` at all times; masked rows count nothing."""
        return jnp.sum(self.log_likelihoods(x))

    def log_likelihoods(self, x: Float[Array, " n d"]) -> Float[Array, " n"]:
        """Log-density of each row given the state at its time; 0 for masked rows."""

        def row(x: Array, y: Array, keep: Array) -> Array:
            law = self.likelihood(x)
            shape = law.batch_shape + law.event_shape
            hint = "One row of `y` is one draw of `likelihood(x)`, for a state of as many coordinates as the model's."
            expected = f"of {int(np.prod(shape))} entries a row, as the likelihood's shape {shape}"
            ours, theirs = (tuple(n for n in s if n != 1) for s in (y.shape, shape))
            fits = y.size == int(np.prod(shape)) and (min(len(ours), len(theirs)) < 2 or ours == theirs)
            check(fits, "y", expected, f"rows of shape {y.shape}", hint)
            return jnp.where(keep, jnp.sum(law.log_prob(y.reshape(shape))), 0.0)

        return jax.vmap(row)(x, self.filled(), jnp.asarray(self.mask))


def check_times(name: str, ts: Any) -> None:
    """Refuse times that are not one-dimensional, strictly increasing and non-negative."""
    check(jnp.ndim(ts) == 1 and jnp.size(ts) >= 1, name, "times of shape (n,)", f"shape {jnp.shape(ts)}")
    check_interval(name, ts, 0)
    if is_concrete(ts) and jnp.size(ts) > 1:
        times = np.asarray(ts)
        bad = int(np.argmin(np.diff(times)))
        got = f"{name}[{bad}] = {times[bad]} then {times[bad + 1]}"
        check(bool(times[bad + 1] > times[bad]), name, "strictly increasing", got, "Sort and drop duplicates.")


def gaussian_parts(likelihood: Callable, x: Array) -> tuple[Array, Array, Array] | None:
    """Linearize a Gaussian likelihood at `x`: `(root, matrix, offset)` such that the whitened observation `root @ y` is
    distributed as N(root @ (matrix @ x + offset), I); `None` when the distribution is not Gaussian.
    """
    law = likelihood(x)
    while isinstance(law, dist.Independent):
        law = law.base_dist
    if isinstance(law, dist.MultivariateNormal):
        mean = lambda x: jnp.ravel(_base(likelihood(x)).loc)
        root = jax.scipy.linalg.solve_triangular(law.scale_tril, jnp.eye(law.scale_tril.shape[-1]), lower=True)
    elif isinstance(law, dist.Normal):
        size = int(np.prod(law.batch_shape))
        mean = lambda x: jnp.ravel(jnp.broadcast_to(_base(likelihood(x)).loc, law.batch_shape))
        root = jnp.diag(1.0 / jnp.broadcast_to(jnp.ravel(jnp.broadcast_to(law.scale, law.batch_shape)), (size,)))
    else:
        return None
    matrix = jax.jacfwd(mean)(x)
    return root.astype(x.dtype), matrix.astype(x.dtype), (mean(x) - matrix @ x).astype(x.dtype)


def normal_parts(likelihood: Callable, x: Array) -> tuple[Array, Array, Array]:
    """`gaussian_parts` of a likelihood already known to be normal."""
    parts = gaussian_parts(likelihood, x)
    if parts is None:
        raise ValueError("`likelihood` must be normal at every state; got another law at some.")
    return parts


def _base(law: dist.Distribution) -> Any:
    while isinstance(law, dist.Independent):
        law = law.base_dist
    return law
