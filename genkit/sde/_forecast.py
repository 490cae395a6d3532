"""Posterior paths with credible bands, through the observations and beyond."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from genkit._core._checks import NonFiniteError, check, check_count, check_interval, check_key, is_concrete
from genkit.sde._elbo import prepare_weights
from genkit.sde._grid import make_grid
from genkit.sde._guide import AbstractGuide
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed
from genkit.sde._simulate import check_parts


class Forecast(eqx.Module):
    """Posterior paths, weighted, with their mean and credible band.

    Args:
        ts: the times, shape (n,).
        mean: posterior mean, shape (n, d).
        lower: lower end of the pointwise credible band, shape (n, d).
        upper: upper end, shape (n, d).
        x: the paths, shape (num_paths, n, d).
        log_weight: their normalized log-weights, shape (num_paths,); equal when the guide is exact. `gk.io.plot_paths`
            takes them.
    """

    ts: Any
    mean: Array
    lower: Array
    upper: Array
    x: Array
    log_weight: Array

    @property
    def ess(self) -> Array:
        """Effective number of paths."""
        return 1 / jnp.sum(jnp.exp(2 * self.log_weight))


def forecast(
    sde: FractionalSDE,
    guide: AbstractGuide,
    observed: Observed,
    ts: Float[ArrayLike, " n"],
    *,
    num_paths: int = 512,
    level: float = 0.9,
    max_step: float | None = None,
    steps_per_interval: int | None = None,
    key: Key[Array, ""],
) -> Forecast:
    """Paths given the observations, at any times up to the horizon: smoothing before the last one, forecasting after.

    Paths are drawn from the guide and weighted by likelihood and density ratio, so the result is right for any guide
    and efficient for a good one (look at `.ess`).

    Args:
        sde: the model; its horizon must reach the last time asked for.
        guide: a guide for these observations.
        observed: the observations.
        ts: increasing times, shape (n,), known on the host.
        num_paths: number of paths.
        level: probability inside the band.
        max_step: longest step; `None` steps from time to time.
        steps_per_interval: equal steps in each interval instead.
        key: typed PRNG key.

    Returns:
        The `Forecast`.

    Raises:
        ValueError: for times, steps, counts or levels out of range, a guide made for others, rows that do not fit the
            likelihood.
        NonFiniteError: if a path blows up or the likelihood is undefined, naming step and state, or no path is
            possible.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.brownian(), hurst=0.5, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.3, 0.1]), gs.GaussianNoise(0.1))
        >>> guide = gs.LinearGuide(model, observed)
        >>> ahead = jnp.array([0.2, 0.7])
        >>> gs.forecast(model, guide, observed, ahead, num_paths=4, key=jax.random.key(0)).mean.shape
        (2, 1)
    """
    check_key(key)
    check_parts(sde, guide, observed)
    check_count("num_paths", num_paths, minimum=2)
    check_interval("level", level, 0, 1, open_lo=True, open_hi=True)
    make_grid(sde, ts, max_step, steps_per_interval)  # its errors name `ts`
    check(is_concrete(ts) and is_concrete(observed.ts), "ts", "known on the host", "traced times")
    wanted, seen = np.asarray(ts, np.float64), np.asarray(observed.ts, np.float64)
    order = np.sort(np.concatenate([wanted, seen]))
    slack = 4 * np.finfo(sde.dtype).eps * max(order[-1], 1e-300)
    union = order[np.concatenate([[True], np.diff(order) > slack])]
    grid = make_grid(sde, union, max_step, steps_per_interval)
    rows, data = (np.argmin(np.abs(union[None, :] - t[:, None]), axis=1) for t in (wanted, seen))
    keys = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(num_paths))
    values, paths = prepare_weights(sde, guide, observed, grid, tuple(data.tolist()), keys)
    if is_concrete(values) and bool(jnp.isneginf(values).all()):
        hint = "Every path is impossible under the likelihood: check it, the model, or take more paths."
        raise NonFiniteError(f"`observed` must have a positive density at some path; got none of {num_paths}. {hint}")
    log_weight = jax.nn.log_softmax(values)
    x = paths.x[:, rows]
    weight = jnp.exp(log_weight)[:, None, None]
    tail = (1 - level) / 2
    lower, upper = (weighted_quantile(x, jnp.exp(log_weight), q) for q in (tail, 1 - tail))
    result = Forecast(ts, jnp.sum(weight * x, axis=0), lower, upper, x, log_weight)
    ess = result.ess
    if is_concrete(ess) and float(ess) < 0.05 * num_paths:
        warnings.warn(
            f"The weights leave {float(ess):.1f} effective paths of {num_paths}: the guide misses the posterior. Train "
            "it further, or take more paths or more `num_iterations` of LinearGuide.",
            stacklevel=2,
        )
    return result


def weighted_quantile(x: Float[Array, " n *shape"], weight: Float[Array, " n"], q: float) -> Float[Array, " *shape"]:
    """The `q`-quantile of weighted draws along the first axis: the smallest draw with that much weight at or below."""
    order = jnp.argsort(x, axis=0)
    total = jnp.cumsum(weight[order], axis=0)
    index = jnp.minimum(jnp.sum(total < q * total[-1:], axis=0), x.shape[0] - 1)
    return jnp.take_along_axis(jnp.sort(x, axis=0), index[None], axis=0)[0]
