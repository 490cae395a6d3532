"""f-divergences that users give: by their f, or by their weight."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._core._checks import check, check_count, is_concrete
from ._f_base import FDivergence, curvature, refuse_kink, slope


_PROBE = np.linspace(-4.0, 4.0, 33)  # log-ratios at which a user's function is looked at
_CELL_NODES = 6


class _FromF(FDivergence):
    """A divergence given by f of the ratio; made by `from_f`."""

    f: Callable
    smooth: bool = eqx.field(static=True)

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.f(jnp.exp(jnp.asarray(u)))

    @property
    def pathwise(self) -> bool:
        return self.smooth

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        if not self.smooth:
            refuse_kink("f")
        return curvature(self.phi, u)

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return slope(self.phi, u) - self.phi(u)


def from_f(f: Callable) -> FDivergence:
    """The divergence of a user's convex f of the ratio r = p/q.

    Args:
        f: an elementwise, convex function with f(1) = 0, written with `jax.numpy`.

    Returns:
        The divergence; weight and reward by differentiation.

    Raises:
        ValueError: if f(1) is not 0 or f is not convex (looked at for ratios from e^-4 to e^4), or is not finite
            there; from `weight` (and where pathwise gradients are taken), if f has a kink.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.from_f(lambda r: (r - 1) ** 2).phi(jnp.log(3.0))), 4)
        4.0
    """
    check(callable(f), "f", "a function of the ratio r = p/q", f)
    with jax.ensure_compile_time_eval():
        at_one, slopes, jumps, areas = _probe_f(f)
    if not is_concrete(at_one):
        return _FromF(f, True)
    at_one, slopes, jumps, areas = (np.asarray(x, float) for x in (at_one, slopes, jumps, areas))
    hint = "A divergence needs f(1) = 0: subtract the constant f(1), which changes no gradient."
    check(abs(at_one) < 1e-5, "f", "zero at r = 1", f"f(1) = {at_one:g}", hint)
    bad = ~np.isfinite(slopes)
    check(not bad.any(), "f", "finite, with a finite derivative, for positive ratios", f"NaN or infinity at r = "
          f"{np.exp(_PROBE[np.argmax(bad)]):.4g}")  # fmt: skip
    falls = np.diff(slopes) < -1e-4 * (1 + np.abs(slopes[1:]))
    where = np.exp(_PROBE[np.argmax(falls)])
    hint = "Only a convex f gives a divergence; -f may be the convex one, or the ratio may be upside down."
    check(not falls.any(), "f", "convex", f"a derivative that falls near r = {where:.3g}", hint)
    kinked = np.abs(jumps - areas) > 0.02 * np.abs(jumps) + 1e-4
    return _FromF(f, not bool(kinked.any()) and bool(np.abs(jumps).max() > 0))


def _probe_f(f: Callable) -> tuple[Array, Array, Array, Array]:
    """f(1); f' on the probe; by how much r f' - f rises over each cell, and the integral of its derivative there."""
    phi = lambda u: f(jnp.exp(u))
    grid = jnp.asarray(_PROBE + 0.013)  # off zero, where derivatives of kinked functions are chosen arbitrarily
    first = slope(phi, grid)
    x, w = np.polynomial.legendre.leggauss(_CELL_NODES)
    width = _PROBE[1] - _PROBE[0]
    nodes = grid[:-1, None] + width * jnp.asarray((x + 1) / 2)
    areas = width / 2 * jnp.sum(jnp.asarray(w) * curvature(phi, nodes), -1)
    return jnp.asarray(phi(jnp.zeros(()))), first * jnp.exp(-grid), jnp.diff(first - phi(grid)), areas


def _nodes(u: Any, num_nodes: int) -> tuple[Any, Any]:
    """Gauss-Legendre nodes and weights from 0 to u, in a trailing axis."""
    x, w = np.polynomial.legendre.leggauss(num_nodes)
    x, w = jnp.asarray((x + 1) / 2), jnp.asarray(w / 2)
    return u[..., None] * x, u[..., None] * w


def integrate_weight(h: Callable, u: Any, num_nodes: int) -> Array:
    """F of the ratio from its weight: the integral of (e^(u-v) - 1) h(v) from 0 to u, with f(1) = f'(1) = 0."""
    u = jnp.asarray(u, jnp.result_type(float))
    v, w = _nodes(u, num_nodes)
    return jnp.sum(w * jnp.expm1(u[..., None] - v) * h(v), -1)


class _FromWeight(FDivergence):
    """A divergence given by its weight h(u); made by `from_weight`."""

    h: Callable
    num_nodes: int = eqx.field(static=True)

    def phi(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return integrate_weight(self.h, u, self.num_nodes)

    @property
    def pathwise(self) -> bool:
        return True

    def weight(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.h(jnp.asarray(u, jnp.result_type(float)))

    def reward(self, u: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # R' = h in u, so R is its integral
        u = jnp.asarray(u, jnp.result_type(float))
        v, w = _nodes(u, self.num_nodes)
        return jnp.sum(w * self.h(v), -1)


def from_weight(h: Callable, *, num_nodes: int = 32) -> FDivergence:
    r"""The divergence with a given weight $h(u) = r^2 f''(r) \ge 0$; f by integration with f(1) = f'(1) = 0.

    Args:
        h: an elementwise non-negative function of u = log r.
        num_nodes: Gauss-Legendre nodes of the integrals.

    Returns:
        The divergence.

    Raises:
        ValueError: for a weight that is negative, not finite or zero at ratio 1 (looked at for ratios from e^-4 to
            e^4).

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit import divergence
        >>> round(float(divergence.from_weight(jnp.exp).reward(jnp.log(3.0))), 4)
        2.0
    """
    check(callable(h), "h", "a function of u = log r", h)
    check_count("num_nodes", num_nodes, 2)
    with jax.ensure_compile_time_eval():
        values = h(jnp.asarray(_PROBE))
    if is_concrete(values):
        values = np.asarray(values, float)
        check(values.shape == _PROBE.shape, "h", "an elementwise function", f"shape {values.shape}")
        hint = "A weight r^2 f'' below zero belongs to an f that is not convex."
        check(bool((values >= 0).all()), "h", "finite and non-negative", f"{np.min(values):g} at its lowest", hint)
        check(bool(np.isfinite(values).all()), "h", "finite and non-negative", "infinity")
        check(bool(values[len(values) // 2] > 0), "h", "positive at u = 0", "0", "Gradients vanish at ratio 1.")
    return _FromWeight(h, num_nodes)
