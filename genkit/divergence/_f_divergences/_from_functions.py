"""f-divergences that users give: by their f, or by their weight."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from genkit._core._checks import check, check_count, fail, is_concrete
from genkit.divergence._f_divergences._base import FDivergence, curvature, real, refuse_kink, slope


# Log-ratios at which a user's function is examined.
_PROBE = np.linspace(-4.0, 4.0, 33)
# Gauss-Legendre nodes in each cell of the probe.
_CELL_NODES = 6


class _FromF(FDivergence):
    """A divergence given by f of the ratio; made by `from_f`."""

    f: Callable[[Array], Array]
    smooth: bool = eqx.field(static=True)

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.f(jnp.exp(real(u)))

    @property
    def pathwise(self) -> bool:
        return self.smooth

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        if not self.smooth:
            refuse_kink("f")
        return curvature(self.phi, u)


def from_f(f: Callable[[Array], Array]) -> FDivergence:
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
    # Known at once also inside a trace: the probe is a constant.
    with jax.ensure_compile_time_eval():
        probe = _probe_f(f)
    if not is_concrete(probe[0]):
        return _FromF(f, True)
    at_one, slopes, jumps, areas = (np.asarray(part, float) for part in probe)
    if not abs(at_one) < 1e-5:
        hint = "A divergence needs f(1) = 0: subtract the constant f(1), which changes no gradient."
        fail("f", "zero at r = 1", f"f(1) = {at_one:g}", hint)
    bad = ~np.isfinite(slopes)
    if bad.any():
        at = f"NaN or infinity at r = {np.exp(_PROBE[np.argmax(bad)]):.4g}"
        fail("f", "finite, with a finite derivative, for positive ratios", at)
    falls = np.diff(slopes) < -1e-4 * (1 + np.abs(slopes[1:]))
    if falls.any():
        hint = "Only a convex f gives a divergence; -f may be the convex one, or the ratio may be upside down."
        fail("f", "convex", f"a derivative that falls near r = {np.exp(_PROBE[np.argmax(falls)]):.3g}", hint)
    # Where f' jumps, r f' - f rises by more than the integral of its derivative.
    kinked = np.abs(jumps - areas) > 0.02 * np.abs(jumps) + 1e-4
    return _FromF(f, not bool(kinked.any()) and bool(np.abs(jumps).max() > 0))


def _probe_f(f: Callable[[Array], Array]) -> tuple[Array, Array, Array, Array]:
    """f(1); f' on the probe; by how much r f' - f rises over each cell, and the integral of its derivative there."""

    def phi(u: Array) -> Array:
        return f(jnp.exp(u))

    # Off zero, where derivatives of kinked functions are chosen arbitrarily.
    grid = jnp.asarray(_PROBE + 0.013)
    first = slope(phi, grid)
    width = _PROBE[1] - _PROBE[0]
    steps, weights = _nodes(jnp.asarray(width), _CELL_NODES)
    areas = jnp.sum(weights * curvature(phi, grid[:-1, None] + steps), -1)
    return jnp.asarray(phi(jnp.zeros(()))), first * jnp.exp(-grid), jnp.diff(first - phi(grid)), areas


def _nodes(u: Float[Array, " *s"], num_nodes: int) -> tuple[Float[Array, " *s k"], Float[Array, " *s k"]]:
    """Gauss-Legendre nodes and weights from 0 to u, in a trailing axis."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return u[..., None] * jnp.asarray((nodes + 1) / 2), u[..., None] * jnp.asarray(weights / 2)


def integrate_weight(h: Callable[[Array], Array], u: Shaped[ArrayLike, " *s"], num_nodes: int) -> Float[Array, " *s"]:
    """F of the ratio from its weight: the integral of (e^(u-v) - 1) h(v) from 0 to u, with f(1) = f'(1) = 0."""
    u = real(u)
    v, weights = _nodes(u, num_nodes)
    return jnp.sum(weights * jnp.expm1(u[..., None] - v) * h(v), -1)


class _FromWeight(FDivergence):
    """A divergence given by its weight h(u); made by `from_weight`."""

    h: Callable[[Array], Array]
    num_nodes: int = eqx.field(static=True)

    def phi(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return integrate_weight(self.h, u, self.num_nodes)

    def weight(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        return self.h(real(u))

    def reward(self, u: Shaped[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        # R' = h in u, so R is its integral
        v, weights = _nodes(real(u), self.num_nodes)
        return jnp.sum(weights * self.h(v), -1)


def from_weight(h: Callable[[Array], Array], *, num_nodes: int = 32) -> FDivergence:
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
        _check_weight(np.asarray(values, float))
    return _FromWeight(h, num_nodes)


def _check_weight(values: np.ndarray) -> None:
    """Refuse the values of a weight on the probe that belong to no divergence."""
    if values.shape != _PROBE.shape:
        fail("h", "an elementwise function", f"shape {values.shape}")
    if not (values >= 0).all():
        hint = "A weight r^2 f'' below zero belongs to an f that is not convex."
        fail("h", "finite and non-negative", f"{np.min(values):g} at its lowest", hint)
    check(bool(np.isfinite(values).all()), "h", "finite and non-negative", "infinity")
    check(bool(values[len(values) // 2] > 0), "h", "positive at u = 0", "0", "Gradients vanish at ratio 1.")
