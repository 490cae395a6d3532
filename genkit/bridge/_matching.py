"""Bridge matching: onto the light family from any plan, and with two networks ([SF]2M)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, ArrayLike, Float, Key, Real

from genkit._core._checks import check, check_choice, check_count, check_key, check_positive
from genkit._core._fields import FROZEN, as_number
from genkit.divergence import PointCost, sinkhorn_potentials

from ._bridge import AbstractBridge, Bridge, check_times
from ._closed_form import check_epsilon
from ._fit_light import KINDS, FitReport, check_finished, check_samples, judge, run_adam, start_bridge
from ._objectives import MatchingObjective, UnpairedBatches
from ._start import MAX_POINTS


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

    def __call__(self, key: Key[Array, ""]) -> tuple[Float[Array, " b d"], Float[Array, " b d"]]:
        """Draw one batch of pairs.

        Args:
            key: typed PRNG key.

        Returns:
            Starting points and end points.
        """
        key_batch, key_pair = jr.split(key)
        x0, x1 = self.batches(key_batch)
        log_a = jnp.full(x0.shape[0], -jnp.log(x0.shape[0]), x0.dtype)
        log_b = jnp.full(x1.shape[0], -jnp.log(x1.shape[0]), x1.dtype)
        # Pairs are drawn row by row, so a loose marginal is enough.
        state = sinkhorn_potentials(PointCost(x0, x1), log_a, log_b, self.epsilon, tolerance=1e-2, max_iterations=200)
        logits = jax.vmap(lambda x: (state.g - 0.5 * jnp.sum((x - x1) ** 2, -1)) / self.epsilon)(x0)
        return x0, x1[jr.categorical(key_pair, logits)]


def _batches(coupling, x0, x1, epsilon, batch_size):
    """The pairing of two sample sets by name."""
    if coupling == "paired":
        check(x0.shape == x1.shape, "x1", f"of shape {x0.shape}, one end per start", f"shape {x1.shape}")
        return PairedBatches(x0, x1, batch_size)
    unpaired = UnpairedBatches(x0, x1, batch_size)
    return unpaired if coupling == "independent" else SinkhornBatches(unpaired, epsilon)


COUPLINGS = ("independent", "sinkhorn", "paired")


def fit_matching(
    x0: Float[ArrayLike, " n d"],
    x1: Float[ArrayLike, " m _"],
    epsilon: Real[ArrayLike, ""],
    num_components: int,
    *,
    scale: str = "diag",
    coupling: str = "independent",
    num_steps: int = 5000,
    learning_rate: float = 2e-2,
    batch_size: int = 512,
    rank: int = 8,
    t_max: float = 0.99,
    key: Key[Array, ""],
) -> tuple[Bridge, FitReport]:
    """Fit a light bridge by bridge matching: one regression of its drift, from pairs of any plan (LightSB-M).

    The same family and minimizer as `fit_light`, with more variance per step; for data that come as pairs, or as a
    check of the other route.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        scale: covariance family.
        coupling: `independent`, `sinkhorn` (the entropic plan of each batch) or `paired` (row by row).
        num_steps: optimizer steps.
        learning_rate: as in `fit_light`.
        batch_size: pairs per step.
        rank: columns of the low-rank family.
        t_max: largest time of the regression.
        key: typed PRNG key.

    Returns:
        The bridge, and a `FitReport` whose objective is the regression loss.

    Raises:
        ValueError: as `fit_light`.
        NonFiniteError: if the fit diverges.

    Example:
        >>> import jax, genkit as gk
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> bridge, report = gk.bridge.fit_matching(x, x + 1.0, 0.5, 1, num_steps=5, key=jax.random.key(1))
        >>> report.objective.shape
        (5,)

    Source: Gushchin et al., "Light and optimal Schrödinger bridge matching", ICML 2024.
    """
    check_key(key)
    check_epsilon(epsilon)
    check_count("num_components", num_components)
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    check_choice("scale", scale, KINDS)
    check_choice("coupling", coupling, COUPLINGS)
    x0, x1 = check_samples(x0, x1, num_components, scale)
    key_order0, key_order1, key_start, key_steps, key_judge = jr.split(key, 5)
    epsilon = jnp.asarray(epsilon, x1.dtype)
    data = _batches(coupling, x0, x1, epsilon, batch_size)
    few = jr.permutation(key_order0, x0)[:MAX_POINTS], jr.permutation(key_order1, x1)[:MAX_POINTS]
    potential = start_bridge(*few, epsilon, num_components, scale=scale, init="balanced", rank=rank, key=key_start)
    potential, values, revived = run_adam(
        potential,
        data,
        MatchingObjective(t_max),
        jnp.asarray(learning_rate, x1.dtype),
        few,
        key_steps,
        num_steps=num_steps,
        guard=True,
        published=False,
    )
    check_finished(values, potential)
    return Bridge(potential), FitReport(values, *judge(potential, *few, key_judge), revived)


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

    flow: Callable[..., Any]
    half_score: Callable[..., Any]
    epsilon: Float[Array, ""] = eqx.field(metadata=FROZEN, converter=as_number)
    substeps: int = eqx.field(static=True, default=50)

    def drift(self, t: Real[ArrayLike, " ..."], x: Float[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The drift at time `t` and state `x`.

        Args:
            t: times in [0, 1], broadcast against the leading axes of `x`.
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """
        one = lambda t, x: self.flow(t, x) + self.half_score(t, x)
        return jnp.vectorize(one, signature="(),(d)->(d)")(jnp.asarray(t, jnp.asarray(x).dtype), x)

    def probability_flow(self, t: Real[ArrayLike, " ..."], x: Float[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The velocity of the ordinary differential equation with the same marginals.

        Args:
            t: times in [0, 1].
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """
        return jnp.vectorize(self.flow, signature="(),(d)->(d)")(jnp.asarray(t, jnp.asarray(x).dtype), x)

    def sample(
        self, x0: Float[ArrayLike, " *batch d"], ts: Real[ArrayLike, " n"], *, key: Key[Array, ""]
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
        x0 = jnp.asarray(x0)
        ts = jnp.asarray(ts, x0.dtype)
        knots = jnp.concatenate([jnp.zeros(1, x0.dtype), ts])

        def interval(x, args):
            t0, t1, key = args
            step = (t1 - t0) / self.substeps

            def euler(i, x):
                noise = jr.normal(jr.fold_in(key, i), x.shape, x.dtype)
                return x + step * self.drift(t0 + i * step, x) + jnp.sqrt(self.epsilon * step) * noise

            x = jax.lax.fori_loop(0, self.substeps, euler, x)
            return x, x

        keys = jr.split(key, ts.shape[0])
        _, xs = jax.lax.scan(interval, x0, (knots[:-1], knots[1:], keys))
        return jnp.moveaxis(xs, 0, -2)


class _TimeMLP(eqx.Module):
    """A network of time and state for one point."""

    net: eqx.nn.MLP

    def __call__(self, t, x):
        return self.net(jnp.concatenate([jnp.broadcast_to(t, (1,)).astype(x.dtype), x]))


def _sf2m_loss(bridge, x0, x1, key):
    """Flow and score regressions on one batch of pairs."""
    key_time, key_noise = jr.split(key)
    t = jr.uniform(key_time, (x0.shape[0], 1), x0.dtype, 1e-3, 1.0 - 1e-3)
    noise = jr.normal(key_noise, x0.shape, x0.dtype)
    std = jnp.sqrt(t * (1.0 - t))
    sigma = jnp.sqrt(bridge.epsilon)
    x = (1.0 - t) * x0 + t * x1 + sigma * std * noise
    flow_target = (1.0 - 2.0 * t) / (2.0 * std) * sigma * noise + x1 - x0
    flow, half_score = jax.vmap(bridge.flow)(t[:, 0], x), jax.vmap(bridge.half_score)(t[:, 0], x)
    score_error = 2.0 * std / sigma * half_score + noise
    return jnp.mean((flow - flow_target) ** 2) + jnp.mean(score_error**2)


@eqx.filter_jit
def _run_sf2m(bridge, data, key, rate, *, num_steps):
    """The training loop as one scan."""
    optimizer = optax.adamw(lambda step: rate * 0.5 * (1.0 + jnp.cos(jnp.pi * step / num_steps)), weight_decay=1e-5)
    params, rest = eqx.partition(bridge, eqx.is_inexact_array)
    frozen = lambda tree: eqx.tree_at(lambda b: b.epsilon, tree, replace_fn=jnp.zeros_like)

    def step(carry, index):
        params, state = carry
        key_batch, key_loss = jr.split(jr.fold_in(key, index))
        x0, x1 = data(key_batch)
        loss = lambda params: _sf2m_loss(eqx.combine(params, rest), x0, x1, key_loss)
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(frozen(gradient), state, params)
        return (optax.apply_updates(params, frozen(updates)), state), value

    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
    return eqx.combine(params, rest), values


def sf2m(
    x0: Float[ArrayLike, " n d"],
    x1: Float[ArrayLike, " m _"],
    epsilon: Real[ArrayLike, ""],
    *,
    nets: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    coupling: str = "sinkhorn",
    num_steps: int = 3000,
    learning_rate: float = 2e-3,
    batch_size: int = 256,
    key: Key[Array, ""],
) -> tuple[NeuralBridge, Float[Array, " num_steps"]]:
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
        The bridge, and the loss of each step, shape (num_steps,).

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
    data = _batches(coupling, x0, x1, epsilon, batch_size)
    key_flow, key_score, key_steps = jr.split(key, 3)
    if nets is None:
        make = lambda key: _TimeMLP(eqx.nn.MLP(dim + 1, dim, 64, 3, jax.nn.silu, key=key))
        nets = make(key_flow), make(key_score)
    bridge = NeuralBridge(*nets, epsilon)
    bridge, values = _run_sf2m(bridge, data, key_steps, jnp.asarray(learning_rate, x0.dtype), num_steps=num_steps)
    check_finished(values, bridge)
    return bridge, values
