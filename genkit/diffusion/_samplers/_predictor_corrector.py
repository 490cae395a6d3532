"""Predictor-corrector sampling with Langevin steps."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core._checks import check_choice, check_count, check_positive
from genkit._core._fields import as_number
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import AbstractSampler, Draws, start


_NORMS = ("sample", "batch")


class PredictorCorrectorSampler(AbstractSampler):
    """Reverse-diffusion steps, each followed by Langevin steps at the level it reached; see `predictor_corrector`."""

    grid: Float[Array, " levels"]
    snr: Float[Array, ""]
    num_corrections: int = eqx.field(static=True)
    norm: str = eqx.field(static=True)
    to_zero: bool = eqx.field(static=True)

    def __init__(
        self, grid: Float[ArrayLike, " levels"], snr: Float[ArrayLike, ""] | float, num_corrections: int, norm: str
    ):
        levels = check_grid(grid)
        check_positive("snr", snr)
        check_count("num_corrections", num_corrections, 0)
        check_choice("norm", norm, _NORMS)
        self.grid = jnp.asarray(levels, jnp.result_type(float))
        self.snr = as_number(snr)
        self.num_corrections = num_corrections
        self.norm = norm
        self.to_zero = bool(levels[-1] == 0)

    @property
    def levels(self) -> Float[Array, " levels"]:
        return self.grid

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        x_init, loop_keys = start(keys, self.grid[0], x_init, shape)
        grid = self.grid.astype(x_init.dtype)
        batched = jax.vmap(model, in_axes=(0, None, None if cond is None else 0))

        def predict(x: Array, sigma: Array) -> Array:
            return batched(x, sigma, cond)

        def normals(row: Array, stream: Array | int) -> Array:
            def one(key: Array) -> Array:
                return jr.normal(jr.fold_in(jr.fold_in(key, row), stream), shape, x_init.dtype)

            return jax.vmap(one)(loop_keys)

        def step(x: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
            i, s, t = row
            moved = x + (1 - (t / s) ** 2) * (predict(x, s) - x) + jnp.sqrt(s**2 - t**2) * normals(i, 0)

            def correct(k: Array, x: Array) -> Array:
                return self._correct(x, t, predict, normals(i, k + 1))

            return jax.lax.fori_loop(0, self.num_corrections, correct, moved), None

        # A last step to zero noise is the prediction itself: noise would only be seen, and there is no score.
        steps = len(self.grid) - 1 - self.to_zero
        rows = (jnp.arange(steps), grid[:steps], grid[1 : steps + 1])
        x, _ = jax.lax.scan(step, x_init, rows)
        if self.to_zero:
            x = predict(x, grid[-2])
        count = jnp.full(len(keys), steps * (1 + self.num_corrections) + self.to_zero, jnp.int32)
        return Draws(x, count, count)

    def _correct(self, x: Array, sigma: Array, predict: Callable[[Array, Array], Array], noise: Array) -> Array:
        """One Langevin step whose size follows from the norms of score and noise."""
        score = (predict(x, sigma) - x) / sigma**2
        score_size = _norms(score)
        if self.norm == "batch":
            ratio = jnp.mean(_norms(noise)) / jnp.mean(score_size)
        else:
            # A score of zero, as in the middle of symmetric data, asks for no correction of infinite size.
            ratio = _norms(noise) / jnp.maximum(score_size, jnp.finfo(x.dtype).tiny)
        step = 2 * (self.snr.astype(x.dtype) * ratio) ** 2
        return x + step * score + jnp.sqrt(2 * step) * noise


def predictor_corrector(
    grid: Float[ArrayLike, " levels"],
    snr: Float[ArrayLike, ""] | float = 0.16,
    num_corrections: int = 1,
    norm: str = "sample",
) -> PredictorCorrectorSampler:
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
    return PredictorCorrectorSampler(grid, snr, num_corrections, norm)


def _norms(v: Float[Array, " n *shape"]) -> Float[Array, " n *ones"]:
    """Euclidean norm of each draw, with its axes kept."""
    return jnp.sqrt(jnp.sum(v**2, axis=tuple(range(1, v.ndim)), keepdims=True))
