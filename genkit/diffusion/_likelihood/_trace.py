"""Traces of the Jacobian of the flow: the divergence, exact or estimated."""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from genkit._core._checks import check_count, check_key


class AbstractTrace(eqx.Module):
    """A way to take the divergence of the flow: exactly, or estimated along random directions."""

    # True if the trace draws random directions, and so needs a key.
    is_random: ClassVar[bool] = False

    @abc.abstractmethod
    def probes(self, z: Float[Array, " *shape"], key: Key[Array, ""] | None) -> Float[Array, " k *shape"] | None:
        """Random directions, fixed along the path; `None` where none are needed."""

    @abc.abstractmethod
    def __call__(
        self, field: Callable[[Array], Array], z: Float[Array, " *shape"], probes: Float[Array, " k *shape"] | None
    ) -> tuple[Float[Array, " *shape"], Float[Array, " k"]]:
        """The field and one or several estimates of its divergence at `z`."""


class ExactTrace(AbstractTrace):
    """The divergence itself, one derivative for each coordinate.

    Args:
        batch_size: derivatives that are taken at once; all by default. Fewer save memory in many dimensions.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.ExactTrace().batch_size is None
        True
    """

    batch_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def probes(self, z: Float[Array, " *shape"], key: Key[Array, ""] | None) -> None:
        del z, key

    def __call__(
        self, field: Callable[[Array], Array], z: Float[Array, " *shape"], probes: Float[Array, " k *shape"] | None
    ) -> tuple[Float[Array, " *shape"], Float[Array, " k"]]:
        del probes
        value, push = jax.linearize(field, z)

        def entry(i: Array) -> Array:
            unit = jnp.zeros(z.size, z.dtype).at[i].set(1).reshape(z.shape)
            return push(unit).ravel()[i]

        places = jnp.arange(z.size)
        if self.batch_size is None or self.batch_size >= z.size:
            entries = jax.vmap(entry)(places)
        else:
            entries = jax.lax.map(entry, places, batch_size=self.batch_size)
        return value, jnp.sum(entries)[None]


class Hutchinson(AbstractTrace):
    r"""An unbiased estimate of the divergence from random signs $v$, $E[v^\top J v] = \mathrm{tr} J$.

    The signs are drawn once for each datum and kept along its path, so that the solver sees a smooth field. Their
    variance is $2(|S|_F^2 - \sum_i S_{ii}^2)$ with $S$ the symmetric part of $J$: none where that is diagonal.

    Args:
        num_probes: directions per datum; the standard error needs at least 2.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.Hutchinson(8).num_probes
        8

    Source: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1990; Grathwohl et al., "FFJORD",
    ICLR 2019, equation 7.
    """

    is_random: ClassVar[bool] = True

    num_probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_probes", self.num_probes)

    def probes(self, z: Float[Array, " *shape"], key: Key[Array, ""] | None) -> Float[Array, " k *shape"]:
        check_key(key)
        # Refused above, for type checkers.
        assert key is not None, "no key is no typed key"
        return jr.rademacher(key, (self.num_probes, *z.shape), z.dtype)

    def __call__(
        self, field: Callable[[Array], Array], z: Float[Array, " *shape"], probes: Float[Array, " k *shape"] | None
    ) -> tuple[Float[Array, " *shape"], Float[Array, " k"]]:
        # One linearization serves all probes.
        value, push = jax.linearize(field, z)
        return value, jax.vmap(lambda v: jnp.sum(v * push(v)))(probes)
