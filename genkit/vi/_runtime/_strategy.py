"""The contract of gradient strategies, below the frames that ask them."""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Key, PyTree


def dice_factor(score: Array) -> Array:
    """One in value, the gradient of `score` in every derivative (the DiCE operator)."""
    return jnp.exp(score - stop_gradient(score))


class Attached(NamedTuple):
    """A drawn value and what must travel with it."""

    value: PyTree
    intermediates: PyTree = ()
    score: Array | None = None
    log_weight: Array | None = None
    baseline: PyTree = None


class Strategy(eqx.Module):
    r"""How the gradient passes through one sample site.

    `strategy(key, dist, k)` returns a scalar `s` with $E[s] = E_{v \sim q}[k(v)]$ and
    $E[\partial s] = \partial E_{v \sim q}[k(v)]$, where `k` may be called any number of times (also under `jax.vmap`).
    Subclass it to write your own, and override `check` to refuse distributions it cannot serve. `unbiased` is True if
    expected gradients are exact.
    """

    unbiased: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(
        self, key: Key[Array, ""], distribution: dist.Distribution, k: Callable[[PyTree], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """The surrogate of the site.

        Args:
            key: typed PRNG key of the site.
            distribution: the numpyro distribution of the site.
            k: the rest of the program as a function of the site's value.

        Returns:
            A scalar surrogate.
        """

    def check(self, distribution: dist.Distribution, address: str) -> None:
        """Raise for a distribution the strategy cannot serve; asked before the site is drawn.

        Args:
            distribution: the numpyro distribution of the site, without masks.
            address: the site's full address, for the message.
        """
        del distribution, address


class AbstractLocalStrategy(Strategy):
    """A strategy that needs only one continuation: it draws and attaches."""

    @abc.abstractmethod
    def attach(self, key: Key[Array, ""], distribution: dist.Distribution) -> Attached:
        """Draw a value of `distribution` together with the terms that must travel with it.

        Args:
            key: typed PRNG key of the site.
            distribution: the numpyro distribution of the site, without masks.

        Returns:
            The value, the distribution's intermediates, and optionally a score, a log-weight and a baseline.
        """

    def __call__(
        self, key: Key[Array, ""], distribution: dist.Distribution, k: Callable[[PyTree], Float[Array, ""]]
    ) -> Float[Array, ""]:
        """Run `k` at the drawn value and multiply what was attached."""
        got = self.attach(key, distribution)
        out = k(got.value)
        if got.log_weight is not None:
            out = out * jnp.exp(got.log_weight)
        if got.score is None:
            return out
        factor = dice_factor(jnp.sum(got.score))
        out = out * factor
        if got.baseline is not None:
            out = out + jnp.sum(stop_gradient(got.baseline)) * (1 - factor)
        return out
