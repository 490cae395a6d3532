"""Inpainting by replacement, and RePaint's travel in noise."""

import itertools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from genkit._core._checks import check, check_count, check_finite, check_interval
from genkit._core._fields import as_number, maybe_number
from genkit.diffusion._samplers._ddim import ddim_row
from genkit.diffusion._schedules._grids import check_grid
from genkit.sampling import Context, Row, StepTransform, Table


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
            coordinates themselves. See `Replacement.of_gray`.

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
        self.basis = maybe_number(basis)
        if self.basis is not None:
            size = self.y.shape[:1] * 2
            check(self.basis.shape == size, "basis", f"of shape {size}", f"shape {self.basis.shape}")

    @classmethod
    def of_gray(cls, image: Float[ArrayLike, "..."]) -> "Replacement":
        """Keep the gray of an image and draw its color.

        Args:
            image: the image `(channels, height, width)`; only its mean over the channels counts.

        Returns:
            The replacement, in a basis of the channels whose first direction is gray.

        Raises:
            ValueError: for a shape that is no image.

        Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
        appendix I.3.
        """
        image = as_number(image)
        check(image.ndim == 3, "image", "of shape (channels, height, width)", f"shape {image.shape}")
        basis = gray_basis(image.shape[0])
        mask = jnp.zeros(image.shape).at[0].set(1)
        return cls(mask, image, basis)

    def init(self, x: Float[Array, " n *shape"]) -> PyTree[Array]:
        check(x.shape[1:] == self.y.shape, "y", f"of the shape of one example, {x.shape[1:]}", f"shape {self.y.shape}")
        return None

    def active(self, ctx: Context) -> bool:
        del ctx
        return True

    def __call__(
        self, x: Float[Array, " n *shape"], carry: PyTree, ctx: Context, step: Callable
    ) -> tuple[Float[Array, " n *shape"], PyTree]:
        del step
        noise = jax.vmap(lambda key: jr.normal(key, self.y.shape, x.dtype))(ctx.key)
        # Fresh noise at the level of the state, so that known and unknown parts are equally noisy.
        known = self._to_basis(self.y.astype(x.dtype)[None] + ctx.sigma * noise)
        mask = self.mask.astype(x.dtype)
        return self._from_basis(mask * known + (1 - mask) * self._to_basis(x)), carry

    def _to_basis(self, x: Float[Array, " n *shape"]) -> Float[Array, " n *shape"]:
        """Coordinates of examples in the basis of the channels."""
        if self.basis is None:
            return x
        return jnp.einsum("ij,nj...->ni...", self.basis.astype(x.dtype), x)

    def _from_basis(self, x: Float[Array, " n *shape"]) -> Float[Array, " n *shape"]:
        """Examples from their coordinates in the basis."""
        if self.basis is None:
            return x
        return jnp.einsum("ji,nj...->ni...", self.basis.astype(x.dtype), x)


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
        A table of order 1 in distribution.

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
        again = 1
        if stretch[-1] > sigma_lo and stretch[-1] > 0:
            again = num_resamples
        for k in range(again):
            path += [(s, t, 0.0) for s, t in itertools.pairwise(stretch)]
            if k + 1 < again:
                path.append((stretch[-1], stretch[0], float(np.sqrt(stretch[0] ** 2 - stretch[-1] ** 2))))
    rows = []
    for i, (s, t, lift) in enumerate(path):
        if lift:
            # A row that only lifts the state to the first level of the stretch.
            rows.append(Row(s, s, t, i, evaluate=False, q=0.0, c=lift))
        else:
            rows.append(ddim_row(s, t, i, eta=1.0))
    return Table.from_rows(rows, order=1)


def gray_basis(channels: int) -> Float[np.ndarray, "c c"]:
    r"""An orthonormal basis of the channels, one direction in each row, the first $(1, 1, 1)/\sqrt 3$."""
    start = np.eye(channels)
    start[:, 0] = 1
    basis = np.linalg.qr(start)[0].T
    # The factorization leaves signs open: each direction points to the side of the first channel.
    return basis * np.where(basis[:, :1] < 0, -1, 1)
