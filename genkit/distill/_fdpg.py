"""f-DPG: any f-divergence between a policy and a target that can be evaluated, by the score-function gradient."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree, Shaped

from genkit._core._checks import check, check_count, check_finite, check_interval
from genkit._core._fields import FROZEN, as_number
from genkit._core._known import float_dtype
from genkit.distill._objectives import cosine_adam
from genkit.divergence import FDivergence, diagnose
from genkit.training import Objective, Phase, Recipe, model_updates


def fdpg(
    policy_log_prob: Shaped[ArrayLike, " n"],
    target_log_prob: Shaped[ArrayLike, " n"],
    *,
    divergence: FDivergence,
    proposal_log_prob: Shaped[ArrayLike, " n"] | None = None,
    log_z: Float[ArrayLike, ""] | float | None = None,
    baseline: Float[ArrayLike, ""] | float | None = None,
) -> Float[Array, ""]:
    r"""The loss of f-DPG at draws of a proposal: its value estimates $D_f(p \| \pi)$, its gradient the divergence's.

    $$\nabla D_f = -E_a\Big[\frac{\pi}{a}\,(R(u) - b)\,\nabla\log\pi\Big], \qquad u = \log\frac{P}{Z\,\pi},$$

    with $R = r f' - f$. It needs no gradient of the target and no differentiable draws, so total variation works too.

    Args:
        policy_log_prob: log-probability of each draw under the policy $\pi$, differentiable, `(n,)`.
        target_log_prob: of the target, known up to a constant, `(n,)`.
        divergence: any f-divergence.
        proposal_log_prob: of the proposal the draws came from, `(n,)`; `None` where that is the policy.
        log_z: log of the normalizer of the target; `None` estimates it from the draws, with a bias of O(1/n).
        baseline: b, any constant that does not depend on these draws; `None` is R at ratio 1, which leaves no variance
            where policy and target agree.

    Returns:
        A scalar to minimize.

    Raises:
        ValueError: for shapes that differ, no draws, or a target that is NaN.
        NonFiniteError: for log-probabilities of draws that are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> target = jnp.log(jnp.array([0.2, 0.8]))
        >>> def loss(logits):  # both outcomes once, weighed by a uniform proposal: the exact gradient
        ...     return gk.distill.fdpg(jax.nn.log_softmax(logits), target, divergence=gk.divergence.ForwardKL(),
        ...                            proposal_log_prob=jnp.log(jnp.full(2, 0.5)), log_z=0.0)
        >>> jax.grad(loss)(jnp.zeros(2)).round(3).tolist()
        [0.30000001192092896, -0.30000001192092896]

    Source: Go et al., "Aligning Language Models with Preferences through f-divergence Minimization", ICML 2023, theorem
    1.
    """
    check_finite("policy_log_prob", policy_log_prob, "These are draws of the policy, or of a proposal within it.")
    # A target of probability zero is a constraint; NaN is not.
    check_interval("target_log_prob", target_log_prob, hi=np.inf, open_hi=True)
    check(np.shape(policy_log_prob)[:1] != (0,), "policy_log_prob", "of at least one draw", policy_log_prob)
    policy = jnp.asarray(policy_log_prob, float_dtype(policy_log_prob))
    target = jnp.asarray(target_log_prob, policy.dtype)
    seen = jax.lax.stop_gradient(policy)
    proposal = seen
    if proposal_log_prob is not None:
        check_finite("proposal_log_prob", proposal_log_prob)
        proposal = jnp.asarray(proposal_log_prob, policy.dtype)
    for name, value in (("target_log_prob", target), ("proposal_log_prob", proposal)):
        fits = value.shape == policy.shape
        check(fits, name, lambda: f"of shape {policy.shape}, as `policy_log_prob`", value)
    if log_z is not None:
        check_finite("log_z", log_z)
    else:
        log_z = log_mean_exp(target - proposal)
    u = jax.lax.stop_gradient(target - jnp.asarray(log_z, policy.dtype) - seen)
    if baseline is None:
        baseline = divergence.reward(jnp.zeros((), u.dtype))
    # One on policy; importance weights of draws that came from elsewhere.
    weight = jnp.exp(seen - jax.lax.stop_gradient(proposal))
    surrogate = -jnp.mean(weight * (divergence.reward(u) - jnp.asarray(baseline, u.dtype)) * policy)
    value = jnp.mean(weight * divergence.phi(u))
    # Beside an infinite surrogate the value would be NaN.
    check_finite("divergence(u)", value, "The target gives a draw no probability: take ForwardKL() or JensenShannon().")
    return value + surrogate - jax.lax.stop_gradient(surrogate)


def log_mean_exp(values: Array) -> Array:
    """The logarithm of a mean of exponentials, without gradient."""
    return jax.lax.stop_gradient(jax.nn.logsumexp(values) - jnp.log(values.shape[0]))


class AbstractPolicy(eqx.Module):
    """A distribution that can be drawn from and evaluated, for f-DPG."""

    @abc.abstractmethod
    def sample(self, num_samples: int, *, key: Key[Array, ""]) -> Array:
        """Draw.

        Args:
            num_samples: number of draws.
            key: typed PRNG key.

        Returns:
            Draws with leading axis `num_samples`.
        """

    @abc.abstractmethod
    def log_prob(self, x: Array) -> Float[Array, ""]:
        """Log-probability of one draw.

        Args:
            x: one draw.

        Returns:
            A scalar, differentiable in the parameters.
        """


class LawPolicy(AbstractPolicy):
    """A policy given by a numpyro distribution of its parameters: categorical, binomial, Gaussian, ...

    Args:
        make: function from the parameters to a numpyro distribution.
        params: the parameters, any tree of arrays.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> policy = gk.distill.LawPolicy(lambda logits: dist.Categorical(logits=logits), jnp.zeros(3))
        >>> policy.sample(5, key=jax.random.key(0)).shape, round(float(policy.log_prob(jnp.array(1))), 3)
        ((5,), -1.099)
    """

    make: Callable[..., dist.Distribution] = eqx.field(static=True)
    params: PyTree[Array]

    def sample(self, num_samples: int, *, key: Key[Array, ""]) -> Array:
        return self.make(self.params).sample(key, (num_samples,))

    def log_prob(self, x: Array) -> Float[Array, ""]:
        return jnp.sum(self.make(self.params).log_prob(x))


class AutoregressivePolicy(AbstractPolicy):
    """A policy over sequences of tokens: a gated recurrent unit that reads the token before.

    Args:
        num_tokens: size of the vocabulary.
        length: tokens in a sequence.
        width: size of the recurrent state.
        key: typed PRNG key.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> policy = gk.distill.AutoregressivePolicy(2, 5, width=8, key=jax.random.key(0))
        >>> x = policy.sample(3, key=jax.random.key(1))
        >>> x.shape, round(float(policy.log_prob(x[0])), 3)
        ((3, 5), -3.466)
    """

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    num_tokens: int = eqx.field(static=True)
    length: int = eqx.field(static=True)

    def __init__(self, num_tokens: int, length: int, *, width: int = 32, key: Key[Array, ""]):
        check_count("num_tokens", num_tokens, 2)
        check_count("length", length)
        key_cell, key_head = jr.split(key)
        self.cell = eqx.nn.GRUCell(num_tokens + 1, width, key=key_cell)
        head = eqx.nn.Linear(width, num_tokens, key=key_head)
        # Uniform at first.
        zeros = jnp.zeros_like(head.weight), jnp.zeros(num_tokens)
        self.head = eqx.tree_at(lambda layer: (layer.weight, layer.bias), head, zeros)
        self.num_tokens = num_tokens
        self.length = length

    def _advance(self, state: Array, token: Array) -> tuple[Array, Array]:
        state = self.cell(jax.nn.one_hot(token, self.num_tokens + 1), state)
        return state, jax.nn.log_softmax(self.head(state))

    def sample(self, num_samples: int, *, key: Key[Array, ""]) -> Int[Array, " n length"]:

        def step(carry: tuple[Array, Array], noise: Array) -> tuple[tuple[Array, Array], Array]:
            state, token = carry
            state, logits = self._advance(state, token)
            token = jnp.argmax(logits + noise)
            return (state, token), token

        def one(noise: Array) -> Array:
            # The token after the vocabulary's last stands for the beginning. The greatest of logits under Gumbel noise
            # is a draw of their categorical distribution.
            begin = jnp.zeros(self.cell.hidden_size), jnp.asarray(self.num_tokens)
            return jax.lax.scan(step, begin, noise)[1]

        return jax.vmap(one)(jr.gumbel(key, (num_samples, self.length, self.num_tokens)))

    def log_prob(self, x: Int[Array, " length"]) -> Float[Array, ""]:
        before = jnp.concatenate([jnp.asarray([self.num_tokens]), x[:-1]])
        begin = jnp.zeros(self.cell.hidden_size)
        logits = jax.lax.scan(lambda state, token: self._advance(state, token), begin, before)[1]
        return jnp.sum(jnp.take_along_axis(logits, x[:, None], axis=1))


class Tracked(eqx.Module):
    """A policy with the running estimates of f-DPG, written by its objective.

    Args:
        policy: the policy.
        log_z: log of the running mean of target over policy.
        baseline: running mean of the reward.
        count: updates so far.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> policy = gk.distill.LawPolicy(lambda logits: dist.Categorical(logits=logits), jnp.zeros(3))
        >>> int(gk.distill.Tracked(policy).count)
        0
    """

    policy: AbstractPolicy
    log_z: Float[Array, ""] = eqx.field(default_factory=lambda: jnp.zeros(()), metadata=FROZEN)
    baseline: Float[Array, ""] = eqx.field(default_factory=lambda: jnp.zeros(()), metadata=FROZEN)
    count: Int[Array, ""] = eqx.field(default_factory=lambda: jnp.zeros((), jnp.int32), metadata=FROZEN)


class FDPG(Objective):
    r"""f-DPG on policy, with a running normalizer and a running baseline, both of earlier draws alone.

    Args:
        divergence: any f-divergence.
        target: `target(x) -> log P(x)` of one draw, up to a constant.
        num_draws: draws per update.
        decay: of the running means of $P/\pi$ and of the reward, in [0, 1).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> policy = gk.distill.LawPolicy(lambda logits: dist.Categorical(logits=logits), jnp.zeros(3))
        >>> objective = gk.distill.FDPG(gk.divergence.ForwardKL(), lambda x: jnp.log(1.0 + x), num_draws=16)
        >>> value, aux = objective(gk.distill.Tracked(policy), None, key=jax.random.key(0))
        >>> sorted(aux)
        ['divergence', 'ess', 'log_z', 'updates']

    Source: Go et al., "Aligning Language Models with Preferences through f-divergence Minimization", ICML 2023,
    algorithm 1.
    """

    divergence: FDivergence
    target: Callable[[Array], Array]
    num_draws: int = eqx.field(static=True, default=256)
    decay: Float[Array, ""] = eqx.field(converter=as_number, default=0.95)

    def __check_init__(self):
        check_count("num_draws", self.num_draws, 2)
        check_interval("decay", self.decay, 0, 1, open_hi=True)

    def __call__(
        self, model: Tracked, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Estimate the loss; see `gk.Objective`. The batch is not used."""
        # The score-function gradient knows nothing of how draws move with the parameters.
        x = jax.lax.stop_gradient(model.policy.sample(self.num_draws, key=key))
        policy = jax.vmap(model.policy.log_prob)(x)
        seen = jax.lax.stop_gradient(policy)
        target = jax.vmap(self.target)(x).astype(policy.dtype)
        mine = log_mean_exp(target - seen)
        # Nothing ran before the first step: it stands on its own draws.
        first = model.count == 0
        log_z = jnp.where(first, mine, model.log_z.astype(mine.dtype))
        u = target - log_z - seen
        rewards = self.divergence.reward(u)
        at_one = self.divergence.reward(jnp.zeros((), u.dtype))
        baseline = jnp.where(first, at_one, model.baseline.astype(u.dtype))
        value = fdpg(policy, target, divergence=self.divergence, log_z=log_z, baseline=baseline)
        # In logarithms: P / pi may be beyond any float.
        keep = jnp.where(first, 0, self.decay.astype(u.dtype))
        fresh = (
            jnp.logaddexp(jnp.log(keep) + log_z, jnp.log1p(-keep) + mine).astype(model.log_z.dtype),
            (keep * baseline + (1 - keep) * jnp.mean(rewards)).astype(model.baseline.dtype),
            model.count + 1,
        )
        updates = model_updates(model, lambda m: (m.log_z, m.baseline, m.count), fresh)
        # Float32 ends at e^88.
        weights = jnp.exp(jnp.minimum(u, 80.0))
        aux = {"divergence": jax.lax.stop_gradient(value), "log_z": log_z, "ess": diagnose(u, weights)["ess"]}
        return value, aux | {"updates": updates}


def _policy(model: Tracked) -> AbstractPolicy:
    return model.policy


class _Nothing(eqx.Module):
    """No data."""

    def __call__(self, key: Key[Array, ""]) -> None:
        return


def policy_recipe(
    policy: AbstractPolicy,
    target: Callable[[Array], Array],
    *,
    divergence: FDivergence,
    num_steps: int,
    num_draws: int = 256,
    optimizer: optax.GradientTransformation | None = None,
    decay: Float[ArrayLike, ""] | float = 0.95,
    name: str = "fdpg",
) -> Recipe:
    """f-DPG as a recipe for `gk.fit` and the command line.

    Args:
        policy: the policy to start from.
        target: `target(x) -> log P(x)` of one draw, up to a constant.
        divergence: any f-divergence.
        num_steps: updates.
        num_draws: draws per update.
        optimizer: default Adam with a cosine from 2e-2.
        decay: of the running normalizer and baseline.
        name: what the log calls it.

    Returns:
        A recipe whose model is a `Tracked` policy.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> policy = gk.distill.LawPolicy(lambda logits: dist.Categorical(logits=logits), jnp.zeros(3))
        >>> recipe = gk.distill.policy_recipe(policy, lambda x: jnp.log(1.0 + x), divergence=gk.divergence.JensenShannon(),
        ...                                   num_steps=10)
        >>> recipe.num_steps
        10
    """  # noqa: E501
    check(isinstance(policy, AbstractPolicy), "policy", "a policy, such as LawPolicy", type(policy).__name__)
    check(callable(target), "target", "a function `x -> log P(x)`", target)
    phase = Phase(FDPG(divergence, target, num_draws, decay), optimizer or cosine_adam(2e-2, num_steps), where=_policy)
    return Recipe(lambda key: Tracked(policy), _Nothing(), phase, num_steps, name=name)
