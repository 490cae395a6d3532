"""Latent models: an unobserved fractional SDE seen through a decoder, inferred by a guide shared by all series."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from genkit._core._checks import check, check_count
from genkit.sde._elbo import elbo
from genkit.sde._model import FractionalSDE
from genkit.sde._neural import NeuralGuide
from genkit.sde._observed import Observed
from genkit.training import Objective


class LatentSDE(eqx.Module):
    """A latent fractional SDE, its decoder, and a guide that reads a series.

    Args:
        sde: distribution of the latent path.
        decoder: `decoder(x) -> numpyro distribution` of one observation.
        guide: a `NeuralGuide` built on one example series; it is conditioned on each series in turn.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> ts, y, decoder = jnp.array([0.5, 1.0]), jnp.ones((3, 2, 1)), gs.GaussianNoise(0.5)
        >>> sde = gs.FractionalSDE(lambda t, x: -x, gs.Constant(1.0), gn.brownian(), 0.5, 1.0)
        >>> guide = gs.NeuralGuide(sde, gs.Observed(ts, y[0], decoder), width=4, key=jax.random.key(0))
        >>> model = gs.LatentSDE(sde, decoder, guide)
        >>> model.observe(ts, y[0]).y.shape
        (2, 1)

    Source: Li et al., "Scalable gradients for stochastic differential equations", AISTATS 2020, section 5, with
    fractional noise as in Daems et al., ICLR 2024.
    """

    sde: FractionalSDE
    decoder: Callable
    guide: NeuralGuide

    @property
    def shape(self) -> tuple[int]:
        """Shape of one latent state."""
        return (self.sde.dim,)

    def __call__(self, x: Float[Array, " d"]) -> Any:
        """Distribution of one observation given the latent state."""
        return self.decoder(x)

    def observe(self, ts: Any, y: Array, mask: Any = None) -> Observed:
        """One series as `Observed` through the decoder.

        Args:
            ts: times (n,).
            y: observations (n, ...).
            mask: booleans (n,), True where observed.

        Returns:
            The observations.
        """
        return Observed(ts, y, self.decoder, mask)

    def posterior(self, observed: Observed) -> NeuralGuide:
        """The guide conditioned on one series.

        Args:
            observed: from `observe`.

        Returns:
            A guide for `simulate`, `elbo` and `forecast`.
        """
        return self.guide.condition(observed)


class NegativeELBO(Objective):
    """The objective `(model, batch, *, key) -> (scalar, aux)` that trains a `LatentSDE`: minus the mean bound.

    The batch is `y` or `(y, mask)`, shapes (b, n, ...) and (b, n).

    Args:
        ts: observation times shared by all series, shape (n,).
        num_particles: paths per series.
        steps_per_interval: time steps between two observations.
        scale: factor on the objective; one over the number of entries of a series keeps gradients of order one.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> ts, y, decoder = jnp.array([0.5, 1.0]), jnp.ones((3, 2, 1)), gs.GaussianNoise(0.5)
        >>> sde = gs.FractionalSDE(lambda t, x: -x, gs.Constant(1.0), gn.brownian(), 0.5, 1.0)
        >>> guide = gs.NeuralGuide(sde, gs.Observed(ts, y[0], decoder), width=4, key=jax.random.key(0))
        >>> model = gs.LatentSDE(sde, decoder, guide)
        >>> gs.NegativeELBO(ts)(model, y, key=jax.random.key(1))[0].shape
        ()
    """

    ts: Any
    num_particles: int = eqx.field(static=True, default=1)
    steps_per_interval: int = eqx.field(static=True, default=1)
    scale: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        check_count("num_particles", self.num_particles)
        check_count("steps_per_interval", self.steps_per_interval)

    def __call__(
        self, model: LatentSDE, batch: Any, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Minus the mean evidence bound of a batch of series."""
        y, mask = batch if isinstance(batch, tuple) else (batch, None)
        check(y.ndim >= 2, "batch", "series of shape (b, n, ...)", f"shape {y.shape}")

        def one(y: Array, mask: Any, key: Array) -> Array:
            observed = model.observe(self.ts, y, mask)
            kwargs: dict[str, Any] = {"num_particles": self.num_particles}
            guide = model.posterior(observed)
            return elbo(model.sde, guide, observed, steps_per_interval=self.steps_per_interval, key=key, **kwargs)

        keys = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(y.shape[0]))
        values = jax.vmap(one, in_axes=(0, None if mask is None else 0, 0))(y, mask, keys)
        return -self.scale * jnp.mean(values), {"elbo": jnp.mean(values)}
