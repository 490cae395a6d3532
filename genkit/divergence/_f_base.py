"""f-divergences through one function of the log-ratio."""

import abc
from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from .._core._checks import check_finite, check_interval, is_concrete
from ._ratios import self_normalize


class FDivergence(eqx.Module):
    r"""An f-divergence $D_f(p \| q) = E_q f(p/q)$, given by $\phi(u) = f(e^u)$ with $u = \log p/q$.

    From $\phi$ follow, with $r = e^u$: the weight $h = r^2 f'' = \phi'' - \phi'$ of pathwise gradients, the reward
    $R = r f' - f = \phi' - \phi$ of score-function gradients, and the critic $f' = e^{-u}\phi'$ of the dual bound
    $E_p T - E_q f^*(T)$, where $f^*(f'(r)) = R$. All act elementwise.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> float(divergence.ForwardKL().weight(jnp.log(3.0)))
        3.0

    Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, section 3; dual
    form: Nowozin, Cseke & Tomioka, "f-GAN", NeurIPS 2016, equation 4.
    """

    @abc.abstractmethod
    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$f(e^u)$.

        Args:
            u: log-ratios log p/q.

        Returns:
            The integrand, elementwise.
        """

    @property
    @abc.abstractmethod
    def pathwise(self) -> bool:
        """Whether pathwise gradients exist (False where f has a kink)."""

    @abc.abstractmethod
    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$h = r^2 f''(r)$, the weight of pathwise gradients.

        Args:
            u: log-ratios log p/q.

        Returns:
            Non-negative weights.

        Raises:
            ValueError: where f has a kink.
        """

    @abc.abstractmethod
    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$R = r f'(r) - f(r)$, the reward of score-function gradients, $f^*(f'(r))$ of the dual bound.

        Args:
            u: log-ratios log p/q.

        Returns:
            Rewards.
        """

    def critic(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$f'(r)$, the optimal critic of the dual bound.

        Args:
            u: log-ratios log p/q.

        Returns:
            Critic values.
        """
        u = jnp.asarray(u)
        return jnp.exp(-u) * slope(self.phi, u)

    def value(
        self, log_p: Float[ArrayLike, " n"], log_q: Float[ArrayLike, " n"], *, normalize: bool = False
    ) -> Float[Array, ""]:
        r"""Monte-Carlo estimate $\frac1n \sum_i \phi(\log p(x_i) - \log q(x_i))$ of $D_f(p \| q)$.

        Args:
            log_p: log-density of p at draws of q, `(n,)`.
            log_q: log-density of q at the same draws.
            normalize: subtract the logarithm of the mean ratio first, for a `log_p` known up to a constant; the
                estimate is then biased by O(1/n).

        Returns:
            The estimate, a scalar.

        Raises:
            NonFiniteError: if a ratio overflows, naming what to do.
        """
        u = jnp.asarray(log_p) - jnp.asarray(log_q)
        result = jnp.mean(self.phi(self_normalize(u) if normalize else u))
        top = f"The largest log-ratio is {np.max(np.asarray(u)):.4g}: q" if is_concrete(u) else "Here q"
        hint = f"{top} has no mass where p has some. Try a divergence of bounded weight, such as JensenShannon()."
        check_finite("value", result, hint)
        return result

    def bound(self, u_on_p: Float[ArrayLike, " n"], u_on_q: Float[ArrayLike, " m"]) -> Float[Array, ""]:
        r"""The lower bound $E_p[T] - E_q[f^*(T)]$ of $D_f(p \| q)$ for the critic $T = f'(e^u)$.

        It is tight where u is the true log-ratio; maximized over a network u(x) it estimates divergence and ratio.

        Args:
            u_on_p: estimated log-ratios at draws of p, `(n,)`.
            u_on_q: estimated log-ratios at draws of q, `(m,)`.

        Returns:
            The bound, a scalar.
        """
        return jnp.mean(self.critic(u_on_p)) - jnp.mean(self.reward(u_on_q))

    def skew(self, share: Any = 0.5) -> "FDivergence":
        r"""The divergence from p to a mixture, $D_f(p \| \pi p + (1 - \pi) q)$: bounded, and finite for any p and q.

        Args:
            share: $\pi$, the share of p in the mixture, in [0, 1).

        Returns:
            The skewed divergence of p and q.
        """
        check_interval("share", share, 0, 1, open_hi=True)
        return Skewed(self, share)

    def dual(self) -> "FDivergence":
        r"""The divergence with its arguments exchanged, $\tilde f(r) = r f(1/r)$.

        Returns:
            The dual divergence: its weight is $e^u h(-u)$.
        """
        return Dual(self)

    def __add__(self, other: "FDivergence") -> "FDivergence":
        """The sum of two divergences."""
        return Combination((self, other), jnp.ones(2)) if isinstance(other, FDivergence) else NotImplemented

    def __mul__(self, factor: Any) -> "FDivergence":
        """A non-negative multiple."""
        if isinstance(factor, FDivergence):
            return NotImplemented
        factor = jnp.asarray(factor, float)
        check_interval("factor", factor, 0)
        return Combination((self,), factor[None])

    def __rmul__(self, factor: Any) -> "FDivergence":
        """A non-negative multiple."""
        return self * factor


def slope(phi: Callable, u: Any) -> Any:
    """The derivative of an elementwise function."""
    u = jnp.asarray(u, jnp.result_type(float))
    return jax.jvp(phi, (u,), (jnp.ones_like(u),))[1]


def curvature(phi: Callable, u: Any) -> Any:
    """Phi'' - phi'."""
    u = jnp.asarray(u, jnp.result_type(float))
    first = lambda x: slope(phi, x)
    return slope(first, u) - first(u)


def refuse_kink(name: str) -> NoReturn:
    """One voice for divergences without a pathwise gradient."""
    raise ValueError(
        f"`{name}` must have a smooth f for pathwise gradients; its f has a kink, so the weight is zero almost "
        "everywhere. Use TotalVariation(smoothing=...), another divergence, or score-function gradients (reward)."
    )


class Dual(FDivergence):
    """A divergence with its arguments exchanged; made by `dual`.

    Args:
        base: the divergence to exchange the arguments of.
    """

    base: FDivergence

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The base at the inverse ratio, times the ratio."""
        u = jnp.asarray(u)
        return jnp.exp(u) * self.base.phi(-u)

    @property
    def pathwise(self) -> bool:
        """As the base."""
        return self.base.pathwise

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """e^u h(-u) of the base."""
        u = jnp.asarray(u)
        return jnp.exp(u) * self.base.weight(-u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Phi' - phi, which is minus the base's critic at -u."""
        return -self.base.critic(-jnp.asarray(u))


class Skewed(FDivergence):
    r"""A divergence to a mixture of both laws; made by `skew`.

    With $m = \pi r + 1 - \pi$, the ratio to the mixture is $v = r/m$, and $\phi = m\,\phi_0(\log v)$,
    $h = (1-\pi)^2 h_0(\log v)/m$, $R = (1 - \pi) R_0(\log v)$.

    Args:
        base: the divergence.
        share: share of p in the mixture.
    """

    base: FDivergence
    share: Shaped[Array, ""] = eqx.field(converter=jnp.asarray)

    def _log_mixture(self, u: Any) -> Any:
        return jnp.logaddexp(jnp.log(self.share) + u, jnp.log1p(-self.share))

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The base at the ratio to the mixture, times the mixture over q."""
        u = jnp.asarray(u)
        log_m = self._log_mixture(u)
        return jnp.exp(log_m) * self.base.phi(u - log_m)

    @property
    def pathwise(self) -> bool:
        """As the base."""
        return self.base.pathwise

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight of pathwise gradients."""
        u = jnp.asarray(u)
        log_m = self._log_mixture(u)
        return (1 - self.share) ** 2 * jnp.exp(-log_m) * self.base.weight(u - log_m)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The reward of score-function gradients."""
        u = jnp.asarray(u)
        # phi' - phi with phi = m phi_0(v): (1 - share) (phi_0' - phi_0), because dv/du = (1 - share) / m
        return (1 - self.share) * self.base.reward(u - self._log_mixture(u))


class Combination(FDivergence):
    """A non-negative combination of divergences; made by `+` and `*`.

    Args:
        parts: the divergences.
        factors: their factors.
    """

    parts: tuple[FDivergence, ...]
    factors: Float[Array, " k"]

    def _sum(self, method: str, u: Any) -> Any:
        values = [c * getattr(part, method)(u) for c, part in zip(self.factors, self.parts, strict=True)]
        return sum(values[1:], values[0])

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The combination of the parts."""
        return self._sum("phi", u)

    @property
    def pathwise(self) -> bool:
        """Whether every part has pathwise gradients."""
        return all(part.pathwise for part in self.parts)

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The combination of the parts' weights."""
        return self._sum("weight", u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The combination of the parts' rewards."""
        return self._sum("reward", u)
