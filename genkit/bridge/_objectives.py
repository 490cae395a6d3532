"""Objectives of bridges: the likelihood of light bridges, bridge matching, score and flow matching."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check, check_interval
from genkit.bridge._bridge import Bridge
from genkit.bridge._potential import MixturePotential
from genkit.training import Objective


# Both ends, and by-products of the coupling for the log.
Batch = tuple[Array, ...]


def light_loss(potential: MixturePotential, x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> Float[Array, ""]:
    """Mean log c(x0) - mean log v(x1) of a potential, without argument checks.

    Args:
        potential: the potential.
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).

    Returns:
        A scalar in nats.
    """
    _check_batch(x0, x1)

    def value(x: Float[Array, " n d"], t: float) -> Float[Array, ""]:
        return jnp.mean(jax.vmap(lambda x: jax.nn.logsumexp(potential.terms(x, t)))(x))

    return value(x0, 0.0) - value(x1, 1.0) + light_constant(potential, x0, x1)


def _check_batch(x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> None:
    """Refuse batches without points, whose means are NaN."""
    for name, x in (("x0", x0), ("x1", x1)):
        check(x.shape[0] > 0, name, "a batch of points (n, d)", x, "An empty batch has no loss.")


def _check_pairs(x0: Float[Array, " n d"], x1: Float[Array, " m d"]) -> None:
    """Refuse batches that are empty, or not paired row by row."""
    _check_batch(x0, x1)
    check(x0.shape == x1.shape, "x1", lambda: f"of shape {x0.shape}, one end for each start", x1)


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


def coupling_log(errors: list[Float[Array, ""]]) -> dict[str, Array]:
    """The by-products of a batch for the log: the marginal error of the plan that coupled it, if there was one."""
    if not errors:
        return {}
    return {"coupling_error": errors[0]}


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

    def __call__(
        self, model: Bridge, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
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

    def __call__(
        self, model: Bridge, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The regression loss of `model` on pairs.

        Args:
            model: the bridge that is fitted.
            batch: pairs x0 (n, d) and x1 (n, d), row by row.
            key: typed PRNG key.

        Returns:
            Half the mean squared error over epsilon (nats), and the error of the coupling, where it has one.
        """
        x0, x1, *errors = batch
        _check_pairs(x0, x1)
        key_time, key_noise = jr.split(key)
        t = jr.uniform(key_time, (x0.shape[0], 1), x0.dtype, 0.0, self.t_max)
        noise = jnp.sqrt(model.epsilon * t * (1.0 - t)) * jr.normal(key_noise, x0.shape, x0.dtype)
        x = (1.0 - t) * x0 + t * x1 + noise
        error = model.potential.drift(x, t[:, 0]) - (x1 - x) / (1.0 - t)
        return jnp.mean(jnp.sum(error**2, -1)) / (2.0 * model.epsilon), coupling_log(errors)


class ScoreAndFlowMatching(Objective):
    """Regressions of the flow and of the score of a `NeuralBridge` along Brownian bridges between pairs.

    Source: Tong et al., "Simulation-free Schrödinger bridges via score and flow matching", AISTATS 2024, equation 9.
    """

    def __call__(
        self, model: PyTree, batch: Batch, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        x0, x1, *errors = batch
        _check_pairs(x0, x1)
        key_time, key_noise = jr.split(key)
        # The targets grow without bound towards both ends of time.
        t = jr.uniform(key_time, (x0.shape[0], 1), x0.dtype, 1e-3, 1.0 - 1e-3)
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        std = jnp.sqrt(t * (1.0 - t))
        sigma = jnp.sqrt(model.epsilon)
        x = (1.0 - t) * x0 + t * x1 + sigma * std * noise
        flow_target = (1.0 - 2.0 * t) / (2.0 * std) * sigma * noise + x1 - x0
        flow = jax.vmap(model.flow)(t[:, 0], x)
        half_score = jax.vmap(model.half_score)(t[:, 0], x)
        score_error = 2.0 * std / sigma * half_score + noise
        return jnp.mean((flow - flow_target) ** 2) + jnp.mean(score_error**2), coupling_log(errors)
