"""Bridges of two networks, and their training by score and flow matching ([SF]2M)."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Key, Real, Shaped

from genkit._core._checks import check_choice, check_count, check_finite, check_key, check_positive
from genkit._core._fields import FROZEN, as_number
from genkit.bridge._abstract import AbstractBridge
from genkit.bridge._batches import COUPLINGS, coupled_batches, warn_of_couplings
from genkit.bridge._euler import euler_maruyama
from genkit.bridge._inputs import Scalar, as_floats, check_epsilon, check_samples, check_times
from genkit.bridge._objectives import ScoreAndFlowMatching
from genkit.bridge._optimizers import CosineAdamW, CosineRate
from genkit.bridge._report import FittedBridge
from genkit.training import Phase, Recipe, fit


class NeuralBridge(AbstractBridge):
    """A bridge whose drift is the sum of two networks: the probability flow and half epsilon times the score.

    It is simulated, and has no closed-form densities.

    Args:
        flow: `flow(t, x)`, the velocity of the probability flow, for one point.
        half_score: `half_score(t, x)`, epsilon / 2 times the score, for one point.
        epsilon: variance of the reference at t = 1.
        substeps: Euler-Maruyama steps between two times of a grid.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.NeuralBridge(lambda t, x: jnp.ones_like(x), lambda t, x: jnp.zeros_like(x), 0.5, 4)
        >>> print(bridge.drift(0.5, jnp.zeros(2)))
        [1. 1.]
        >>> bridge.sample(jnp.zeros((3, 2)), jnp.array([0.5, 1.0]), key=jax.random.key(0)).shape
        (3, 2, 2)
    """

    flow: Callable[[Array, Array], Array]
    half_score: Callable[[Array, Array], Array]
    epsilon: Float[Array, ""] = eqx.field(metadata=FROZEN, converter=as_number)
    substeps: int = eqx.field(static=True, default=50)

    def drift(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The drift at time `t` and state `x`.

        Args:
            t: times in [0, 1], broadcast against the leading axes of `x`.
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """

        def at(t: Array, x: Array) -> Array:
            return self.flow(t, x) + self.half_score(t, x)

        x = as_floats(x)[0]
        return jnp.vectorize(at, signature="(),(d)->(d)")(jnp.asarray(t, x.dtype), x)

    def probability_flow(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The velocity of the ordinary differential equation with the same marginals.

        Args:
            t: times in [0, 1].
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """
        x = as_floats(x)[0]
        return jnp.vectorize(self.flow, signature="(),(d)->(d)")(jnp.asarray(t, x.dtype), x)

    def sample(
        self, x0: Shaped[ArrayLike, " *batch d"], ts: Real[ArrayLike, " n"], *, key: Key[Array, ""]
    ) -> Float[Array, " *batch n d"]:
        """Paths on the grid `ts` from `x0` at time 0, by Euler-Maruyama with `substeps` steps per interval.

        Args:
            x0: states at time 0, shape (..., d).
            ts: non-decreasing times in [0, 1], shape (n,).
            key: typed PRNG key.

        Returns:
            States at `ts`, shape (..., n, d).
        """
        check_key(key)
        check_times(ts)
        check_finite("x0", x0)
        x0 = as_floats(x0)[0]
        ts = jnp.asarray(ts, x0.dtype)
        # Paths start at 0, whether or not the grid does.
        knots = jnp.concatenate([jnp.zeros(1, x0.dtype), ts])

        def interval(x: Array, args: tuple[Array, Array, Key[Array, ""]]) -> tuple[Array, Array]:
            start, end, key = args

            def noise(i: Array) -> Array:
                return jr.normal(jr.fold_in(key, i), x.shape, x.dtype)

            x = euler_maruyama(self, x, start, (end - start) / self.substeps, self.substeps, noise)
            return x, x

        keys = jr.split(key, ts.shape[0])
        _, xs = jax.lax.scan(interval, x0, (knots[:-1], knots[1:], keys))
        return jnp.moveaxis(xs, 0, -2)


class _TimeMLP(eqx.Module):
    """A network of time and state for one point."""

    net: eqx.nn.MLP

    def __call__(self, t: Float[Array, ""], x: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.net(jnp.concatenate([jnp.broadcast_to(t, (1,)).astype(x.dtype), x]))


def _network(dim: int, key: Key[Array, ""]) -> _TimeMLP:
    return _TimeMLP(eqx.nn.MLP(dim + 1, dim, 64, 3, jax.nn.silu, key=key))


def sf2m(
    x0: Shaped[ArrayLike, " n d"],
    x1: Shaped[ArrayLike, " m _"],
    epsilon: Scalar,
    *,
    nets: tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]] | None = None,
    coupling: str = "sinkhorn",
    num_steps: int = 3000,
    learning_rate: Scalar = 2e-3,
    batch_size: int = 256,
    key: Key[Array, ""],
) -> FittedBridge:
    r"""Fit a neural bridge by score and flow matching: two regressions, no simulation.

    With $X_t = (1-t)x_0 + t x_1 + \sigma\sqrt{t(1-t)}\,\xi$ along pairs of the (minibatch) entropic plan, the flow
    regresses $\frac{1-2t}{2\sqrt{t(1-t)}}\sigma\xi + x_1 - x_0$ and the score $-\xi/(\sigma\sqrt{t(1-t)})$.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1, sigma^2.
        nets: two networks `(t, x) -> (d,)`, for the flow and for epsilon / 2 times the score; default two small MLPs.
        coupling: `sinkhorn` (the entropic plan of each batch), `independent` or `paired`.
        num_steps: optimizer steps.
        learning_rate: peak rate of AdamW, with cosine decay.
        batch_size: pairs per step.
        key: typed PRNG key.

    Returns:
        A `gk.Fitted` with the bridge as `.model` and the loss of each step, shape (num_steps,), as `.report`; it also
        unpacks as the two.

    Raises:
        ValueError: if epsilon is not positive or the ends differ in dimension.
        NonFiniteError: if the training diverges.

    Example:
        >>> import jax, genkit as gk
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> bridge, loss = gk.bridge.sf2m(x, x + 1.0, 0.5, num_steps=3, batch_size=16, key=jax.random.key(1))
        >>> bridge.drift(0.5, x).shape, loss.shape
        ((100, 2), (3,))

    Source: Tong et al., "Simulation-free Schrödinger bridges via score and flow matching", AISTATS 2024, equation 9.
    """
    check_key(key)
    check_epsilon(epsilon)
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    check_choice("coupling", coupling, COUPLINGS)
    x0, x1 = check_samples(x0, x1, 1, "diag")
    dim = x0.shape[1]
    epsilon = jnp.asarray(epsilon, x0.dtype)

    def build(key: Key[Array, ""]) -> NeuralBridge:
        """The bridge before training."""
        if nets is not None:
            return NeuralBridge(flow=nets[0], half_score=nets[1], epsilon=epsilon)
        key_flow, key_score = jr.split(key)
        return NeuralBridge(flow=_network(dim, key_flow), half_score=_network(dim, key_score), epsilon=epsilon)

    rate = CosineRate(jnp.asarray(learning_rate, x0.dtype), jnp.asarray(num_steps, x0.dtype))
    phase = Phase(ScoreAndFlowMatching(), CosineAdamW(rate).transformation())
    data = coupled_batches(coupling, x0, x1, epsilon, batch_size)
    fitted = fit(Recipe(build, data, phase, num_steps, name="sf2m"), key=key)
    warn_of_couplings(fitted.log)
    return FittedBridge.extend(fitted, report=jnp.asarray(fitted.log["loss"]))
