"""Batches of both ends, unpaired or coupled, as the `data` of a recipe."""

import warnings
from collections.abc import Mapping

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from genkit._core._checks import check_count, fail
from genkit.divergence import PointCost, sinkhorn_potentials


COUPLINGS = ("independent", "sinkhorn", "paired")
# Pairs are drawn row by row, so a loose marginal is enough.
_TOLERANCE = 1e-2


class UnpairedBatches(eqx.Module):
    """Independent batches of two sample sets, as the `data` of a recipe.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        batch_size: points of each per batch; `None` takes all of both.
        noise: standard deviation of normal noise added to every point drawn; `None` adds none.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> x0, x1 = gk.bridge.UnpairedBatches(jnp.zeros((10, 2)), jnp.ones((20, 2)), 4)(jax.random.key(0))
        >>> x0.shape, x1.shape
        ((4, 2), (4, 2))
    """

    x0: Float[Array, " n d"]
    x1: Float[Array, " m d"]
    batch_size: int | None = eqx.field(static=True)
    noise: Float[Array, ""] | None = None

    def __check_init__(self):
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def __call__(self, key: Key[Array, ""]) -> tuple[Float[Array, " b d"], Float[Array, " b2 d"]]:
        """Draw one batch with replacement.

        Args:
            key: typed PRNG key.

        Returns:
            Points of the source and of the target.
        """
        if self.noise is None:
            return self._draw(key)
        key_batch, key0, key1 = jr.split(key, 3)
        x0, x1 = self._draw(key_batch)
        return _blur(x0, self.noise, key0), _blur(x1, self.noise, key1)

    def _draw(self, key: Key[Array, ""]) -> tuple[Float[Array, " b d"], Float[Array, " b2 d"]]:
        """A batch of the points as they are."""
        if self.batch_size is None:
            return self.x0, self.x1
        key0, key1 = jr.split(key)
        # Both ends independently: pairs of the same row would be a plan that nobody asked for.
        index0 = jr.randint(key0, (self.batch_size,), 0, self.x0.shape[0])
        index1 = jr.randint(key1, (self.batch_size,), 0, self.x1.shape[0])
        return self.x0[index0], self.x1[index1]

    def fixed(self, key: Key[Array, ""], *, least: int = 8192) -> tuple[Float[Array, " b d"], Float[Array, " b2 d"]]:
        """All points, for solvers that look at the same ones again and again; with noise as often as makes `least`.

        Args:
            key: typed PRNG key.
            least: least number of points of each end, if noise is added.

        Returns:
            Points of the source and of the target.
        """
        if self.noise is None:
            return self.x0, self.x1
        return UnpairedBatches(_repeat(self.x0, least), _repeat(self.x1, least), None, self.noise)(key)


def _repeat(x: Float[Array, " n d"], least: int) -> Float[Array, " m d"]:
    """The points as often as makes at least so many."""
    return jnp.tile(x, (-(-least // x.shape[0]), 1))


def _blur(x: Float[Array, " n d"], noise: Float[Array, ""], key: Key[Array, ""]) -> Float[Array, " n d"]:
    """Points with normal noise."""
    return x + noise * jr.normal(key, x.shape, x.dtype)


class PairedBatches(eqx.Module):
    """Batches of given pairs, drawn with replacement.

    Args:
        x0: starting points, shape (n, d).
        x1: their end points, shape (n, d).
        batch_size: pairs per batch.
    """

    x0: Float[Array, " n d"]
    x1: Float[Array, " n d"]
    batch_size: int = eqx.field(static=True)

    def __call__(self, key: Key[Array, ""]) -> tuple[Float[Array, " b d"], Float[Array, " b d"]]:
        """Draw one batch.

        Args:
            key: typed PRNG key.

        Returns:
            Starting points and end points.
        """
        index = jr.randint(key, (self.batch_size,), 0, self.x0.shape[0])
        return self.x0[index], self.x1[index]


class SinkhornBatches(eqx.Module):
    """Unpaired batches coupled by the entropic plan of each batch.

    Args:
        batches: the unpaired batches.
        epsilon: variance of the reference at t = 1.
    """

    batches: UnpairedBatches
    epsilon: Float[Array, ""]

    def __call__(self, key: Key[Array, ""]) -> tuple[Float[Array, " b d"], Float[Array, " b d"], Float[Array, ""]]:
        """Draw one batch of pairs.

        Args:
            key: typed PRNG key.

        Returns:
            Starting points, end points, and the marginal error of the plan they were drawn from.
        """
        key_batch, key_pair = jr.split(key)
        x0, x1 = self.batches(key_batch)
        log_a = jnp.full(x0.shape[0], -np.log(x0.shape[0]), x0.dtype)
        log_b = jnp.full(x1.shape[0], -np.log(x1.shape[0]), x1.dtype)
        cost = PointCost(x0, x1)
        state = sinkhorn_potentials(cost, log_a, log_b, self.epsilon, tolerance=_TOLERANCE, max_iterations=200)
        logits = cost.map_rows(lambda row, i: state.log_density(row, i, self.epsilon))
        return x0, x1[jr.categorical(key_pair, logits)], state.marginal_error


def warn_of_couplings(log: Mapping[str, np.ndarray]) -> None:
    """Warn where the plans of most batches had not converged, so that the end of the pairs is not the target.

    Args:
        log: metrics of a training on coupled batches.
    """
    errors = np.asarray(log.get("coupling_error", np.zeros(1)))
    share = float(np.mean(errors > _TOLERANCE))
    if share > 0.5:
        warnings.warn(
            f"the entropic plans of {100 * share:.0f} % of the batches had not converged after 200 sweeps (median "
            f"marginal error {float(np.median(errors)):.2g}): the ends of their pairs are not those of the target. "
            "Raise `epsilon`, rescale the points, or take coupling='independent'.",
            stacklevel=3,
        )


def coupled_batches(
    coupling: str, x0: Float[Array, " n d"], x1: Float[Array, " m d"], epsilon: Float[Array, ""], batch_size: int
) -> UnpairedBatches | PairedBatches | SinkhornBatches:
    """The pairing of two sample sets by name."""
    if coupling == "paired":
        if x0.shape != x1.shape:
            fail("x1", f"of shape {x0.shape}, one end per start", f"shape {x1.shape}")
        return PairedBatches(x0, x1, batch_size)
    unpaired = UnpairedBatches(x0, x1, batch_size)
    if coupling == "independent":
        return unpaired
    return SinkhornBatches(unpaired, epsilon)
