"""Entropic optimal transport: Sinkhorn's iteration in the log domain.

Potentials may be much larger than the regularization: points a thousand units apart have costs of a million, and an
`epsilon` of a tenth is then below the spacing of float32 numbers of that size. Every potential is therefore held as the
sum of two numbers, `f + f_rest`, and differences of potentials and costs keep the part that rounding would drop. The
iteration converges wherever the costs themselves are represented, and what it reports as its error is the error.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Real, Shaped

from genkit._core._checks import check_count, check_interval, check_positive, fail
from genkit._core._known import float_dtype
from genkit.divergence._costs import AbstractCost


# Exponents are held below this: beyond it exp overflows in float32.
_MAX_EXPONENT = 80.0
# Epsilon halves with every sweep. Where marginals are off by more than `_FAR` after `_FIRST_SWEEPS`, it starts over and
# halves every `_SLOW_SWEEPS`: costs of 1e7 epsilon then converge in 3,000 sweeps, and not in 100,000 otherwise.
_FIRST_SWEEPS = 2000
_SLOW_SWEEPS = 100
_FAR = 1e-3
# Sweeps without any progress, at an error of the size of rounding, after which the iteration gives up.
_PATIENCE = 500


class SinkhornState(eqx.Module):
    """Potentials of an entropic transport problem, and how good they are.

    Args:
        f: potential of the sources.
        g: potential of the targets.
        marginal_error: total absolute difference between the first marginal of the plan and what it should be (for
            unbalanced problems: what the optimality condition says it should be).
        num_iterations: number of sweeps, each an update of both potentials.
        converged: True if `marginal_error` reached the tolerance.
        f_rest: the part of the first potential that is lost in rounding `f`.
        g_rest: the same of the second potential.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> cost = gk.divergence.PointCost(jnp.zeros((2, 1)), jnp.array([[1.0], [2.0]]))
        >>> half = jnp.log(jnp.full(2, 0.5))
        >>> state = gk.divergence.sinkhorn_potentials(cost, half, half, 0.5)
        >>> state.f.shape, bool(state.converged)
        ((2,), True)
    """

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    marginal_error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    f_rest: Float[Array, " n"]
    g_rest: Float[Array, " m"]

    def log_density(self, row: Float[Array, " m"], i: Int[Array, ""], epsilon: Float[Array, ""]) -> Float[Array, " m"]:
        r"""Logarithm of the density of the plan with respect to the product of its weights, for one source.

        Args:
            row: costs of source `i` to all targets, shape (m,).
            i: index of the source.
            epsilon: the regularization that was solved with.

        Returns:
            $(f_i + g_j - C_{ij})/\varepsilon$ for all targets j, shape (m,).
        """
        high, low = _difference(self.g, row)
        # Where there is mass the first sum nearly vanishes, so that it is exact.
        return ((high + self.f[i]) + (low + self.f_rest[i] + self.g_rest)) / epsilon


class Potential(NamedTuple):
    """A potential as the sum of two numbers, the second below the rounding of the first."""

    value: Array
    rest: Array

    def plus(self, shift: Array) -> "Potential":
        """The potential moved by a small shift."""
        return Potential(*_difference(self.value, -(self.rest + shift)))

    def minus(self, other: "Potential") -> Array:
        """The difference of two potentials, as one number."""
        return (self.value - other.value) + (self.rest - other.rest)

    def middle(self, other: "Potential") -> "Potential":
        """The mean of two potentials."""
        return self.plus(0.5 * other.minus(self))


class _Carry(NamedTuple):
    f: Potential
    g: Potential
    strength: Array
    error: Array
    best: Array
    idle: Array
    step: Array


def sinkhorn_potentials(
    cost: AbstractCost,
    log_a: Shaped[ArrayLike, " n"],
    log_b: Shaped[ArrayLike, " m"],
    epsilon: Real[ArrayLike, ""],
    *,
    tau: Real[ArrayLike, ""] | None = None,
    tolerance: Real[ArrayLike, ""] = 1e-6,
    max_iterations: int = 10_000,
    symmetric: bool = False,
) -> SinkhornState:
    r"""Potentials of entropic optimal transport, by Sinkhorn's iteration on logarithms.

    $$\min_P\; \langle P, C \rangle + \varepsilon\, KL(P \mid a \otimes b), \qquad
      P_{ij} = a_i b_j e^{(f_i + g_j - C_{ij})/\varepsilon},$$

    over plans with marginals `a` and `b`. A sweep sets $f_i \leftarrow -\rho\,\varepsilon \log \sum_j b_j
    e^{(g_j - C_{ij})/\varepsilon}$, then `g` likewise, with $\rho = 1$, or $\rho = \tau/(\tau + \varepsilon)$ when the
    marginals are only held by $\tau\, KL$; then both are moved by the constant that is best for the pair, without which
    a large $\tau/\varepsilon$ would take as many sweeps. The regularization starts at the mean cost and halves with
    every sweep until it is `epsilon`. No gradient flows through the potentials; that of the value does not need it (see
    `transport_value`), and `differentiable_potentials` adds it.

    Args:
        cost: `MatrixCost` or `PointCost`.
        log_a: logarithms of the weights of the sources; `-inf` for none.
        log_b: logarithms of the weights of the targets; `-inf` for none.
        epsilon: regularization, positive, in the units of the cost.
        tau: weight of the marginals' divergence; `None` makes them exact.
        tolerance: bound on the marginal error. The iteration stops before `max_iterations` where rounding permits no
            progress, and has then not converged.
        max_iterations: bound on the number of sweeps.
        symmetric: whether both sides are the same problem (`x = y`, `a = b`): then one averaged update, which
            converges within a few sweeps.

    Returns:
        A `SinkhornState`.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> cost, half = gk.divergence.MatrixCost(jnp.array([[0.0, 1.0], [1.0, 0.0]])), jnp.log(jnp.full(2, 0.5))
        >>> state = gk.divergence.sinkhorn_potentials(cost, half, half, 0.1)
        >>> state.f.shape, bool(state.converged)
        ((2,), True)

    Source: Peyre and Cuturi, "Computational Optimal Transport", 2019, remark 4.23 (log domain); Chizat et al., "Scaling
    Algorithms for Unbalanced Optimal Transport Problems", Mathematics of Computation 2018, section 4; Sejourne et al.,
    "Faster Unbalanced Optimal Transport: Translation Invariant Sinkhorn and 1-D Frank-Wolfe", AISTATS 2022, section 3;
    Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences", AISTATS 2019, equation
    25 (symmetric).
    """
    check_positive("epsilon", epsilon)
    check_positive("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    dtype = float_dtype(log_a, log_b)
    log_a = jnp.asarray(log_a, dtype)
    log_b = jnp.asarray(log_b, dtype)
    if tau is not None:
        check_positive("tau", tau)
        tau = jnp.asarray(tau, dtype)
    for name, weights, size in (("a", log_a, cost.shape[0]), ("b", log_b, cost.shape[1])):
        if weights.shape != (size,):
            fail(name, f"of shape ({size},)", f"shape {weights.shape}")
        # A logarithm of minus infinity is a point without weight.
        check_interval(f"log_{name}", weights)
    epsilon = jnp.asarray(epsilon, dtype)
    tolerance = jnp.asarray(tolerance, dtype)
    fixed = jax.lax.stop_gradient((cost, log_a, log_b, epsilon, tau, tolerance))
    return _iterate(*fixed, max_iterations=max_iterations, symmetric=symmetric)


@eqx.filter_jit
def _iterate(
    cost: AbstractCost,
    log_a: Float[Array, " n"],
    log_b: Float[Array, " m"],
    epsilon: Float[Array, ""],
    tau: Float[Array, ""] | None,
    tolerance: Float[Array, ""],
    max_iterations: int,
    symmetric: bool,
) -> SinkhornState:
    """The iteration itself; compiled here for the reason given in `_pairs.py`."""
    dtype = log_a.dtype
    back = cost.transpose()
    a = jnp.exp(log_a)
    b = jnp.exp(log_b)
    mass = jnp.sum(a)
    mean_cost = jnp.sum(a * cost.map_rows(lambda row, i: jnp.sum(b * row))) / mass
    first_strength = jnp.maximum(mean_cost.astype(dtype), epsilon)
    machine = jnp.finfo(dtype).eps
    rounding = 16 * machine * mass

    def sweep(carry: _Carry) -> _Carry:
        strength = carry.strength
        f = _update(cost, carry.f, carry.g, b, strength, tau)
        # The row marginal of the old pair of potentials is a * exp((f_old - f_new) / epsilon): no further pass needed.
        change = carry.f.minus(f) / (damping(strength, tau) * strength)
        error = jnp.sum(a * jnp.abs(jnp.expm1(jnp.minimum(change, _MAX_EXPONENT))))
        # Two numbers resolve a potential to the square of the machine precision; an epsilon below that is not reached.
        size = jnp.max(jnp.abs(f.value))
        error = error + mass * jnp.expm1(jnp.minimum(0.5 * machine**2 * size / strength, _MAX_EXPONENT))
        if symmetric:
            f = carry.f.middle(f)
            g = f
        else:
            g = _update(back, carry.g, f, a, strength, tau)
            if tau is not None:
                shift = _best_shift(f, g, a, b, tau)
                f = f.plus(shift)
                g = g.plus(-shift)
        settled = jnp.where(strength > epsilon, jnp.inf, error)
        progress = settled < carry.best
        step = carry.step + 1
        # Where halving at every sweep was too fast, potentials are far from those of a small epsilon.
        restart = (step == _FIRST_SWEEPS) & (error > _FAR * mass)
        due = step % jnp.where(step > _FIRST_SWEEPS, _SLOW_SWEEPS, 1) == 0
        weaker = jnp.where(due, jnp.maximum(0.5 * strength, epsilon), strength)
        return _Carry(
            f,
            g,
            jnp.where(restart, first_strength, weaker),
            settled,
            jnp.where(progress, settled, carry.best),
            jnp.where(progress | (settled > rounding), 0, carry.idle + 1),
            step,
        )

    def is_unsettled(carry: _Carry) -> Array:
        return (carry.step < max_iterations) & ~(carry.error <= tolerance) & (carry.idle < _PATIENCE)

    nothing = jnp.zeros((), jnp.int32)
    infinity = jnp.asarray(jnp.inf, dtype)
    start = _Carry(
        _zero(cost.shape[0], dtype), _zero(cost.shape[1], dtype), first_strength, infinity, infinity, nothing, nothing
    )
    end = jax.lax.while_loop(is_unsettled, sweep, start)
    return SinkhornState(end.f.value, end.g.value, end.error, end.step, end.error <= tolerance, end.f.rest, end.g.rest)


def _zero(size: int, dtype: jnp.dtype) -> Potential:
    return Potential(jnp.zeros(size, dtype), jnp.zeros(size, dtype))


def damping(strength: Float[Array, ""], tau: Float[Array, ""] | None) -> Float[Array, ""]:
    """The factor of an update: below one where the marginals are soft."""
    if tau is None:
        return jnp.ones_like(strength)
    return tau / (tau + strength)


def _difference(x: Float[Array, " *s"], y: Float[Array, " *s"]) -> tuple[Float[Array, " *s"], Float[Array, " *s"]]:
    """The difference of two numbers, and the part of it that rounding dropped (Knuth's two-sum)."""
    high = x - y
    back = high - x
    return high, (x - (high - back)) - (y + back)


def _update(
    cost: AbstractCost,
    own: Potential,
    other: Potential,
    weights: Float[Array, " m"],
    epsilon: Float[Array, ""],
    tau: Float[Array, ""] | None,
) -> Potential:
    """Half a sweep: the potential of the sources that is best for that of the targets.

    From the old one and the logarithm of what its marginal lacks, which is small near the end and has all its digits.
    """
    tiny = jnp.finfo(weights.dtype).tiny

    def log_ratio(costs: Float[Array, " m"], i: Int[Array, ""]) -> Float[Array, ""]:
        high, low = _difference(other.value, costs)
        exponents = ((high + own.value[i]) + (low + own.rest[i] + other.rest)) / epsilon
        peak = jnp.max(jnp.where(weights > 0, exponents, -jnp.inf))
        # Near the end all exponents are moderate, and to subtract the largest would only cost digits.
        shift = jnp.where(jnp.abs(peak) > 0.75 * _MAX_EXPONENT, peak, 0.0)
        total = jnp.sum(weights * jnp.exp(jnp.minimum(exponents - shift, _MAX_EXPONENT)))
        return shift + jnp.log(jnp.maximum(total, tiny))

    lacking = epsilon * cost.map_rows(log_ratio)
    if tau is None:
        return own.plus(-lacking)
    # Damping as 1 - share: the product with the large part would be rounded.
    share = epsilon / (tau + epsilon)
    return own.plus(-(share * (own.value + own.rest) + damping(epsilon, tau) * lacking))


def _best_shift(
    f: Potential, g: Potential, a: Float[Array, " n"], b: Float[Array, " m"], tau: Float[Array, ""]
) -> Float[Array, ""]:
    """The constant to add to f and take from g that maximizes the dual of an unbalanced problem."""

    def log_held(potential: Array, weights: Array) -> Array:
        """Log <w, exp(-potential / tau)>: by expm1 where the exponents are small, for the digits at a large tau."""
        exponents = -potential / tau
        total = jnp.sum(weights)
        small = jnp.log(total) + jnp.log1p(jnp.sum(weights * jnp.expm1(jnp.clip(exponents, -1.0, 1.0))) / total)
        large = jax.nn.logsumexp(exponents, b=weights)
        return jnp.where(jnp.max(jnp.abs(exponents)) < 1.0, small, large)

    return 0.5 * tau * (log_held(f.value, a) - log_held(g.value, b))


def soft_minimum(
    cost: AbstractCost, other: Potential, weights: Float[Array, " m"], epsilon: Float[Array, ""]
) -> Float[Array, " n"]:
    r"""For every source $\varepsilon \log \sum_j b_j e^{(g_j - C_{ij})/\varepsilon}$, with derivatives in everything.

    In the weights and not their logarithms, so that the derivative is right where a weight is zero.
    """
    tiny = jnp.finfo(other.value.dtype).tiny
    floor = 0.25 * jnp.finfo(other.value.dtype).min

    def row(costs: Float[Array, " m"], i: Int[Array, ""]) -> Float[Array, ""]:
        high, low = _difference(other.value, costs)
        top = jax.lax.stop_gradient(jnp.max(jnp.where(weights > 0, high, floor)))
        exponents = jnp.minimum(((high - top) + (low + other.rest)) / epsilon, _MAX_EXPONENT)
        return top + epsilon * jnp.log(jnp.maximum(jnp.sum(weights * jnp.exp(exponents)), tiny))

    return cost.map_rows(row)
