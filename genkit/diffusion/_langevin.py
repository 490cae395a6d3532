"""Predictor-corrector sampling with Langevin steps, and noise from one Brownian path per draw."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Key

from genkit._core import AbstractSampler
from genkit._core._checks import check, check_choice, check_count, check_positive, is_concrete
from genkit._core._draws import Draws
from genkit._core._fields import as_number
from genkit._core._sampler import start
from genkit._core._table import Table

from ._grids import check_grid


_NORMS = ("sample", "batch")


class PredictorCorrector(AbstractSampler):
    """Reverse-diffusion steps, each followed by Langevin steps at the level it reached; see `predictor_corrector`.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        snr: ratio of the Langevin step's signal to its noise, positive.
        num_corrections: Langevin steps after each predictor step.
        norm: `"sample"` or `"batch"`.
        to_zero: whether the grid ends at zero noise.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.predictor_corrector(gk.diffusion.karras(10, 0.01, 50.0)).to_zero
        True
    """

    grid: Float[Array, " levels"]
    snr: Float[Array, ""]
    num_corrections: int = eqx.field(static=True)
    norm: str = eqx.field(static=True)
    to_zero: bool = eqx.field(static=True)

    def __init__(
        self, grid: Float[ArrayLike, " levels"], snr: Any = 0.16, num_corrections: int = 1, norm: str = "sample"
    ):
        levels = check_grid(grid)
        self.grid, self.to_zero = jnp.asarray(levels, jnp.result_type(float)), bool(levels[-1] == 0)
        check_positive("snr", snr)
        check_count("num_corrections", num_corrections, 0)
        check_choice("norm", norm, _NORMS)
        self.snr, self.num_corrections, self.norm = as_number(snr), num_corrections, norm

    @property
    def levels(self) -> Float[Array, " levels"]:
        """The noise levels at which the model is asked, and zero where the grid ends there."""
        return self.grid

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one example per key; see `AbstractSampler.draw`."""
        x_init, loop_keys = start(keys, self.grid[0], x_init, shape)
        grid = self.grid.astype(x_init.dtype)
        axes = (0, None, None if cond is None else 0)
        predict = lambda x, sigma: jax.vmap(model, in_axes=axes)(x, sigma, cond)
        normals = lambda i, k: jax.vmap(lambda key: _normal(key, i, k, shape, x_init.dtype))(loop_keys)

        def step(x: Array, row: Any) -> tuple[Array, None]:
            i, s, t = row
            moved = x + (1 - (t / s) ** 2) * (predict(x, s) - x) + jnp.sqrt(s**2 - t**2) * normals(i, 0)
            correct = lambda k, x: self._correct(x, t, predict, normals(i, k + 1))
            return jax.lax.fori_loop(0, self.num_corrections, correct, moved), None

        # A last step to zero noise is the prediction itself: noise would only be seen, and there is no score.
        steps = len(self.grid) - 1 - self.to_zero
        rows = (jnp.arange(steps), grid[:steps], grid[1 : steps + 1])
        x, _ = jax.lax.scan(step, x_init, rows)
        if self.to_zero:
            x = predict(x, grid[-2])
        count = jnp.full(len(keys), steps * (1 + self.num_corrections) + self.to_zero, jnp.int32)
        return Draws(x, count, count)

    def _correct(self, x: Array, sigma: Array, predict: Callable, noise: Array) -> Array:
        """One Langevin step whose size follows from the norms of score and noise."""
        score = (predict(x, sigma) - x) / sigma**2
        size = lambda v: jnp.sqrt(jnp.sum(v**2, axis=tuple(range(1, v.ndim)), keepdims=True))
        ratio = size(noise) / jnp.maximum(size(score), jnp.finfo(x.dtype).tiny)
        if self.norm == "batch":
            ratio = jnp.mean(size(noise)) / jnp.mean(size(score))
        step = 2 * (self.snr.astype(x.dtype) * ratio) ** 2
        return x + step * score + jnp.sqrt(2 * step) * noise


def predictor_corrector(
    grid: Float[ArrayLike, " levels"],
    snr: Float[ArrayLike, ""] | float = 0.16,
    num_corrections: int = 1,
    norm: str = "sample",
) -> PredictorCorrector:
    r"""Predictor-corrector sampling: reverse-diffusion steps, corrected by Langevin steps at each level.

    The corrector is $x \leftarrow x + \epsilon s + \sqrt{2\epsilon} z$ with $\epsilon = 2 (snr\, |z| / |s|)^2$.
    The norms are those of each draw by itself, so that draws do not depend on each other; `norm="batch"` takes the mean
    over the batch, as published. After a last step to zero noise nothing is corrected.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        snr: ratio of signal to noise, positive: 0.16 in the paper.
        num_corrections: Langevin steps after each predictor step; 0 leaves the predictor alone.
        norm: `"sample"`, or `"batch"` for comparison.

    Returns:
        A sampler with `1 + num_corrections` evaluations per step, 1 in the last.

    Raises:
        ValueError: if the grid does not descend, or a number is out of range.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jax.numpy.zeros(2), jax.numpy.eye(2))
        >>> sampler = gk.diffusion.predictor_corrector(gk.diffusion.karras(10, 0.01, 50.0), 0.16, 1)
        >>> int(gk.sample(sampler, denoiser, 3, key=jax.random.key(0)).nfe[0])
        19

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    algorithms 2 and 4.
    """
    return PredictorCorrector(grid, snr, num_corrections, norm)


class BrownianNoise(eqx.Module):
    r"""Noise from one Brownian path per draw: more steps refine a draw, not replace it. Pass it as `Sampler(noise=)`.

    The noise of a row from $\sigma_s$ to $\sigma_t$ is the normalized increment of the path over
    $[\log\sigma_t, \log\sigma_s]$, so it has the law that the table expects, and tables on different grids over the
    same range see the same path. Draws then converge, draw by draw, as steps get smaller. It suits stochastic tables
    that only go down in noise (`ancestral`, `sa`, stochastic `dpmpp`, ...).

    Args:
        sigma_min: smallest noise level that the path resolves; the same for tables that are compared.
        sigma_max: largest; the same for tables that are compared.
        tolerance: resolution of the path as a fraction of its length, in (0, 1).

    Raises:
        ValueError: for levels out of order; with a table that adds noise while the level rises or stays.

    Example:
        >>> import genkit as gk
        >>> noise = gk.diffusion.BrownianNoise(0.01, 50.0)
        >>> sampler = gk.Sampler(gk.diffusion.ancestral(gk.diffusion.karras(10, 0.01, 50.0)), noise=noise)

    Source: Li et al., "Scalable Gradients for Stochastic Differential Equations", AISTATS 2020 (virtual Brownian tree).
    """

    sigma_min: Float[Array, ""]
    sigma_max: Float[Array, ""]
    tolerance: float = eqx.field(static=True)

    def __init__(self, sigma_min: Any, sigma_max: Any, tolerance: float = 1e-6):
        check_positive("sigma_min", sigma_min)
        check(0 < tolerance < 1, "tolerance", "in (0, 1)", tolerance)
        self.sigma_min, self.sigma_max = as_number(sigma_min), as_number(sigma_max)
        check(bool(self.sigma_min < self.sigma_max), "sigma_min", "smaller than `sigma_max`", self.sigma_min)
        self.tolerance = float(tolerance)

    def check_table(self, table: Table) -> None:
        """Refuse a table that adds noise while the level rises or stays."""
        if not is_concrete(table.sigma):
            return
        noisy = (np.asarray(table.c) > 0) | (np.asarray(table.c_stage) > 0)
        end = np.asarray(table.sigma_next)
        # Noise that lifts the state shows in the level of the next row, above the end of the step.
        falls = np.append(np.asarray(table.sigma)[1:], end[-1]) <= end * (1 + 1e-6)
        good, hint = bool(falls[noisy].all()), "Take `ancestral`, `sa` or a stochastic `dpmpp`."
        check(
            good, "table", "one whose noise level falls where it adds noise", "one that rises (churn, restarts)", hint
        )

    def __call__(self, keys: Key[Array, " n"], row: Any, stream: int, x: Array) -> Array:
        """The noise of one row.

        Args:
            keys: one key per draw, the same in every row.
            row: where the draws stand: `sigma_start` and `sigma_next`.
            stream: which of the row's two noises.
            x: states `(n, *shape)`; only shape and dtype count.

        Returns:
            Standard normals `(n, *shape)`.
        """
        import diffrax

        low, high = jnp.log(self.sigma_min.astype(x.dtype)), jnp.log(self.sigma_max.astype(x.dtype))
        # Time of the path: 0 at the largest level, 1 at the smallest.
        clock = lambda sigma: jnp.clip((high - jnp.log(jnp.maximum(sigma, self.sigma_min))) / (high - low), 0, 1)
        first, last = clock(row.sigma_start), clock(row.sigma_next)

        def one(key: Array) -> Array:
            space = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            path = diffrax.VirtualBrownianTree(0.0, 1.0, self.tolerance, space, jr.fold_in(key, stream))
            increment: Any = path.evaluate(first, last)
            return increment / jnp.sqrt(jnp.where(last > first, last - first, 1))

        return jax.vmap(one)(keys)


def _normal(key: Array, row: Array, stream: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Standard normals of one draw, for one row and one of its uses."""
    return jr.normal(jr.fold_in(jr.fold_in(key, row), stream), shape, dtype)
