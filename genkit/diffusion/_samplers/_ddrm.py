"""The spectral sampler DDRM."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core._checks import check, check_finite, check_interval
from genkit._core._fields import as_number
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import AbstractSampler, Draws


class DDRM(AbstractSampler):
    r"""Denoising diffusion restoration: a linear inverse problem solved in the basis of its singular vectors.

    With $A = U S V^\top$, $\bar y_i = (U^\top y)_i / s_i$ and $\sigma_i = \text{noise\_std}/s_i$, a step to the level
    $\sigma_t$ draws along the $i$-th right singular vector from

    | where | mean | standard deviation |
    |---|---|---|
    | $s_i = 0$ | $D_i + \sqrt{1 - \eta^2}\, \sigma_t\, (x_i - D_i)/\sigma_s$ | $\eta\sigma_t$ |
    | $\sigma_t < \sigma_i$ | $D_i + \sqrt{1 - \eta^2}\, \sigma_t\, (\bar y_i - D_i)/\sigma_i$ | $\eta\sigma_t$ |
    | $\sigma_t \ge \sigma_i$ | $(1 - \eta_b) D_i + \eta_b \bar y_i$ | $\sqrt{\sigma_t^2 - \eta_b^2\sigma_i^2}$ |

    What is not measured is drawn too narrow where $\eta$ is near one, because noise is renewed faster than the denoiser
    can follow; $\eta = 0$ follows the probability flow.

    Args:
        grid: descending noise levels `(num_steps + 1,)`; the last step returns the prediction where it goes to zero.
        operator: matrix $A$ `(m, d)` over the flattened example, concrete.
        y: measurement `(m,)`, or any shape of `m` entries.
        noise_std: standard deviation of its noise, non-negative.
        eta: stochasticity $\eta$ of what is not measured, in [0, 1].
        eta_b: how much of what is measured is taken, $\eta_b$ in [0, 1].

    Raises:
        ValueError: for shapes that do not fit or numbers out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> prior = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.eye(2))
        >>> sampler = gk.diffusion.DDRM(gk.diffusion.karras(20, 0.01, 10.0), jnp.array([[1.0, 0.0]]), jnp.array([2.0]), 0.0)
        >>> gk.sample(sampler, prior, 4, key=jax.random.key(0)).value[:, 0].round(3).tolist()
        [2.0, 2.0, 2.0, 2.0]

    Source: Kawar et al., "Denoising Diffusion Restoration Models", NeurIPS 2022, equations 7 and 8.
    """  # noqa: E501

    grid: Float[Array, " levels"]
    basis: Float[Array, " d d"]
    target: Float[Array, " d"]
    level: Float[Array, " d"]  # noise of the measurement along each direction; infinite where there is none
    eta: Float[Array, ""]
    eta_b: Float[Array, ""]

    def __init__(
        self,
        grid: Float[ArrayLike, " levels"],
        operator: Float[ArrayLike, " m d"],
        y: Float[ArrayLike, "..."],
        noise_std: float,
        eta: Float[ArrayLike, ""] | float = 0.85,
        eta_b: Float[ArrayLike, ""] | float = 1.0,
    ):
        levels = check_grid(grid)
        matrix = np.asarray(operator, np.float64)
        seen = np.asarray(y, np.float64).ravel()
        check(matrix.ndim == 2, "operator", "a matrix", f"shape {matrix.shape}")
        check(len(matrix) == seen.size, "y", f"of {len(matrix)} entries, one per row of `operator`", f"{seen.size}")
        check_finite("operator", matrix)
        check_finite("y", seen)
        check_interval("noise_std", noise_std, 0)
        check_interval("eta", eta, 0, 1)
        check_interval("eta_b", eta_b, 0, 1)
        # Decomposed on the host in float64, once.
        left, singular, right = np.linalg.svd(matrix, full_matrices=True)
        size = matrix.shape[1]
        strength = np.zeros(size)
        strength[: len(singular)] = singular
        # Directions that rounding alone measures count as not measured.
        known = np.flatnonzero(strength > 1e-10 * max(strength.max(initial=0), 1e-300))
        along = (left.T @ seen)[:size]
        target = np.zeros(size)
        target[known] = along[known] / strength[known]
        level = np.full(size, np.inf)
        level[known] = float(noise_std) / strength[known]
        dtype = jnp.result_type(float)
        self.grid = jnp.asarray(levels, dtype)
        self.basis = jnp.asarray(right, dtype)
        self.target = jnp.asarray(target, dtype)
        self.level = jnp.asarray(level, dtype)
        self.eta = as_number(eta)
        self.eta_b = as_number(eta_b)

    @property
    def levels(self) -> Float[Array, " levels"]:
        """Noise levels at which the model is asked."""
        return self.grid[:-1]

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        size = int(np.prod(shape))
        check(size == self.basis.shape[0], "operator", f"over examples of {size} entries", f"{self.basis.shape[0]}")
        if x_init is None:
            state = jax.vmap(self._first_state)(keys)
        else:
            state = x_init.reshape(len(keys), size) @ self.basis.T
        rows = (self.grid[:-1], self.grid[1:], jnp.arange(len(self.grid) - 1))

        def one(key: Array, state: Array, cond: PyTree) -> Array:
            def step(state: Array, row: tuple[Array, Array, Array]) -> tuple[Array, None]:
                s, t, i = row
                x0 = self.basis @ model((self.basis.T @ state).reshape(shape), s, cond).ravel()
                noise = jr.normal(jr.fold_in(jr.fold_in(key, 1), i), (size,), state.dtype)
                return self._step(state, x0, s, t, noise), None

            return (self.basis.T @ jax.lax.scan(step, state, rows)[0]).reshape(shape)

        value = jax.vmap(one, in_axes=(0, 0, None if cond is None else 0))(keys, state, cond)
        count = jnp.full(len(keys), len(self.grid) - 1, jnp.int32)
        return Draws(value, count, count)

    def _first_state(self, key: Key[Array, ""]) -> Float[Array, " d"]:
        """A state at the first level, along the singular vectors; what is measured begins at the measurement."""
        first = self.grid[0]
        noise = jr.normal(jr.fold_in(key, 0), (len(self.level),), self.basis.dtype)
        seen = self.level <= first
        deviation = jnp.sqrt(jnp.where(seen, first**2 - jnp.where(seen, self.level, 0) ** 2, first**2))
        return jnp.where(seen, self.target, 0) + deviation * noise

    def _step(self, state: Array, x0: Array, s: Array, t: Array, noise: Array) -> Array:
        """One step along every direction, by the table of the class."""
        unseen = jnp.isinf(self.level)
        finer = self.level > t
        # Quotients by levels that are infinite or zero are replaced below; they must stay finite for the gradient.
        level = jnp.where(unseen, 1, self.level)
        kept = jnp.sqrt(1 - self.eta**2) * t
        toward = jnp.where(unseen, (state - x0) / s, (self.target - x0) / jnp.where(level == 0, 1, level))
        inner = x0 + kept * toward + self.eta * t * noise
        deviation = jnp.sqrt(jnp.maximum(t**2 - (self.eta_b * level) ** 2, 0))
        outer = (1 - self.eta_b) * x0 + self.eta_b * self.target + deviation * noise
        return jnp.where(unseen | finer, inner, outer)
