"""Search for a policy: which scale in which step, within a budget of evaluations."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from genkit._core._checks import check_count, check_finite, check_positive, fail
from genkit._core._fields import as_number
from genkit.guidance._linear import cfg
from genkit.guidance._unguided import conditions_in_turn, evaluations_per_step, guided_by, unguided_sampler
from genkit.sampling import AbstractSampler, Sampler, Table, sample
from genkit.training import Fitted, Objective, Phase, Recipe, fit, model_updates


# Weight of the entropy of the choices at the end of a search: enough to settle between options that are as good.
_ENTROPY_WEIGHT = 1e-2


class PolicyFit(Fitted):
    """Result of a policy search: a `genkit.Fitted` with the policy.

    Its `.model.logits` are the log-preferences `(num_steps, options)`; its `.log` holds, per update, the `loss` and its
    parts: `distance` to the draws of the baseline, `cost` (expected evaluations per draw) and `entropy`.

    Args:
        scales: the best scale of each step `(num_steps,)`; `cfg(fit.scales)` is the policy.
        options: the scales among which was chosen.
    """

    scales: Float[Array, " num_steps"]
    options: Float[Array, " options"]


class RelaxedPolicy(eqx.Module):
    """Preferences among scales for each step, and how often they were updated.

    Args:
        logits: log-preferences.
        updates: number of updates so far; an integer, which no optimizer moves.
    """

    logits: Float[Array, " num_steps options"]
    updates: Int[Array, ""]


class ClosestPolicy(Objective):
    """Distance of the draws of a relaxed policy to those of the baseline, within a budget of evaluations.

    Args:
        sampler: the unguided sampler.
        denoiser: the denoiser.
        cond: one condition per draw.
        keys: one key per draw, those of the baseline.
        baseline: draws under the full guidance.
        options: scales to choose from.
        evaluations: evaluations of each step without guidance.
        budget: wanted number of evaluations per draw.
        penalty: weight of what exceeds the budget.
        num_updates: number of updates over which the entropy is weighed up.
    """

    sampler: Sampler
    denoiser: Callable
    cond: Array
    keys: Key[Array, " n"]
    baseline: Float[Array, " n *shape"]
    options: Float[Array, " options"]
    evaluations: Float[Array, " num_steps"]
    budget: Float[Array, ""]
    penalty: Float[Array, ""]
    num_updates: Float[Array, ""]

    def __call__(
        self, model: RelaxedPolicy, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, PyTree]]:
        probs = jax.nn.softmax(model.logits)
        # Guidance is linear in its scale: the mean of the guided predictions over the options is the one at their mean.
        guided = guided_by(self.sampler, cfg(probs @ self.options))
        shape = self.baseline.shape[1:]
        draws = guided.draw(self.denoiser, self.keys, cond=self.cond, x_init=None, shape=shape).value
        distance = jnp.mean((draws - self.baseline) ** 2) / jnp.mean(self.baseline**2)
        # Scales 0 and 1 take one of the two predictions, all others both.
        passes = jnp.where((self.options == 0) | (self.options == 1), 1.0, 2.0)
        cost = jnp.sum(self.evaluations * (probs @ passes))
        excess = self.penalty * jnp.maximum(cost - self.budget, 0) / self.budget
        entropy = -jnp.mean(jnp.sum(probs * jax.nn.log_softmax(model.logits), axis=1))
        # At first the search looks around; weighed up over the updates, the entropy makes it end at choices.
        progress = model.updates.astype(entropy.dtype) / self.num_updates
        loss = distance + excess + _ENTROPY_WEIGHT * progress * entropy
        counted = model_updates(model, _updates_of, model.updates + 1)
        return loss, {"distance": distance, "cost": cost, "entropy": entropy, "updates": counted}


class Adam(eqx.Module):
    """Adam whose learning rate is an array leaf, so that another one compiles nothing.

    Args:
        learning_rate: the learning rate.
    """

    learning_rate: Float[Array, ""]

    def init(self, params: PyTree) -> PyTree:
        """Make the state before the first update."""
        return optax.adam(self.learning_rate).init(params)

    def update(self, updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        """Turn a gradient into an update."""
        return optax.adam(self.learning_rate).update(updates, state, params)


def search_policy(
    sampler: Table | AbstractSampler,
    denoiser: Callable,
    scale: Float[ArrayLike, ""] | float,
    num_samples: int,
    *,
    budget: Float[ArrayLike, ""] | float,
    cond: PyTree = None,
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
    to $10^{-2}$ during the search, so that it ends at choices. The search runs through `genkit.fit`.

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
        A `genkit.Fitted` with the policy found as `.scales`; `.log` holds the course of the search.

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
        >>> fit.scales.shape, fit.log["cost"].shape
        ((6,), (3,))

    Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
    section 3; structure of the search as published, details ours.
    """  # noqa: E501
    check_count("num_updates", num_updates)
    check_positive("budget", budget)
    if cond is None:
        fail("cond", "given, to guide towards it", cond)
    base = unguided_sampler(sampler)
    wanted = float(np.asarray(scale))
    if options is None:
        options = (0.0, 1.0, wanted / 2, wanted, 2 * wanted)
    levels = as_number(jnp.asarray(options))
    check_finite("options", levels)
    # `sample` checks key, conditions and shape, and draw i has the key fold_in(key, i), as below.
    baseline = sample(base, denoiser, num_samples, key=key, cond=cond, shape=shape, guidance=cfg(wanted)).value
    objective = ClosestPolicy(
        base,
        denoiser,
        conditions_in_turn(jnp.asarray(cond), num_samples),
        jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_samples)),
        baseline,
        levels,
        jnp.asarray(evaluations_per_step(base.table), levels.dtype),
        budget=jnp.asarray(budget, levels.dtype),
        penalty=jnp.asarray(penalty, levels.dtype),
        num_updates=jnp.asarray(num_updates, levels.dtype),
    )

    def build(key: Key[Array, ""]) -> RelaxedPolicy:
        """All options alike."""
        logits = jnp.zeros((base.table.num_steps, len(levels)), levels.dtype)
        return RelaxedPolicy(logits, jnp.zeros((), jnp.int32))

    phase = Phase(objective, Adam(jnp.asarray(learning_rate, levels.dtype)))
    found = fit(Recipe(build, _no_data, phase, num_updates, name="policy"), key=key)
    best = levels[jnp.argmax(found.model.logits, axis=1)]
    return PolicyFit.extend(found, scales=best, options=levels)


def _no_data(key: Key[Array, ""]) -> None:
    """The data of a search, whose draws are the same throughout."""


def _updates_of(model: RelaxedPolicy) -> PyTree:
    # `model_updates` asks this of a model without arrays, too.
    return model.updates
