"""Noise of a table from one Brownian path per draw."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check, is_concrete
from genkit._core._fields import as_number
from genkit.diffusion._flow import check_ends
from genkit.sampling import AbstractPart, Table


@runtime_checkable
class _Step(Protocol):
    """Where the draws stand: the noise levels of the step that a row belongs to."""

    sigma_start: Float[Array, ""]
    sigma_next: Float[Array, ""]


class BrownianNoise(AbstractPart):
    r"""Noise from one Brownian path per draw: more steps refine a draw, not replace it. Pass it as `Sampler(noise=)`.

    The noise of a row from $\sigma_s$ to $\sigma_t$ is the normalized increment of the path over
    $[\log\sigma_t, \log\sigma_s]$, so it is standard normal, and tables on different grids over the same range see the
    same path. Draws then converge, draw by draw, as steps get smaller. It suits stochastic tables
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

    def __init__(
        self,
        sigma_min: Float[ArrayLike, ""] | float,
        sigma_max: Float[ArrayLike, ""] | float,
        tolerance: float = 1e-6,
    ):
        check_ends(sigma_min, sigma_max)
        check(0 < tolerance < 1, "tolerance", "in (0, 1)", tolerance)
        self.sigma_min = as_number(sigma_min)
        self.sigma_max = as_number(sigma_max)
        self.tolerance = float(tolerance)

    def check_table(self, table: Table) -> None:
        """Refuse a table that adds noise while the level rises or stays."""
        if not is_concrete(table.sigma):
            return
        noisy = (np.asarray(table.c) > 0) | (np.asarray(table.c_stage) > 0)
        end = np.asarray(table.sigma_next)
        # Noise that lifts the state shows in the level of the next row, above the end of the step.
        falls = np.append(np.asarray(table.sigma)[1:], end[-1]) <= end * (1 + 1e-6)
        if not falls[noisy].all():
            raise ValueError(
                "`table` must be one whose noise level falls where it adds noise; got one that rises (churn, "
                "restarts). Take `ancestral`, `sa` or a stochastic `dpmpp`."
            )

    def __call__(self, keys: Key[Array, " n"], row: _Step, stream: int, x: Array) -> Array:
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

        first = self._clock(row.sigma_start, x.dtype)
        last = self._clock(row.sigma_next, x.dtype)

        def one(key: Array) -> Array:
            space = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
            path = diffrax.VirtualBrownianTree(0.0, 1.0, self.tolerance, space, jr.fold_in(key, stream))
            increment = jnp.asarray(path.evaluate(first, last))
            # A step of no length has no increment to normalize.
            return increment / jnp.sqrt(jnp.where(last > first, last - first, 1))

        return jax.vmap(one)(keys)

    def _clock(self, sigma: Float[ArrayLike, ""], dtype: DTypeLike) -> Float[Array, ""]:
        """Time of the path at a noise level: 0 at the largest, 1 at the smallest."""
        low = jnp.log(self.sigma_min.astype(dtype))
        high = jnp.log(self.sigma_max.astype(dtype))
        # Zero noise, where tables end, counts as the smallest level.
        return jnp.clip((high - jnp.log(jnp.maximum(sigma, self.sigma_min))) / (high - low), 0, 1)
