"""f-divergences through one function of the log-ratio."""

import abc
from collections.abc import Callable
from typing import NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from genkit._core._checks import check, check_finite, check_interval, is_concrete
from genkit._core._fields import as_number
from genkit._core._known import float_dtype
from genkit.divergence._ratios import self_normalize


class FDivergence(eqx.Module):
    r"""An f-divergence $D_f(p \| q) = E_q f(p/q)$, given by $\phi(u) = f(e^u)$ with $u = \log p/q$.

    From $\phi$ follow, with $r = e^u$: the weight $h = r^2 f'' = \phi'' - \phi'$ of pathwise gradients, the reward
    $R = r f' - f = \phi' - \phi$ of score-function gradients, and the critic $f' = e^{-u}\phi'$ of the dual bound
    $E_p T - E_q f^*(T)$, where $f^*(f'(r)) = R$. All act elementwise.

    A subclass writes `phi`; weight and reward follow by differentiation unless it has closed forms for them.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> float(divergence.ForwardKL().weight(jnp.log(3.0)))
        3.0

    Source: Xu, Nie & Vahdat, "One-step Diffusion Models with f-Divergence Distribution Matching", 2025, section 3; dual
    form: Nowozin, Cseke & Tomioka, "f-GAN", NeurIPS 2016, equation 4.
    """

    @abc.abstractmethod
    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$f(e^u)$.

        Args:
            u: log-ratios log p/q.

        Returns:
            The integrand, elementwise.
        """

    @property
    def pathwise(self) -> bool:
        """True if pathwise gradients exist: unless f has a kink."""
        return True

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$h = r^2 f''(r)$, the weight of pathwise gradients.

        Args:
            u: log-ratios log p/q.

        Returns:
            Non-negative weights.

        Raises:
            ValueError: where f has a kink.
        """
        return curvature(self.phi, u)

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$R = r f'(r) - f(r)$, the reward of score-function gradients, $f^*(f'(r))$ of the dual bound.

        Args:
            u: log-ratios log p/q.

        Returns:
            Rewards.
        """
        return slope(self.phi, u) - self.phi(u)

    def critic(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        r"""$f'(r)$, the optimal critic of the dual bound.

        Args:
            u: log-ratios log p/q.

        Returns:
            Critic values.
        """
        u = real(u)
        return jnp.exp(-u) * slope(self.phi, u)

    def value(
        self, log_p: Shaped[ArrayLike, " n"], log_q: Shaped[ArrayLike, " n"], *, normalize: bool = False
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
        u = real(log_p) - real(log_q)
        check(u.size > 0, "log_p", "of at least one draw", u)
        if normalize:
            result = jnp.mean(self.phi(self_normalize(u)))
        else:
            result = jnp.mean(self.phi(u))
        if is_concrete(result) and not np.isfinite(result):
            check_finite("value", result, _overflow_hint(u))
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

    def skew(self, share: Real[ArrayLike, ""] = 0.5) -> "FDivergence":
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
        if not isinstance(other, FDivergence):
            return NotImplemented
        return Combination((self, other), jnp.ones(2))

    def __mul__(self, factor: Real[ArrayLike, ""]) -> "FDivergence":
        """A non-negative multiple."""
        if isinstance(factor, FDivergence):
            return NotImplemented
        check_interval("factor", factor, 0)
        return Combination((self,), as_number(factor)[None])

    def __rmul__(self, factor: Real[ArrayLike, ""]) -> "FDivergence":
        """A non-negative multiple."""
        return self * factor


def _overflow_hint(u: Float[Array, " n"]) -> str:
    """Advice for a value that is not finite: the largest log-ratio, where it is known."""
    advice = "q has no mass where p has some. Try a divergence of bounded weight, such as JensenShannon()."
    if is_concrete(u):
        return f"The largest log-ratio is {np.max(np.asarray(u)):.4g}: {advice}"
    return f"Here {advice}"


def real(u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """A log-ratio as a floating array, float32 at least: exponentials of half precision end at 11."""
    return jnp.asarray(u, float_dtype(u))


def exp_times(u: Float[Array, " *s"], value: Float[Array, " *s"]) -> Float[Array, " *s"]:
    """The ratio times a value; zero where the ratio is, although the value may be infinite there."""
    is_zero = u == -jnp.inf
    return jnp.exp(u) * jnp.where(is_zero, 0.0, value)


def slope(phi: Callable[[Array], Array], u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """The derivative of an elementwise function."""
    u = real(u)
    # Forward mode gives all elements in one pass: the function acts on each alone.
    return jax.jvp(phi, (u,), (jnp.ones_like(u),))[1]


def curvature(phi: Callable[[Array], Array], u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
    """Phi'' - phi', the weight that belongs to phi."""

    def first(x: Array) -> Array:
        return slope(phi, x)

    return slope(first, u) - first(real(u))


def refuse_kink(name: str) -> NoReturn:
    """Raise the error of divergences without a pathwise gradient."""
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

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.exp(u) * self.base.phi(-u)

    @property
    def pathwise(self) -> bool:
        return self.base.pathwise

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        return jnp.exp(u) * self.base.weight(-u)

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # phi' - phi of the dual is minus the slope f' of the base at the inverse ratio.
        return -self.base.critic(-real(u))


class Skewed(FDivergence):
    r"""A divergence to a mixture of both distributions; made by `skew`.

    With $m = \pi r + 1 - \pi$, the ratio to the mixture is $v = r/m$, and $\phi = m\,\phi_0(\log v)$,
    $h = (1-\pi)^2 h_0(\log v)/m$, $R = (1 - \pi) R_0(\log v)$.

    Args:
        base: the divergence.
        share: share of p in the mixture.
    """

    base: FDivergence
    share: Float[Array, ""] = eqx.field(converter=as_number)

    def _log_mixture(self, u: Float[Array, " *s"]) -> Float[Array, " *s"]:
        """Logarithm of the mixture over q."""
        return jnp.logaddexp(jnp.log(self.share) + u, jnp.log1p(-self.share))

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        log_m = self._log_mixture(u)
        return jnp.exp(log_m) * self.base.phi(u - log_m)

    @property
    def pathwise(self) -> bool:
        return self.base.pathwise

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
        log_m = self._log_mixture(u)
        return (1 - self.share) ** 2 * jnp.exp(-log_m) * self.base.weight(u - log_m)

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        u = real(u)
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

    def _sum(self, values: list[Float[Array, " *s"]]) -> Float[Array, " *s"]:
        """The values of the parts times their factors, summed."""
        terms = [factor * value for factor, value in zip(self.factors, values, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self._sum([part.phi(u) for part in self.parts])

    @property
    def pathwise(self) -> bool:
        return all(part.pathwise for part in self.parts)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self._sum([part.weight(u) for part in self.parts])

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self._sum([part.reward(u) for part in self.parts])
