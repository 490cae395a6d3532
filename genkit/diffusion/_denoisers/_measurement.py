"""Denoisers conditioned on a linear measurement."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, PyTree

from genkit._core._checks import check, check_choice, check_count, check_finite, check_interval
from genkit._core._fields import as_number
from genkit.sampling import AbstractDelegatingDenoiser, as_denoiser


METHODS = ("mmps", "tmpd", "pigdm", "dps", "ddnm", "diffpir")

# Up to so many measurements a linear system is solved exactly, by forming its matrix.
_EXACT = 64

# Iterations of conjugate gradients beyond that.
_ITERATIONS = 8


class Measurement(AbstractDelegatingDenoiser):
    r"""A denoiser given a linear measurement $y = A x_0 + \text{noise\_std}\; e$: a denoiser again, for any sampler.

    The posterior mean given $x$ and $y$ is $D + \sigma^2 \nabla_x \log p(y \mid x)$. The methods differ in how they
    approximate the distribution of $y$ given $x$, with $J = \partial D / \partial x$ and $r = y - A D$:

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
    operator: Callable | Float[Array, "m d"]
    y: Float[Array, "..."]
    noise_std: Float[Array, "..."]
    method: str = eqx.field(static=True)
    num_iterations: int | None = eqx.field(static=True)
    scale: Float[Array, ""]
    sigma_data: Float[Array, ""]

    def __init__(
        self,
        denoiser: Callable,
        operator: Callable | Float[ArrayLike, "..."],
        y: Float[ArrayLike, "..."],
        noise_std: Float[ArrayLike, "..."] | float,
        method: str = "mmps",
        *,
        num_iterations: int | None = None,
        scale: Float[ArrayLike, ""] | float = 1.0,
        sigma_data: Float[ArrayLike, ""] | float | None = None,
    ):
        check(callable(denoiser), "denoiser", "a callable (x, sigma, cond=None) -> x0", denoiser)
        check_choice("method", method, METHODS)
        check_finite("y", y)
        check_interval("noise_std", noise_std, 0)
        check_interval("scale", scale, 0, open_lo=True)
        if num_iterations is not None:
            check_count("num_iterations", num_iterations)
        facts = as_denoiser(denoiser)
        if sigma_data is None:
            sigma_data = facts.sigma_data
        check_interval("sigma_data", sigma_data, 0, open_lo=True)
        self.denoiser = denoiser
        self.method = method
        if callable(operator):
            self.operator = operator
        else:
            check_finite("operator", operator)
            self.operator = as_number(operator)
            check(self.operator.ndim == 2, "operator", "a matrix (or a function)", f"shape {self.operator.shape}")
        self.y = as_number(y)
        self.noise_std = as_number(noise_std)
        if self.noise_std.shape not in ((), self.y.shape):
            raise ValueError(
                f"`noise_std` must be a number or of shape {self.y.shape}, as `y`; got shape {self.noise_std.shape}."
            )
        self.num_iterations = num_iterations
        self.scale = as_number(scale)
        self.sigma_data = as_number(sigma_data)
        if facts.shape is not None:
            self._check_shapes(jax.ShapeDtypeStruct(facts.shape, self.y.dtype))

    @property
    def no_likelihood(self) -> str:
        """Reason for which the probability flow of this denoiser has no meaning as a likelihood."""
        return (
            "the measurement enters by an approximation at each noise level, so that its flow is that of no posterior. "
            "Weigh the prior's log_prob by the likelihood of the measurement instead."
        )

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """Estimate the clean example from the noisy one and the measurement; see `Denoiser`."""
        x = as_number(x)
        self._check_shapes(x)
        level = jnp.asarray(sigma, x.dtype)
        # At sigma = 0 nothing is left to learn from the measurement, and several quotients are 0 / 0.
        clean = level == 0
        safe = jnp.where(clean, 1, level)

        def predict(x: Array) -> Array:
            return jnp.asarray(self.denoiser(x, safe, cond))

        if self.method in ("ddnm", "diffpir"):
            estimate = self._projected(predict(x), x, safe)
        else:
            x0, pullback = jax.vjp(predict, x)
            estimate = self._differentiated(x0, lambda v: pullback(v)[0], x, safe)
        return jnp.where(clean, x, estimate)

    def _projected(self, x0: Array, x: Array, sigma: Array) -> Array:
        """Estimate of the methods that only move the prediction toward the measurement."""
        deviation = sigma
        if self.method == "diffpir":
            deviation = sigma * self.scale.astype(x.dtype)

        def covariance(v: Array) -> Array:
            return deviation**2 * self._apply(self._transpose(v, x))

        u = self._solve(covariance, self._residual(x0))
        return x0 + deviation**2 * self._transpose(u, x)

    def _differentiated(self, x0: Array, pull: Callable[[Array], Array], x: Array, sigma: Array) -> Array:
        """Estimate of the methods that pull the misfit back through the denoiser."""
        residual = self._residual(x0)
        if self.method == "dps":
            size = jnp.sqrt(jnp.sum(residual**2))
            # The norm has no gradient at zero, where nothing is to be corrected.
            toward = pull(self._transpose(residual / jnp.where(size == 0, 1, size), x))
            return x0 + self.scale.astype(x.dtype) * sigma * toward
        if self.method == "tmpd":
            rows = sigma**2 * self._apply(pull(self._transpose(jnp.ones_like(self.y), x)))
            u = residual / _positive(jnp.maximum(rows, 0) + self.noise_std**2)
        elif self.method == "pigdm":
            square = self.sigma_data.astype(x.dtype) ** 2
            spread = sigma**2 * square / (sigma**2 + square)
            u = self._solve(lambda v: spread * self._apply(self._transpose(v, x)), residual)
        else:
            u = self._solve(lambda v: self._apply(sigma**2 * pull(self._transpose(v, x))), residual)
        return x0 + sigma**2 * pull(self._transpose(u, x))

    def _apply(self, x: Array) -> Array:
        """The operator."""
        if callable(self.operator):
            return jnp.asarray(self.operator(x))
        return (self.operator.astype(x.dtype) @ x.ravel()).reshape(self.y.shape)

    def _transpose(self, v: Array, x: Array) -> Array:
        """Transpose of the operator, for an example like `x`."""
        (back,) = jax.linear_transpose(self._apply, jax.ShapeDtypeStruct(x.shape, x.dtype))(v.astype(x.dtype))
        return back

    def _residual(self, x0: Array) -> Array:
        """What the prediction leaves of the measurement."""
        return self.y.astype(x0.dtype) - self._apply(x0)

    def _solve(self, covariance: Callable[[Array], Array], b: Array) -> Array:
        """Solve `(covariance + noise_std^2) u = b`, exactly or by conjugate gradients."""

        def product(v: Array) -> Array:
            return covariance(v) + self.noise_std.astype(v.dtype) ** 2 * v

        if self.num_iterations is None and b.size <= _EXACT:
            units = jnp.eye(b.size, dtype=b.dtype).reshape(b.size, *b.shape)
            matrix = jax.vmap(product)(units).reshape(b.size, b.size)
            # Symmetric up to the network's own asymmetry; the smallest of ridges keeps repeated rows solvable.
            ridge = b.size * jnp.finfo(b.dtype).eps * jnp.trace(matrix) / b.size
            matrix = 0.5 * (matrix + matrix.T) + ridge * jnp.eye(b.size, dtype=b.dtype)
            return jnp.linalg.solve(matrix, b.ravel()).reshape(b.shape)
        return _conjugate_gradients(product, b, self.num_iterations or _ITERATIONS)

    def _check_shapes(self, x: Array | jax.ShapeDtypeStruct) -> None:
        """Refuse an operator that does not map an example to the shape of `y`."""
        if not callable(self.operator):
            expected = (self.y.size, int(np.prod(x.shape)))
            got = tuple(self.operator.shape)
            if got != expected:
                raise ValueError(f"`operator` must be a matrix {expected}, from one example to `y`; got shape {got}.")
            return
        operator = self.operator
        try:
            # A function made here: JAX would compare an operator such as `Partial` by value.
            made = jax.eval_shape(lambda x: operator(x), x)
        except TypeError as error:
            raise ValueError(f"`operator` must apply to one example of shape {x.shape}; it raised: {error}") from error
        shapes = [leaf.shape for leaf in jax.tree.leaves(made)]
        if shapes != [self.y.shape]:
            got = f"shape {shapes[0]}" if len(shapes) == 1 else f"{len(shapes)} arrays"
            raise ValueError(
                f"`operator` must be a map from one example to the shape of `y`, {self.y.shape}; got {got}."
            )


def _conjugate_gradients(product: Callable[[Array], Array], b: Array, iterations: int) -> Array:
    """A fixed number of iterations of conjugate gradients from zero; it stops by itself at the solution."""
    # Imported here: only large measurements need it.
    import lineax as lx

    operator = lx.FunctionLinearOperator(
        product, jax.ShapeDtypeStruct(b.shape, b.dtype), tags=lx.positive_semidefinite_tag
    )
    solver = lx.CG(rtol=1e-6, atol=0.0, max_steps=iterations, stabilise_every=None)
    return lx.linear_solve(operator, b, solver, throw=False).value


def _positive(value: Array) -> Array:
    """A value kept from zero."""
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny ** 0.5)
