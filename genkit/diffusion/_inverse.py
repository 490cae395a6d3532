"""Denoisers conditioned on a linear measurement."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact

from genkit._core import Denoiser
from genkit._core._checks import check, check_choice, check_count, check_finite, check_interval, describe
from genkit._core._fields import as_number


METHODS = ("mmps", "tmpd", "pigdm", "dps", "ddnm", "diffpir")

# Up to so many measurements a linear system is solved exactly, by forming its matrix.
_EXACT = 64

# Iterations of conjugate gradients beyond that.
_ITERATIONS = 8


class Measurement(Denoiser):
    r"""A denoiser given a linear measurement $y = A x_0 + \text{noise\_std}\; e$: a denoiser again, for any sampler.

    The posterior mean given $x$ and $y$ is $D + \sigma^2 \nabla_x \log p(y \mid x)$. The methods differ in how they
    approximate the law of $y$ given $x$, with $J = \partial D / \partial x$ and $r = y - A D$:

    | method | $D' - D$ |
    |---|---|
    | `mmps` | $\sigma^2 J A^\top (\sigma^2 A J A^\top + s^2)^{-1} r$: the covariance of $x_0$ given $x$ is $\sigma^2 J$; exact for Gaussian data |
    | `tmpd` | the same, with the matrix $\sigma^2 A J A^\top$ replaced by the diagonal of its row sums |
    | `pigdm` | $\sigma^2 J A^\top (\rho^2 A A^\top + s^2)^{-1} r$, $\rho^2 = \sigma^2 \sigma_d^2 / (\sigma^2 + \sigma_d^2)$; exact for white data |
    | `dps` | $-\text{scale}\; \sigma\, \nabla_x \lvert r \rvert$ |
    | `ddnm` | $A^\top (A A^\top + (s/\sigma)^2)^{-1} r$: without noise what is measured is put in place exactly |
    | `diffpir` | $\rho^2 A^\top (\rho^2 A A^\top + s^2)^{-1} r$, $\rho = \sigma\,\text{scale}$: the proximal step |

    The first three are differentiated; the last two only evaluate the denoiser, once.

    Args:
        denoiser: denoiser of the data, for one example.
        operator: the linear map $A$: a function of one example, or a matrix over the flattened example.
        y: the measurement; without noise where `noise_std` is 0.
        noise_std: standard deviation $s$ of its noise, non-negative: a number, or one for each entry of `y`.
        method: one of the names above.
        num_iterations: iterations of conjugate gradients for the linear system; `None` solves exactly when `y.size` is
            at most 64, else takes 8.
        scale: strength for `dps` and `diffpir`, positive.
        sigma_data: standard deviation of the data, for `pigdm`; by default the denoiser's own, or 1.

    Raises:
        ValueError: for an unknown method, an operator that does not map an example to the shape of `y`, or a negative
            noise.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> prior = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> given = gk.diffusion.Measurement(prior, jnp.array([[1.0, 0.0]]), jnp.array([3.0]), 0.0)
        >>> [round(float(v), 3) for v in given(jnp.zeros(2), jnp.array(1e3))]
        [3.0, 1.5]

    Source: Rozet et al., "Learning Diffusion Priors from Observations by Expectation Maximization", NeurIPS 2024
    (`mmps`); Boys et al., "Tweedie Moment Projected Diffusions for Inverse Problems", TMLR 2024 (`tmpd`); Song et al.,
    "Pseudoinverse-Guided Diffusion Models for Inverse Problems", ICLR 2023 (`pigdm`); Chung et al., "Diffusion
    Posterior Sampling for General Noisy Inverse Problems", ICLR 2023 (`dps`); Wang et al., "Zero-Shot Image Restoration
    Using Denoising Diffusion Null-Space Model", ICLR 2023 (`ddnm`); Zhu et al., "Denoising Diffusion Models for
    Plug-and-Play Image Restoration", CVPRW 2023 (`diffpir`).
    """  # noqa: E501

    denoiser: Callable
    operator: Any
    y: Float[Array, "..."]
    noise_std: Float[Array, "..."]
    method: str = eqx.field(static=True)
    num_iterations: int | None = eqx.field(static=True)
    scale: Float[Array, ""]
    sigma_data: Float[Array, ""]

    def __init__(
        self,
        denoiser: Callable,
        operator: Any,
        y: Float[ArrayLike, "..."],
        noise_std: Float[ArrayLike, "..."] | float,
        method: str = "mmps",
        *,
        num_iterations: int | None = None,
        scale: Float[ArrayLike, ""] | float = 1.0,
        sigma_data: Float[ArrayLike, ""] | float | None = None,
    ):
        check(callable(denoiser), "denoiser", "a callable (x, sigma, cond=None) -> x0", describe(denoiser))
        check_choice("method", method, METHODS)
        check(callable(operator) or hasattr(operator, "shape"), "operator", "a function or a matrix", operator)
        self.denoiser, self.operator, self.method = denoiser, operator, method
        if not callable(operator):
            self.operator = as_number(operator)
            check(self.operator.ndim == 2, "operator", "a matrix (or a function)", f"shape {self.operator.shape}")
            check_finite("operator", self.operator)
        self.y, self.noise_std = as_number(y), as_number(noise_std)
        check_finite("y", self.y)
        fits = self.noise_std.shape in ((), self.y.shape)
        check(fits, "noise_std", f"a number or of shape {self.y.shape}, as `y`", f"shape {self.noise_std.shape}")
        check_interval("noise_std", self.noise_std, 0)
        if num_iterations is not None:
            check_count("num_iterations", num_iterations)
        self.num_iterations = num_iterations
        self.scale = as_number(scale)
        check_interval("scale", self.scale, 0, open_lo=True)
        self.sigma_data = as_number(getattr(denoiser, "sigma_data", 1.0) if sigma_data is None else sigma_data)
        check_interval("sigma_data", self.sigma_data, 0, open_lo=True)
        shape = getattr(denoiser, "shape", None)
        if shape is not None:
            self._check_shapes(jax.ShapeDtypeStruct(tuple(shape), self.y.dtype))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the denoiser tells it."""
        return getattr(self.denoiser, "shape", None)

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the denoiser has them."""
        return getattr(self.denoiser, "num_labels", None)

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """Least and largest noise level that the denoiser knows, where it has limits."""
        return getattr(self.denoiser, "noise_range", None)

    @property
    def no_likelihood(self) -> str:
        """Why the probability flow of this denoiser has no meaning as a likelihood."""
        return (
            "the measurement enters by an approximation at each noise level, so that its flow is that of no posterior. "
            "Weigh the prior's log_prob by the likelihood of the measurement instead."
        )

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: Any = None
    ) -> Inexact[Array, " *shape"]:
        """Estimate the clean example from the noisy one and the measurement; see `Denoiser`."""
        x = as_number(x)
        self._check_shapes(x)
        level = jnp.asarray(sigma, x.dtype)
        # At sigma = 0 nothing is left to learn from the measurement, and several quotients are 0 / 0.
        clean = level == 0
        safe = jnp.where(clean, 1, level)
        predict = lambda x: self.denoiser(x, safe, cond)
        return jnp.where(clean, x, getattr(self, f"_{self.method}")(predict, x, safe))

    def _mmps(self, predict: Callable, x: Array, sigma: Array) -> Array:
        x0, pull = jax.vjp(predict, x)
        spread = lambda v: sigma**2 * pull(v)[0]
        u = self._solve(lambda v: self._apply(spread(self._transpose(v, x))), self._residual(x0))
        return x0 + spread(self._transpose(u, x))

    def _tmpd(self, predict: Callable, x: Array, sigma: Array) -> Array:
        x0, pull = jax.vjp(predict, x)
        rows = sigma**2 * self._apply(pull(self._transpose(jnp.ones_like(self.y), x))[0])
        u = self._residual(x0) / _positive(jnp.maximum(rows, 0) + self.noise_std**2)
        return x0 + sigma**2 * pull(self._transpose(u, x))[0]

    def _pigdm(self, predict: Callable, x: Array, sigma: Array) -> Array:
        x0, pull = jax.vjp(predict, x)
        square = self.sigma_data.astype(x.dtype) ** 2
        spread = sigma**2 * square / (sigma**2 + square)
        u = self._solve(lambda v: spread * self._apply(self._transpose(v, x)), self._residual(x0))
        return x0 + sigma**2 * pull(self._transpose(u, x))[0]

    def _dps(self, predict: Callable, x: Array, sigma: Array) -> Array:
        x0, pull = jax.vjp(predict, x)
        residual = self._residual(x0)
        size = jnp.sqrt(jnp.sum(residual**2))
        toward = pull(self._transpose(residual / jnp.where(size == 0, 1, size), x))[0]
        return x0 + self.scale.astype(x.dtype) * sigma * toward

    def _ddnm(self, predict: Callable, x: Array, sigma: Array) -> Array:
        x0 = predict(x)
        u = self._solve(lambda v: sigma**2 * self._apply(self._transpose(v, x)), self._residual(x0))
        return x0 + sigma**2 * self._transpose(u, x)

    def _diffpir(self, predict: Callable, x: Array, sigma: Array) -> Array:
        x0 = predict(x)
        spread = (sigma * self.scale.astype(x.dtype)) ** 2
        u = self._solve(lambda v: spread * self._apply(self._transpose(v, x)), self._residual(x0))
        return x0 + spread * self._transpose(u, x)

    def _apply(self, x: Array) -> Array:
        """The operator."""
        if callable(self.operator):
            return jnp.asarray(self.operator(x))
        return (self.operator.astype(x.dtype) @ x.ravel()).reshape(self.y.shape)

    def _transpose(self, v: Array, x: Array) -> Array:
        """Its transpose."""
        (back,) = jax.linear_transpose(self._apply, jax.ShapeDtypeStruct(x.shape, x.dtype))(v.astype(x.dtype))
        return back

    def _residual(self, x0: Array) -> Array:
        return self.y.astype(x0.dtype) - self._apply(x0)

    def _solve(self, product: Callable, b: Array) -> Array:
        """Solve `(product + noise_std^2) u = b`, exactly or by conjugate gradients."""
        whole = lambda v: product(v) + self.noise_std.astype(v.dtype) ** 2 * v
        if self.num_iterations is None and b.size <= _EXACT:
            units = jnp.eye(b.size, dtype=b.dtype).reshape(b.size, *b.shape)
            matrix = jax.vmap(whole)(units).reshape(b.size, b.size)
            # Symmetric up to the network's own asymmetry; the smallest of ridges keeps repeated rows solvable.
            ridge = b.size * jnp.finfo(b.dtype).eps * jnp.trace(matrix) / b.size
            matrix = 0.5 * (matrix + matrix.T) + ridge * jnp.eye(b.size, dtype=b.dtype)
            return jnp.linalg.solve(matrix, b.ravel()).reshape(b.shape)
        return _conjugate_gradients(whole, b, self.num_iterations or _ITERATIONS)

    def _check_shapes(self, x: Any) -> None:
        """Refuse an operator that does not map an example to the shape of `y`."""
        if not callable(self.operator):
            expected = (self.y.size, int(np.prod(x.shape)))
            got = tuple(self.operator.shape)
            check(got == expected, "operator", f"a matrix {expected}, from one example to `y`", f"shape {got}")
            return
        try:
            made = jax.eval_shape(self.operator, x)
        except TypeError as error:
            raise ValueError(f"`operator` must apply to one example of shape {x.shape}; it raised: {error}") from error
        check(
            hasattr(made, "shape") and made.shape == self.y.shape,
            "operator",
            f"a map from one example to the shape of `y`, {self.y.shape}",
            f"shape {getattr(made, 'shape', made)}",
        )


def _conjugate_gradients(product: Callable, b: Array, iterations: int) -> Array:
    """A fixed number of iterations of conjugate gradients from zero; it stops by itself at the solution."""
    import lineax as lx

    operator = lx.FunctionLinearOperator(
        product, jax.ShapeDtypeStruct(b.shape, b.dtype), tags=lx.positive_semidefinite_tag
    )
    solver = lx.CG(rtol=1e-6, atol=0.0, max_steps=iterations, stabilise_every=None)
    return lx.linear_solve(operator, b, solver, throw=False).value


def _positive(value: Array) -> Array:
    """A value kept from zero."""
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny ** 0.5)


def colorize(shape: tuple[int, ...]) -> Float[np.ndarray, " c c"]:
    r"""An orthonormal basis of color whose first direction is gray, $(1, 1, 1)/\sqrt 3$.

    Replacing the first coordinate of an image in this basis, and leaving the others free, colors a gray image.

    Args:
        shape: shape `(channels, height, width)` of an image.

    Returns:
        An orthogonal matrix `(channels, channels)` with one direction in each row.

    Raises:
        ValueError: for a shape that is no image.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.colorize((3, 8, 8))[0].round(3).tolist()
        [0.577, 0.577, 0.577]

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    appendix I.3.
    """
    check(len(shape) == 3 and shape[0] >= 1, "shape", "(channels, height, width)", shape)
    start = np.eye(shape[0])
    start[:, 0] = 1
    basis = np.linalg.qr(start)[0].T
    return basis * np.where(basis[:, :1] < 0, -1, 1)
