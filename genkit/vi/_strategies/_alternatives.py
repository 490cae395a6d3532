"""Gradient strategies that evaluate the rest of the program several times."""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from genkit._core._checks import check_count
from genkit.vi._runtime._distributions import (
    is_finite,
    joint_support,
    lane_log_probs,
    lane_shape,
    lane_support,
    support_size,
)
from genkit.vi._runtime._enumeration import draw_from, many
from genkit.vi._runtime._strategy import Strategy, dice_factor
from genkit.vi._strategies._single import bernoulli_logits, is_bernoulli, refuse


class Enum(Strategy):
    r"""Exact summation over the support, $\sum_v q(v)\,k(v)$: no variance, all orders of derivative.

    The support is the joint one of all lanes of the site: $K^L$ outcomes. Inside `gk.vi.scan`, `vmap` and `cond` the
    joint sum over steps would be too large, and each lane is enumerated in turn (see `LocalExpectation`).

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Enum())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0
    """

    def __call__(
        self, key: Key[Array, ""], distribution: dist.Distribution, k: Callable[[PyTree], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """Sum over the joint support."""
        del key
        support = joint_support(distribution, support_size(distribution))
        log_q = jax.vmap(lambda v: jnp.sum(distribution.log_prob(v)))(support)
        return jnp.sum(jnp.exp(log_q) * many(k, support))

    def check(self, distribution: dist.Distribution, address: str) -> None:
        """Refuse distributions without a finite support."""
        if not is_finite(distribution):
            refuse(
                self,
                distribution,
                address,
                "needs a finite support",
                "Use Reparam() if it is continuous, else RLOO(2).",
            )


class RLOO(Strategy):
    r"""Score gradient with a leave-one-out baseline over `num_samples` runs of the rest of the program.

    $\frac1n\sum_i k_i + \frac1n\sum_i (k_i - \frac1{n-1}\sum_{j\ne i}k_j)\,\nabla\log q(v_i)$. Every further RLOO site
    met in those runs joins the same group, so a program with many such sites still runs `num_samples` times.

    Args:
        num_samples: number of runs, at least 2.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.RLOO(2))
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Kool, van Hoof & Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019, equation 6.
    """

    num_samples: int = eqx.field(static=True, default=2)

    def __check_init__(self) -> None:
        """Validate the number of runs."""
        check_count("num_samples", self.num_samples, 2)

    def __call__(
        self, key: Key[Array, ""], distribution: dist.Distribution, k: Callable[[PyTree], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """Draw `num_samples` values of this one site and use each other as baselines."""
        keys = jax.random.split(key, self.num_samples)
        draws = many(lambda one: stop_gradient(draw_from(distribution, one)[0]), keys)
        values = many(k, draws)
        log_q = jax.vmap(lambda v: jnp.sum(distribution.log_prob(v)))(draws)
        return jnp.sum(leave_one_out(values, log_q))


def leave_one_out(values: Array, scores: Array) -> Array:
    """The mean over the leading axis with leave-one-out score terms; `scores` has the shape of `values`."""
    n = values.shape[0]
    fixed = stop_gradient(values)
    others = (jnp.sum(fixed, 0) - fixed) / (n - 1)
    return jnp.mean(values + (fixed - others) * (scores - stop_gradient(scores)), 0)


class Alternatives(NamedTuple):
    """A drawn outcome and what it is compared with.

    Attributes:
        value: the drawn outcome.
        alts: the alternatives, (A, *shape).
        coefficients: zero-valued weights that carry the gradient, (A,).
        score: the score of parameters the alternatives do not cover, or None.
    """

    value: Array
    alts: Array
    coefficients: Array
    score: ArrayLike | None = None


class AbstractAlternatives(Strategy):
    r"""A strategy that compares the drawn outcome with alternatives: $k(v) + \sum_a c_a\,(k(v_a) - k(v))$.

    The coefficients are zero in value and carry the gradient. These strategies also work inside `gk.vi.scan`, `vmap`
    and `cond`: the loop is replayed once per step and alternative, with common random numbers downstream.
    """

    @abc.abstractmethod
    def alternatives(self, key: Key[Array, ""], distribution: dist.Distribution) -> Alternatives:
        """Draw the base outcome and its alternatives.

        Args:
            key: typed PRNG key of the site.
            distribution: the numpyro distribution of the site, without masks.

        Returns:
            The value, the alternatives, their coefficients, and a score (or None) for other parameters.
        """

    @property
    @abc.abstractmethod
    def keep_gradient(self) -> bool:
        """True if alternatives are differentiated too (exact second derivatives where the density is linear)."""

    def __call__(
        self, key: Key[Array, ""], distribution: dist.Distribution, k: Callable[[PyTree], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """Evaluate the base outcome and all alternatives."""
        value, alts, coefficients, score = self.alternatives(key, distribution)
        base = k(value)
        out = base + contrast(base, many(k, alts), coefficients, self.keep_gradient)
        return out if score is None else out * dice_factor(jnp.sum(score))


def contrast(base: Array, values: Array, coefficients: Array, keep_gradient: bool) -> Array:
    """The weighted differences to the base outcome: zero in value, the gradient in derivative."""
    differences = values - base
    if not keep_gradient:
        differences = stop_gradient(differences)
    return jnp.sum(coefficients * differences)


def lane_alternatives(value: Array, distribution: dist.Distribution) -> tuple[Array, Array]:
    """Every single-lane change of `value`, (L * (K-1), *shape), and its zero-valued coefficients."""
    support = lane_support(distribution)
    shape = lane_shape(distribution)
    count = support.shape[0]
    size = value.size
    # By comparison, not by value: outcomes need not be 0, 1, 2, ...
    index = jnp.argmax(value.reshape(-1)[:, None] == support, -1)  # (L,)
    shifted = (index[:, None] + jnp.arange(1, count)) % count  # (L, K-1)
    other = support[shifted]
    flat = value.reshape(-1)
    lane = jnp.arange(size)
    alts = jnp.where(
        lane[:, None, None] == lane[None, None, :], other[:, :, None], flat[None, None, :]
    )  # (L, K-1, L): lane l replaced
    log_probs = jax.vmap(lambda v: lane_log_probs(distribution, jnp.broadcast_to(v, shape)), out_axes=-1)(support)
    probs = jnp.exp(log_probs).reshape(size, count)
    chosen = jnp.take_along_axis(probs, shifted, 1)
    return alts.reshape(-1, *shape).astype(value.dtype), (chosen - stop_gradient(chosen)).reshape(-1)


class LocalExpectation(AbstractAlternatives):
    r"""Enumerate one lane at a time: $L (K-1)$ further runs instead of $K^L$.

    $k(v) + \sum_l \sum_c \dot q_l(c)\,k(v_l = c, v_{-l})$: the value is a one-draw estimate, the gradient of each lane
    is summed exactly given the others.

    Args:
        second_order: differentiate the alternatives too (costlier).

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.LocalExpectation())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Titsias & Lazaro-Gredilla, "Local Expectation Gradients", NeurIPS 2015, equation 6.
    """

    second_order: bool = eqx.field(static=True, default=False)

    @property
    def keep_gradient(self) -> bool:
        """True if the alternatives are differentiated."""
        return self.second_order

    def alternatives(self, key: Key[Array, ""], distribution: dist.Distribution) -> Alternatives:
        """The draw and all its single-lane changes."""
        value = stop_gradient(draw_from(distribution, key)[0])
        return Alternatives(value, *lane_alternatives(value, distribution))

    def check(self, distribution: dist.Distribution, address: str) -> None:
        """Refuse distributions without a finite support."""
        if not is_finite(distribution):
            refuse(self, distribution, address, "needs a finite support", "Use MVD(), RLOO(2) or Score().")


class DisARM(Strategy):
    r"""Antithetic pairs for Bernoulli sites, one pair whatever the number of lanes.

    With $u$ uniform, $b = 1[u > \sigma(-\eta)]$ and $\tilde b = 1[1-u > \sigma(-\eta)]$, the gradient in the logits is
    $\tfrac12 (k(b) - k(\tilde b))\,(-1)^{\tilde b}\,1[b \ne \tilde b]\,\sigma(|\eta|)$. First-order only.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> cost = lambda p: 1.0 + 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.DisARM())
        >>> round(float(jax.grad(vi.exact(cost))(0.3)), 5)
        2.0

    Source: Dong, Mnih & Tucker, "DisARM: An Antithetic Gradient Estimator for Binary Latent Variables", NeurIPS 2020,
    equation 8.
    """

    def __call__(
        self, key: Key[Array, ""], distribution: dist.Distribution, k: Callable[[PyTree], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """Evaluate the pair."""
        eta = bernoulli_logits(distribution)
        prob = stop_gradient(jax.nn.sigmoid(eta))
        both = 1 - 2 * jnp.minimum(prob, 1 - prob)  # probability that the two agree
        # states: 0 agree, 1 (b, b~) = (1, 0), 2 (0, 1); drawn directly so that `exact` can enumerate the pair
        probs = jnp.stack([both, (1 - both) / 2, (1 - both) / 2], -1)
        state, _ = draw_from(dist.Categorical(probs=probs), key)
        agreed = prob > 0.5
        dtype = jnp.result_type(jnp.int32)
        first = jnp.where(state == 0, agreed, state == 1).astype(dtype)
        second = jnp.where(state == 0, agreed, state == 2).astype(dtype)
        left, right = many(k, jnp.stack([first, second]))
        sign = jnp.where(second == 1, -1.0, 1.0) * (first != second)
        slope = 0.5 * (left - right) * sign * jax.nn.sigmoid(jnp.abs(eta))
        return 0.5 * (left + right) + jnp.sum(stop_gradient(slope) * (eta - stop_gradient(eta)))

    def check(self, distribution: dist.Distribution, address: str) -> None:
        """Refuse everything but Bernoulli distributions."""
        if not is_bernoulli(distribution):
            refuse(
                self,
                distribution,
                address,
                "serves Bernoulli distributions only",
                "Use LocalExpectation(), Enum() or RLOO(2).",
            )
