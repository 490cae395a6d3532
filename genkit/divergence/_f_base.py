"""f-divergences through one function of the log-ratio."""

import abc
from collections.abc import Callable
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float


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
        r"""$R = r f'(r) - f(r)$, the reward of score-function gradients (defined up to a constant).

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
        """A positive multiple."""
        return Combination((self,), jnp.asarray(factor, float)[None])

    def __rmul__(self, factor: Any) -> "FDivergence":
        """A positive multiple."""
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


class _FromF(FDivergence):
    """A divergence given by f of the ratio; made by `from_f`."""

    f: Callable

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.f(jnp.exp(jnp.asarray(u)))

    @property
    def pathwise(self) -> bool:
        probe = jnp.linspace(-3.0, 3.0, 13)
        return bool(jnp.any(curvature(self.phi, probe + 0.01) > 1e-6))

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        if not self.pathwise:
            refuse_kink("f")
        return curvature(self.phi, u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return slope(self.phi, u) - self.phi(u)


def from_f(f: Callable) -> FDivergence:
    """The divergence of a user's convex f of the ratio r = p/q.

    Args:
        f: an elementwise, twice differentiable convex function with f(1) = 0.

    Returns:
        The divergence; weight and reward by differentiation.

    Raises:
        ValueError: from `weight`, for a piecewise linear f.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.from_f(lambda r: (r - 1) ** 2).phi(jnp.log(3.0))), 4)
        4.0
    """
    return _FromF(f)


class _FromWeight(FDivergence):
    """A divergence given by its weight h(u); made by `from_weight`."""

    h: Callable
    num_nodes: int = eqx.field(static=True)

    def _nodes(self, u: Any) -> tuple[Any, Any]:
        x, w = np.polynomial.legendre.leggauss(self.num_nodes)
        x, w = jnp.asarray((x + 1) / 2), jnp.asarray(w / 2)
        return u[..., None] * x, u[..., None] * w

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # f(r) = int_1^r (r - s) f''(s) ds = int_0^u (e^(u-v) - 1) h(v) dv, with f(1) = f'(1) = 0
        u = jnp.asarray(u, jnp.result_type(float))
        v, w = self._nodes(u)
        return jnp.sum(w * jnp.expm1(u[..., None] - v) * self.h(v), -1)

    @property
    def pathwise(self) -> bool:
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.h(jnp.asarray(u))

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # R' = h in u, so R is its integral
        u = jnp.asarray(u, jnp.result_type(float))
        v, w = self._nodes(u)
        return jnp.sum(w * self.h(v), -1)


def from_weight(h: Callable, *, num_nodes: int = 32) -> FDivergence:
    r"""The divergence with a given weight $h(u) = r^2 f''(r) \ge 0$; f by integration with f(1) = f'(1) = 0.

    Args:
        h: an elementwise non-negative function of u = log r.
        num_nodes: Gauss-Legendre nodes of the integrals.

    Returns:
        The divergence.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.from_weight(jnp.exp).reward(jnp.log(3.0))), 4)
        2.0
    """
    return _FromWeight(h, num_nodes)
