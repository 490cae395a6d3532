"""The adaptive probability flow as a sampler, with or without teleportation before it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Key

from genkit._core import AbstractSampler
from genkit._core._checks import check, check_positive, describe, is_concrete
from genkit._core._draws import Draws
from genkit._core._fields import as_number
from genkit._core._sampler import start

from ._analytic import GaussianDenoiser
from ._flow import chart, check_plain, solve, velocity


class ProbabilityFlow(AbstractSampler):
    """Draws by solving the probability flow to a tolerance, each draw with steps of its own.

    Made by `probability_flow`. A draw whose solver gave up is NaN, which `genkit.sample` reports.

    Args:
        sigma_min: noise level at which the draws end, positive.
        sigma_max: noise level at which they start.
        rtol: relative tolerance.
        atol: absolute tolerance, for states scaled to unit variance.
        max_steps: steps after which the solver gives up.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.probability_flow(0.01, 50.0).max_steps
        1024
    """

    sigma_min: Float[Array, ""]
    sigma_max: Float[Array, ""]
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        sigma_min: Float[ArrayLike, ""] | float,
        sigma_max: Float[ArrayLike, ""] | float,
        rtol: Float[ArrayLike, ""] | float = 1e-5,
        atol: Float[ArrayLike, ""] | float = 1e-5,
        max_steps: int = 1024,
    ):
        chart(None, sigma_min, sigma_max, 1.0, jnp.result_type(float))
        check_positive("rtol", rtol)
        check_positive("atol", atol)
        self.sigma_min, self.sigma_max = as_number(sigma_min), as_number(sigma_max)
        self.rtol, self.atol = as_number(rtol), as_number(atol)
        self.max_steps = max_steps

    @property
    def levels(self) -> Float[np.ndarray, " 2"] | None:
        """The ends of the noise levels at which the model is asked; `None` where they are traced."""
        ends = (self.sigma_min, self.sigma_max)
        return np.asarray(ends, np.float64) if all(map(is_concrete, ends)) else None

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
        check_plain(model)
        x_init, _ = start(keys, self.sigma_max, x_init, shape)
        frame = chart(model, self.sigma_min, self.sigma_max, None, x_init.dtype)
        ends = (frame.angle(frame.sigma_max), frame.angle(frame.sigma_min))

        def one(x: Array, cond: Any) -> tuple[Array, Array, Array]:
            plain = velocity(model, frame, cond)
            field = lambda theta, state: (plain(theta, state[0]), jnp.zeros(()))
            start = (x / frame.scale(frame.sigma_max), jnp.zeros(()))
            found = solve(field, start, ends, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
            return jnp.where(found.ok, found.z * frame.scale(frame.sigma_min), jnp.nan), found.nfe, found.ok

        value, nfe, ok = jax.vmap(one, in_axes=(0, None if cond is None else 0))(x_init, cond)
        # A batch runs until its slowest member is done.
        return Draws(value, jnp.broadcast_to(nfe.max(), nfe.shape), nfe, {"ok": ok})


def probability_flow(
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    rtol: Float[ArrayLike, ""] | float = 1e-5,
    atol: Float[ArrayLike, ""] | float = 1e-5,
    max_steps: int = 1024,
) -> ProbabilityFlow:
    r"""The probability flow solved adaptively by a fifth-order Runge-Kutta pair, in the angle $\arctan\sigma$.

    Args:
        sigma_min: noise level at which the draws end, positive: they are data with that much noise.
        sigma_max: noise level at which they start.
        rtol: relative tolerance.
        atol: absolute tolerance, for states scaled to unit variance.
        max_steps: steps after which the solver gives up on a draw.

    Returns:
        A sampler for `genkit.sample`; `Draws.info["ok"]` says which draws got to the end.

    Raises:
        ValueError: for noise levels out of order or tolerances that are not positive.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jax.numpy.zeros(2), jax.numpy.eye(2))
        >>> gk.sample(gk.diffusion.probability_flow(0.01, 50.0), denoiser, 3, key=jax.random.key(0)).value.shape
        (3, 2)

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 13.
    """
    return ProbabilityFlow(sigma_min, sigma_max, rtol, atol, max_steps)


def teleport(
    gaussian: GaussianDenoiser,
    x: Inexact[ArrayLike, " *shape"],
    sigma_from: Float[ArrayLike, ""] | float,
    sigma_to: Float[ArrayLike, ""] | float,
) -> Inexact[Array, " *shape"]:
    r"""Follow the probability flow of Gaussian data between any two noise levels in one step.

    $$x' = \mu + U\,\mathrm{diag}\sqrt{\frac{\lambda_i + \sigma'^2}{\lambda_i + \sigma^2}}\; U^\top (x - \mu).$$

    At large noise the flow of any data is that of the Gaussian of the same mean and covariance: the first stretch of a
    draw costs no evaluation.

    Args:
        gaussian: mean and covariance of the data.
        x: the state.
        sigma_from: its noise level.
        sigma_to: the noise level to go to, below or above.

    Returns:
        The state at `sigma_to`, of the shape of `x`.

    Raises:
        TypeError: if `gaussian` is no `GaussianDenoiser`.
        ValueError: for a state of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.GaussianDenoiser(jnp.zeros(1), jnp.array(9.0))
        >>> gk.diffusion.teleport(law, jnp.array([5.0]), 4.0, 0.0).tolist()
        [3.0]

    Source: Wang and Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and
    its Applications", TMLR 2024, section 5.
    """
    if not isinstance(gaussian, GaussianDenoiser):
        raise TypeError(f"`gaussian` must be a `GaussianDenoiser`; got {describe(gaussian)}.")
    x = as_number(x)
    check(x.shape == gaussian.shape, "x", f"of shape {gaussian.shape}", f"shape {x.shape}")
    before, after = (jnp.asarray(sigma, x.dtype) ** 2 for sigma in (sigma_from, sigma_to))
    variances, mean = gaussian.variances.astype(x.dtype), gaussian.mean.astype(x.dtype)
    total = variances + before
    gain = jnp.sqrt(jnp.where(total == 0, 1, (variances + after) / jnp.where(total == 0, 1, total)))
    if gaussian.basis is None:
        return mean + gain * (x - mean)
    basis = gaussian.basis.astype(x.dtype)
    return mean + (basis @ (gain * ((x - mean).ravel() @ basis))).reshape(x.shape)


class Teleported(AbstractSampler):
    """Another sampler that starts at a lower noise level, reached from `sigma_max` by the flow of a Gaussian.

    Args:
        sampler: a table or sampler whose first noise level is `sigma_skip`.
        gaussian: mean and covariance of the data.
        sigma_max: noise level at which draws start.
        sigma_skip: noise level at which the sampler takes over; by default the first level of a table.

    Raises:
        ValueError: for levels out of order, or a sampler whose first level is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> short = gk.diffusion.heun(gk.diffusion.karras(8, 0.01, 3.0))
        >>> sampler = gk.diffusion.Teleported(short, law, 80.0)
        >>> gk.sample(sampler, law, 4, key=jax.random.key(0)).value.shape
        (4, 2)

    Source: Wang and Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and
    its Applications", TMLR 2024, section 5.
    """

    sampler: AbstractSampler
    gaussian: GaussianDenoiser
    sigma_max: Float[Array, ""]
    sigma_skip: Float[Array, ""]

    def __init__(self, sampler: Any, gaussian: GaussianDenoiser, sigma_max: Any, sigma_skip: Any = None):
        from genkit._core._sampler import Sampler, as_sampler

        self.sampler = as_sampler(sampler)
        if not isinstance(gaussian, GaussianDenoiser):
            raise TypeError(f"`gaussian` must be a `GaussianDenoiser`; got {describe(gaussian)}.")
        if sigma_skip is None:
            table = self.sampler.table if isinstance(self.sampler, Sampler) else None
            check(table is not None, "sigma_skip", "given with a sampler that is no table", "None")
            assert table is not None, "checked above"
            sigma_skip = np.asarray(table.sigma)[0]
        chart(None, sigma_skip, sigma_max, 1.0, jnp.result_type(float))
        self.gaussian, self.sigma_max, self.sigma_skip = gaussian, as_number(sigma_max), as_number(sigma_skip)

    @property
    def block_size(self) -> int:
        """Number of consecutive draws that interact in the sampler."""
        return getattr(self.sampler, "block_size", 1)

    @property
    def levels(self) -> Any:
        """The noise levels at which the model is asked: those of the sampler, for the Gaussian asks nothing."""
        return getattr(self.sampler, "levels", None)

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one example per key; see `AbstractSampler.draw`. `x_init` is meant at `sigma_max`."""
        x_init, inner_keys = start(keys, self.sigma_max, x_init, shape)
        ported = jax.vmap(lambda x: teleport(self.gaussian, x, self.sigma_max, self.sigma_skip))(x_init)
        return self.sampler.draw(model, inner_keys, cond=cond, x_init=ported, shape=shape)
