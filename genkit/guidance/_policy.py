"""Search for a policy: which scale in which step, within a budget of evaluations."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check, check_count, check_finite, check_key, check_positive
from genkit.guidance._linear import cfg
from genkit.sampling import Sampler, as_sampler


class PolicyFit(eqx.Module):
    """What a policy search found.

    Args:
        scales: the best scale of each step `(num_steps,)`; `cfg(fit.scales)` is the policy.
        logits: log-preferences `(num_steps, options)`.
        options: the scales among which was chosen.
        loss: distance to the draws of the baseline during the search.
        cost: expected evaluations per draw during the search.
    """

    scales: Float[Array, " num_steps"]
    logits: Float[Array, " num_steps options"]
    options: Float[Array, " options"]
    loss: Float[Array, " updates"]
    cost: Float[Array, " updates"]


def search_policy(
    sampler: Any,
    denoiser: Callable,
    scale: Float[ArrayLike, ""] | float,
    num_samples: int,
    *,
    budget: Float[ArrayLike, ""] | float,
    cond: Any = None,
    shape: tuple[int, ...] | None = None,
    options: Sequence[float] | None = None,
    penalty: Float[ArrayLike, ""] | float = 1.0,
    num_updates: int = 200,
    learning_rate: float = 0.1,
    key: Key[Array, ""],
) -> PolicyFit:
    r"""Search the policy that stays closest to classifier-free guidance within a budget of evaluations.

    Each step chooses among scales $w_k$: 0 and 1 take one evaluation, the others two. With $p_{tk}$ a softmax of logits
    the relaxed policy guides step $t$ with scale $\sum_k p_{tk} w_k$ (guidance is linear in its scale, so that all options
    share two evaluations), and Adam minimizes

    $$E \|x_{relaxed} - x_{baseline}\|^2 / E\|x_{baseline}\|^2 + \lambda\, (cost - budget)_+ / budget + \text{entropy},$$

    the draws starting from equal noise. Gradients go through the whole draw. The entropy of $p$ is weighed up from 0
    to $10^{-2}$ during the search, so that it ends at choices.

    Args:
        sampler: a `Table`, or a `Sampler` without guidance, deterministic.
        denoiser: the denoiser.
        scale: scale $w$ of the baseline.
        num_samples: draws on which the distance is measured; the same throughout.
        budget: wanted number of evaluations per draw.
        cond: conditions: a scalar, or one per draw.
        shape: shape of one example, where the denoiser does not tell.
        options: scales to choose from; by default $0, 1, w/2, w, 2w$.
        penalty: $\lambda$.
        num_updates: number of updates of the logits.
        learning_rate: of Adam.
        key: typed PRNG key.

    Returns:
        The policy found and the course of the search.

    Raises:
        ValueError: for numbers out of range, without conditions, or if the sampler brings a guidance.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> law = gk.diffusion.MixtureDenoiser(
        ...     jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=jnp.array([0, 1])
        ... )
        >>> table = gk.diffusion.ddim(gk.diffusion.karras(6, 0.01, 10.0))
        >>> fit = gk.guidance.search_policy(
        ...     table, law, 3.0, 8, cond=1, budget=9.0, num_updates=3, key=jax.random.key(0)
        ... )
        >>> fit.scales.shape
        (6,)

    Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
    section 3; structure of the search as published, details ours.
    """  # noqa: E501
    check_key(key)
    check_count("num_samples", num_samples)
    check_count("num_updates", num_updates)
    check_positive("budget", budget)
    check(cond is not None, "cond", "given, to guide towards it", cond)
    base = as_sampler(sampler)
    plain = isinstance(base, Sampler) and base.guidance is None
    check(plain, "sampler", "a table or a table-driven sampler without guidance", type(base).__name__)
    assert isinstance(base, Sampler), "checked above"
    wanted = float(np.asarray(scale))
    levels = jnp.asarray([0.0, 1.0, wanted / 2, wanted, 2 * wanted] if options is None else options)
    check_finite("options", levels)
    shape = getattr(denoiser, "shape", None) if shape is None else shape
    if shape is None:
        raise ValueError("`shape` must be given where the denoiser does not tell it; got None.")
    labels = jnp.broadcast_to(jnp.asarray(cond), (num_samples,)) if jnp.ndim(cond) == 0 else jnp.asarray(cond)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_samples))
    rows = np.bincount(np.asarray(base.table.step), np.asarray(base.table.evaluate), base.table.num_steps)
    search = _Search(base, denoiser, labels, tuple(shape), levels, jnp.asarray(rows, levels.dtype))
    start = jnp.zeros((base.table.num_steps, len(levels)), levels.dtype)
    numbers = tuple(jnp.asarray(v, levels.dtype) for v in (wanted, budget, penalty, learning_rate))
    logits, (loss, cost) = _run(search, keys, start, numbers, num_updates)
    return PolicyFit(levels[jnp.argmax(logits, axis=1)], logits, levels, loss, cost)


class _Search(eqx.Module):
    """What does not change during a search."""

    sampler: Sampler
    denoiser: Callable
    cond: Array
    shape: tuple[int, ...] = eqx.field(static=True)
    options: Array
    rows: Array

    def draw(self, scales: Array, keys: Array) -> Array:
        """Draws under a table of scales."""
        guided = dataclasses.replace(self.sampler, guidance=cfg(scales), patterns=None)
        return guided.draw(self.denoiser, keys, cond=self.cond, x_init=None, shape=self.shape).value


@eqx.filter_jit
def _run(search: _Search, keys: Array, logits: Array, numbers: Any, num_updates: int) -> tuple[Array, Any]:
    """The whole search as one scan."""
    wanted, budget, penalty, learning_rate = numbers
    baseline = search.draw(jnp.full(len(logits), wanted), keys)
    passes = jnp.where((search.options == 0) | (search.options == 1), 1.0, 2.0)
    optimizer = optax.adam(learning_rate)

    def objective(logits: Array, progress: Array) -> tuple[Array, tuple[Array, Array]]:
        probs = jax.nn.softmax(logits)
        distance = jnp.mean((search.draw(probs @ search.options, keys) - baseline) ** 2) / jnp.mean(baseline**2)
        cost = jnp.sum(search.rows * (probs @ passes))
        over = penalty * jnp.maximum(cost - budget, 0) / budget
        entropy = -jnp.mean(jnp.sum(probs * jax.nn.log_softmax(logits), axis=1))
        return distance + over + 1e-2 * progress * entropy, (distance, cost)

    def update(state: Any, i: Array) -> tuple[Any, Any]:
        logits, moments = state
        gradient, seen = jax.grad(objective, has_aux=True)(logits, i / num_updates)
        change, moments = optimizer.update(gradient, moments)
        return (logits + change, moments), seen

    (logits, _), seen = jax.lax.scan(update, (logits, optimizer.init(logits)), jnp.arange(num_updates))
    return logits, seen
