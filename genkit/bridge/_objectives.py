"""What a light bridge is fitted by: objectives, unpaired batches and an optimizer in natural units."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core import Objective
from genkit._core._checks import check_interval

from ._bridge import Bridge
from ._potential import MixturePotential


def light_loss(potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> Float[Array, ""]:
    """Mean log c(x0) - mean log v(x1) of a potential, without argument checks.

    Args:
        potential: the potential.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).

    Returns:
        A scalar in nats.
    """
    value = lambda x, t: jnp.mean(jax.vmap(lambda x: jax.nn.logsumexp(potential.terms(x, t)))(x))
    return value(x0, 0.0) - value(x1, 1.0) + light_constant(potential, x0, x1)


def light_constant(potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> Float[Array, ""]:
    """The part of `light_loss` that no parameter moves: second moments of both ends, and the normalizer of v.

    Args:
        potential: the potential.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).

    Returns:
        A scalar in nats.
    """
    tilt = (jnp.mean(jnp.sum(x0 * x0, -1)) + jnp.mean(jnp.sum(x1 * x1, -1))) / (2.0 * potential.epsilon)
    return tilt + 0.5 * potential.dim * jnp.log(2.0 * jnp.pi * potential.epsilon)


class LightObjective(Objective):
    """The light Schrödinger bridge objective on a batch `(x0, x1)` of unpaired samples, for `gk.fit`.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> x0, key = jax.random.normal(jax.random.key(0), (50, 2)), jax.random.key(1)
        >>> loss, _ = gk.bridge.LightObjective()(bridge, (x0, x0 + 1.0), key=key)
        >>> bool(jnp.allclose(loss, bridge.objective(x0, x0 + 1.0), rtol=1e-4))
        True

    Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024, equation 8.
    """

    def __call__(self, model: Bridge, batch: Any, *, key: Key[Array, ""]) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The objective of `model`, a `Bridge`, on the batch.

        Args:
            model: the bridge that is fitted.
            batch: samples x0 (n, d) and x1 (m, d).
            key: not used.

        Returns:
            The objective, and nothing else.
        """
        del key
        return light_loss(model.potential, *batch), {}


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

    def __call__(self, key: Key[Array, ""]) -> tuple[Float[Array, " b d"], Float[Array, " b2 d"]]:
        """Draw one batch with replacement.

        Args:
            key: typed PRNG key.

        Returns:
            Points of the source and of the target.
        """
        key_batch, key0, key1 = (key, None, None) if self.noise is None else jr.split(key, 3)
        x0, x1 = self._draw(key_batch)
        return _blur(x0, self.noise, key0), _blur(x1, self.noise, key1)

    def _draw(self, key):
        """A batch of the points themselves."""
        if self.batch_size is None:
            return self.x0, self.x1
        key0, key1 = jr.split(key)
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
        many = lambda x: jnp.tile(x, (-(-least // x.shape[0]), 1))
        return UnpairedBatches(many(self.x0), many(self.x1), None, self.noise)(key)


def _blur(x, noise, key):
    """Points with normal noise."""
    return x if noise is None else x + noise * jr.normal(key, x.shape, x.dtype)


class MatchingObjective(Objective):
    r"""Bridge matching onto the light family: $E|g(X_t, t) - (X_1 - X_t)/(1-t)|^2$ with $X_t$ a Brownian bridge.

    One regression recovers the Schrödinger bridge from pairs of any plan with the right ends.

    Args:
        t_max: times are uniform on [0, t_max]; the variance of the target grows like epsilon t / (1-t).

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> key_data, key_loss = jax.random.split(jax.random.key(0))
        >>> shift = gk.bridge.light(jnp.zeros(1), jnp.ones((1, 2)), jnp.ones(1), 0.5)  # every path drifts by one
        >>> x0 = jax.random.normal(key_data, (50, 2))
        >>> loss, _ = gk.bridge.MatchingObjective()(shift, (x0, x0 + 1.0), key=key_loss)
        >>> bool(loss > 0)
        True

    Source: Gushchin et al., "Light and optimal Schrödinger bridge matching", ICML 2024, theorem 3.1.
    """

    t_max: float = eqx.field(static=True, default=0.99)

    def __check_init__(self):
        check_interval("t_max", self.t_max, 0.0, 1.0, open_lo=True, open_hi=True)

    def __call__(self, model: Bridge, batch: Any, *, key: Key[Array, ""]) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The regression loss of `model` on pairs.

        Args:
            model: the bridge that is fitted.
            batch: pairs x0 (n, d) and x1 (n, d), row by row.
            key: typed PRNG key.

        Returns:
            Half the mean squared error over epsilon (nats), and nothing else.
        """
        x0, x1 = batch
        key_time, key_noise = jr.split(key)
        t = jr.uniform(key_time, (x0.shape[0], 1), x0.dtype, 0.0, self.t_max)
        noise = jnp.sqrt(model.epsilon * t * (1.0 - t)) * jr.normal(key_noise, x0.shape, x0.dtype)
        x = (1.0 - t) * x0 + t * x1 + noise
        error = model.potential.drift(x, t[:, 0]) - (x1 - x) / (1.0 - t)
        return jnp.mean(jnp.sum(error**2, -1)) / (2.0 * model.epsilon), {}


def light_optimizer(
    learning_rate: optax.ScalarOrSchedule, shift_unit: Float[ArrayLike, ""], weight_unit: Float[ArrayLike, ""]
) -> optax.GradientTransformation:
    """Adam with a unit of its own for each kind of parameter.

    Args:
        learning_rate: step in logarithms of scales.
        shift_unit: what the shifts move in units of.
        weight_unit: what the log-weights move in units of.

    Returns:
        An optimizer for a `MixturePotential`, or for anything that holds one.
    """

    def units(updates, params):
        del params

        def scaled(path, leaf):
            name = next((str(entry.name) for entry in reversed(path) if hasattr(entry, "name")), "")
            unit = {"shifts": shift_unit, "log_weights": weight_unit}.get(name)
            return leaf if unit is None else (leaf * unit).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.chain(optax.scale_by_adam(), optax.stateless(units), optax.scale_by_learning_rate(learning_rate))
