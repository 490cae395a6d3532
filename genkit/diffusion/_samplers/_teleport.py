"""The probability flow of Gaussian data in one step, and samplers that begin with it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree

from genkit._core._checks import check, check_interval, describe
from genkit._core._fields import as_number
from genkit.diffusion._denoisers._gaussian import GaussianDenoiser
from genkit.diffusion._flow import check_ends
from genkit.sampling import AbstractSampler, Draws, Sampler, Table, as_sampler, start


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
        sigma_from: its noise level, non-negative.
        sigma_to: the noise level to go to, non-negative, below or above.

    Returns:
        The state at `sigma_to`, of the shape of `x`.

    Raises:
        TypeError: if `gaussian` is no `GaussianDenoiser`.
        ValueError: for a state of another shape, or a negative noise level.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.diffusion.GaussianDenoiser(jnp.zeros(1), jnp.array(9.0))
        >>> gk.diffusion.teleport(data, jnp.array([5.0]), 4.0, 0.0).tolist()
        [3.0]

    Source: Wang and Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and
    its Applications", TMLR 2024, section 5.
    """
    if not isinstance(gaussian, GaussianDenoiser):
        raise TypeError(f"`gaussian` must be a `GaussianDenoiser`; got {describe(gaussian)}.")
    x = as_number(x)
    check(x.shape == gaussian.shape, "x", f"of shape {gaussian.shape}", f"shape {x.shape}")
    check_interval("sigma_from", sigma_from, 0)
    check_interval("sigma_to", sigma_to, 0)
    before = jnp.asarray(sigma_from, x.dtype) ** 2
    after = jnp.asarray(sigma_to, x.dtype) ** 2
    variances = gaussian.variances.astype(x.dtype)
    mean = gaussian.mean.astype(x.dtype)
    # Directions without variance at zero noise stay where they are.
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
        >>> data = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> short = gk.diffusion.heun(gk.diffusion.karras(8, 0.01, 3.0))
        >>> sampler = gk.diffusion.Teleported(short, data, 80.0)
        >>> gk.sample(sampler, data, 4, key=jax.random.key(0)).value.shape
        (4, 2)

    Source: Wang and Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and
    its Applications", TMLR 2024, section 5.
    """

    sampler: AbstractSampler
    gaussian: GaussianDenoiser
    sigma_max: Float[Array, ""]
    sigma_skip: Float[Array, ""]

    def __init__(
        self,
        sampler: AbstractSampler | Table,
        gaussian: GaussianDenoiser,
        sigma_max: Float[ArrayLike, ""] | float,
        sigma_skip: Float[ArrayLike, ""] | float | None = None,
    ):
        self.sampler = as_sampler(sampler)
        if not isinstance(gaussian, GaussianDenoiser):
            raise TypeError(f"`gaussian` must be a `GaussianDenoiser`; got {describe(gaussian)}.")
        if sigma_skip is None:
            if not isinstance(self.sampler, Sampler):
                raise ValueError("`sigma_skip` must be given with a sampler that is no table; got None.")
            sigma_skip = float(np.asarray(self.sampler.table.sigma)[0])
        check_ends(sigma_skip, sigma_max)
        self.gaussian = gaussian
        self.sigma_max = as_number(sigma_max)
        self.sigma_skip = as_number(sigma_skip)

    @property
    def block_size(self) -> int:
        """Number of consecutive draws that interact in the sampler."""
        return self.sampler.block_size

    @property
    def levels(self) -> Float[ArrayLike, " levels"] | None:
        """Noise levels at which the model is asked."""
        # The Gaussian of the first stretch asks the model for nothing.
        return self.sampler.levels

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one example per key; see `AbstractSampler.draw`. `x_init` is meant at `sigma_max`."""
        x_init, inner_keys = start(keys, self.sigma_max, x_init, shape)
        # Drawn at the first level and then moved, so that states given by the user take the same way.
        ported = jax.vmap(lambda x: teleport(self.gaussian, x, self.sigma_max, self.sigma_skip))(x_init)
        return self.sampler.draw(model, inner_keys, cond=cond, x_init=ported, shape=shape)
