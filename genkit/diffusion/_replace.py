"""Inpainting by replacement, RePaint's travel in noise, and the spectral sampler DDRM."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Key, PyTree

from genkit._core import AbstractSampler
from genkit._core._checks import check, check_count, check_finite, check_interval
from genkit._core._draws import Draws
from genkit._core._fields import as_number
from genkit._core._guidance import Context, StepTransform
from genkit._core._table import Row, Table

from ._grids import check_grid


class Replacement(StepTransform):
    r"""Inpainting by replacement: after each step the known part of the state is the measurement with fresh noise.

    $$x \leftarrow m \odot (y + \sigma z) + (1 - m) \odot x ,$$

    in an orthonormal basis of the channels where one is given (colorization). At $\sigma = 0$ the known part is `y`
    itself. The rest is drawn as if nothing were known beyond what the network sees: fast and plausible, not the exact
    posterior; `repaint` comes closer, `Measurement` is exact for Gaussian data. Pass it as `guidance`.

    Args:
        mask: 1 where the example is known `(*shape)`; between coordinates of the basis where one is given.
        y: the known values `(*shape)`; ignored where the mask is 0.
        basis: orthogonal matrix over the first axis of an example, one direction in each row; `None` for the
            coordinates themselves. See `colorize`.

    Raises:
        ValueError: for shapes that differ.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> prior = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.eye(2))
        >>> known = gk.diffusion.Replacement(jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0]))
        >>> table = gk.diffusion.ancestral(gk.diffusion.karras(10, 0.01, 10.0))
        >>> gk.sample(table, prior, 3, key=jax.random.key(0), guidance=known).value[:, 0].tolist()
        [2.0, 2.0, 2.0]

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    appendix I.2. The denoised state is replaced by `y` and not by a noisy copy, unlike in the published code.
    """

    mask: Float[Array, " *shape"]
    y: Float[Array, " *shape"]
    basis: Float[Array, " c c"] | None
    at: str = eqx.field(static=True, default="end")

    def __init__(
        self,
        mask: Float[ArrayLike, "..."] | Bool[ArrayLike, "..."],
        y: Float[ArrayLike, "..."],
        basis: Float[ArrayLike, "..."] | None = None,
    ):
        self.y = as_number(y)
        check_finite("y", self.y)
        self.mask = jnp.asarray(mask, self.y.dtype)
        check(self.mask.shape == self.y.shape, "mask", f"of the shape of `y`, {self.y.shape}", f"{self.mask.shape}")
        check_interval("mask", self.mask, 0, 1)
        self.basis = None if basis is None else as_number(basis)
        if self.basis is not None:
            size = self.y.shape[:1] * 2
            check(self.basis.shape == size, "basis", f"of shape {size}", f"shape {self.basis.shape}")

    def init(self, x: Float[Array, " n *shape"]) -> PyTree[Array]:
        """Nothing is carried."""
        check(x.shape[1:] == self.y.shape, "y", f"of the shape of one example, {x.shape[1:]}", f"shape {self.y.shape}")
        return None

    def active(self, ctx: Context) -> bool:
        """At every step."""
        return True

    def __call__(
        self, x: Float[Array, " n *shape"], carry: PyTree, ctx: Context, step: Any
    ) -> tuple[Float[Array, " n *shape"], PyTree]:
        """Replace what is known."""
        noise = jax.vmap(lambda key: jr.normal(key, self.y.shape, x.dtype))(ctx.key)
        turn = lambda v: v if self.basis is None else jnp.einsum("ij,nj...->ni...", self.basis.astype(x.dtype), v)
        back = lambda v: v if self.basis is None else jnp.einsum("ji,nj...->ni...", self.basis.astype(x.dtype), v)
        known = turn(self.y.astype(x.dtype)[None] + ctx.sigma * noise)
        mask = self.mask.astype(x.dtype)
        return back(mask * known + (1 - mask) * turn(x)), carry


def repaint(grid: Float[ArrayLike, " levels"], jump: int = 1, num_resamples: int = 5, sigma_lo: float = 0.0) -> Table:
    r"""RePaint's path through the noise levels: ancestral steps that go back up and down again.

    After each `jump` steps down, noise lifts the state by as many levels, and the stretch is drawn anew,
    `num_resamples` times in all: with `Replacement` as guidance the known and the unknown part get to agree.

    Args:
        grid: descending noise levels `(num_steps + 1,)`.
        jump: levels of one stretch.
        num_resamples: how often each stretch is drawn; 1 is ancestral sampling.
        sigma_lo: below this level no stretch is drawn again.

    Returns:
        A table of order 1 in law.

    Raises:
        ValueError: if the grid does not descend or a count is not positive.

    Example:
        >>> import genkit.diffusion as gkd
        >>> gkd.repaint(gkd.karras(10, 0.01, 80.0), jump=2, num_resamples=3).nfe
        26

    Source: Lugmayr et al., "RePaint: Inpainting Using Denoising Diffusion Probabilistic Models", CVPR 2022,
    algorithm 1.
    """
    levels = check_grid(grid)
    check_count("jump", jump)
    check_count("num_resamples", num_resamples)
    check_interval("sigma_lo", sigma_lo, 0)
    path: list[tuple[float, float, float]] = []  # from, to, noise added at the end
    for start in range(0, len(levels) - 1, jump):
        stretch = levels[start : start + jump + 1]
        # The stretch that ends at zero noise is drawn once: its end is the result.
        again = num_resamples if stretch[-1] > sigma_lo and stretch[-1] > 0 else 1
        for k in range(again):
            path += [(s, t, 0.0) for s, t in itertools.pairwise(stretch)]
            if k + 1 < again:
                path.append((stretch[-1], stretch[0], float(np.sqrt(stretch[0] ** 2 - stretch[-1] ** 2))))
    rows = []
    for i, (s, t, lift) in enumerate(path):
        if lift:
            rows.append(Row(s, s, t, i, evaluate=False, q=0.0, c=lift))
            continue
        fresh = t * np.sqrt(1 - (t / s) ** 2)
        kept = np.sqrt(t**2 - fresh**2) / s
        rows.append(Row(s, s, t, i, a=kept, b={i: 1 - kept}, c=fresh))
    return Table.from_rows(rows, order=1)


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
        matrix, seen = np.asarray(operator, np.float64), np.asarray(y, np.float64).ravel()
        check(matrix.ndim == 2, "operator", "a matrix", f"shape {matrix.shape}")
        check(len(matrix) == seen.size, "y", f"of {len(matrix)} entries, one per row of `operator`", f"{seen.size}")
        check_finite("operator", matrix)
        check_finite("y", seen)
        for name, value, top in (("noise_std", noise_std, np.inf), ("eta", eta, 1), ("eta_b", eta_b, 1)):
            check_interval(name, value, 0, top)
        left, singular, right = np.linalg.svd(matrix, full_matrices=True)
        size = matrix.shape[1]
        strength = np.zeros(size)
        strength[: len(singular)] = singular
        some = strength > 1e-10 * max(strength.max(initial=0), 1e-300)
        target, level = np.zeros(size), np.full(size, np.inf)
        along = (left.T @ seen)[:size]
        known = np.flatnonzero(some)
        target[known], level[known] = along[known] / strength[known], float(noise_std) / strength[known]
        dtype = jnp.result_type(float)
        arrays = (jnp.asarray(part, dtype) for part in (levels, right, target, level))
        self.grid, self.basis, self.target, self.level = arrays
        self.eta, self.eta_b = as_number(eta), as_number(eta_b)

    @property
    def levels(self) -> Float[Array, " levels"]:
        """The noise levels at which the model is asked."""
        return self.grid[:-1]

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
        size = int(np.prod(shape))
        check(size == self.basis.shape[0], "operator", f"over examples of {size} entries", f"{self.basis.shape[0]}")
        first = self.grid[0]

        def one(key: Array, x: Array | None, cond: Any) -> Array:
            if x is None:
                noise = jr.normal(jr.fold_in(key, 0), (size,), self.basis.dtype)
                seen = self.level <= first
                spread = jnp.sqrt(jnp.where(seen, first**2 - jnp.where(seen, self.level, 0) ** 2, first**2))
                state = jnp.where(seen, self.target, 0) + spread * noise
            else:
                state = self.basis @ x.ravel()

            def step(state: Array, row: Any) -> tuple[Array, None]:
                s, t, i = row
                x0 = self.basis @ model((self.basis.T @ state).reshape(shape), s, cond).ravel()
                noise = jr.normal(jr.fold_in(jr.fold_in(key, 1), i), (size,), state.dtype)
                return self._step(state, x0, s, t, noise), None

            rows = (self.grid[:-1], self.grid[1:], jnp.arange(len(self.grid) - 1))
            return (self.basis.T @ jax.lax.scan(step, state, rows)[0]).reshape(shape)

        axes = (0, None if x_init is None else 0, None if cond is None else 0)
        value = jax.vmap(one, in_axes=axes)(keys, x_init, cond)
        count = jnp.full(len(keys), len(self.grid) - 1, jnp.int32)
        return Draws(value, count, count)

    def _step(self, state: Array, x0: Array, s: Array, t: Array, noise: Array) -> Array:
        """One step along every direction."""
        unseen, finer = jnp.isinf(self.level), self.level > t
        level = jnp.where(unseen, 1, self.level)
        kept = jnp.sqrt(1 - self.eta**2) * t
        toward = jnp.where(unseen, (state - x0) / s, (self.target - x0) / jnp.where(level == 0, 1, level))
        inner = x0 + kept * toward + self.eta * t * noise
        spread = jnp.sqrt(jnp.maximum(t**2 - (self.eta_b * level) ** 2, 0))
        outer = (1 - self.eta_b) * x0 + self.eta_b * self.target + spread * noise
        return jnp.where(unseen | finer, inner, outer)
