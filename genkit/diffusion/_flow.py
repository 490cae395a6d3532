r"""The probability flow in the angle chart, solved adaptively.

With $c = \sqrt{\sigma_d^2 + \sigma^2}$, $z = x / c$ and $\theta = \arctan(\sigma / \sigma_d)$ the flow is

$$\frac{dz}{d\theta} = \frac{z\cos\theta - D(c z, \sigma)/\sigma_d}{\sin\theta},$$

bounded on a bounded interval: a few dozen evaluations cover noise levels over six orders of magnitude.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genkit._core._checks import check, check_count, check_finite, check_positive, describe, is_concrete

from ._range import check_levels


# Evaluations of the fifth-order Runge-Kutta pair in one step: its last is the first of the next.
_PER_STEP = 6


class Chart(NamedTuple):
    """The coordinates: noise levels at both ends and the deviation of the data."""

    sigma_min: Array
    sigma_max: Array
    sigma_data: Array

    def angle(self, sigma: Array) -> Array:
        """The angle of a noise level."""
        return jnp.arctan2(sigma, self.sigma_data)

    def scale(self, sigma: Array) -> Array:
        """Standard deviation of the noisy data."""
        return jnp.hypot(sigma, self.sigma_data)


class Solution(NamedTuple):
    """The end of a solve: the state, what was integrated beside it, evaluations, and whether it got there."""

    z: Array
    extra: Any
    nfe: Array
    ok: Array


def chart(denoiser: Any, sigma_min: Any, sigma_max: Any, sigma_data: Any, dtype: Any) -> Chart:
    """The chart of a denoiser, its ends checked."""
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        check_positive(name, value)
        check_finite(name, jnp.asarray(value, float) if is_concrete(value) else value)
    if is_concrete(sigma_min) and is_concrete(sigma_max):
        low, high = float(sigma_min), float(sigma_max)
        check(low < high, "sigma_min", "smaller than `sigma_max`", f"{low:g} >= {high:g}")
    for level in (sigma_min, sigma_max):
        check_levels(level, denoiser)
    if sigma_data is None:
        sigma_data = getattr(denoiser, "sigma_data", 1.0)
    check_positive("sigma_data", sigma_data)
    return Chart(*(jnp.asarray(value, dtype) for value in (sigma_min, sigma_max, sigma_data)))


def velocity(denoiser: Callable, chart: Chart, cond: Any) -> Callable[[Array, Array], Array]:
    """The field `dz / dtheta` as a function of angle and state."""

    def field(theta: Array, z: Array) -> Array:
        sigma = chart.sigma_data * jnp.tan(theta)
        x = z * (chart.sigma_data / jnp.cos(theta))
        return (z * jnp.cos(theta) - denoiser(x, sigma, cond) / chart.sigma_data) / jnp.sin(theta)

    return field


def solve(
    field: Callable[[Array, tuple[Array, Any]], tuple[Array, Any]],
    start: tuple[Array, Any],
    ends: tuple[Array, Array],
    *,
    rtol: Any,
    atol: Any,
    max_steps: int,
) -> Solution:
    """Integrate a field of (state, extra) between two angles; a failure is reported, never raised."""
    import diffrax

    check_count("max_steps", max_steps)
    first, last = ends
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(jnp.asarray(t), y)),
        diffrax.Tsit5(),
        t0=first,
        t1=last,
        dt0=0.02 * (last - first),
        y0=start,
        saveat=diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, norm=_larger),
        max_steps=max_steps,
        throw=False,
    )
    z, extra = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    ok = (solution.result == diffrax.RESULTS.successful) & jnp.all(jnp.isfinite(z))
    nfe = 1 + _PER_STEP * solution.stats["num_steps"]
    return Solution(z, extra, nfe.astype(jnp.int32), ok)


def _larger(error: tuple[Array, Any]) -> Array:
    """The larger of the errors of the state and of what is integrated beside it, each a root mean square.

    One mean over both would let the single number that a density is drown among the coordinates of the state.
    """
    size = lambda leaf: jnp.sqrt(jnp.mean(jax.lax.stop_gradient(leaf) ** 2))
    return jnp.maximum(*map(size, error))


def check_plain(denoiser: Any) -> None:
    """Refuse what has no probability flow: samplers, tables and guidance, saying why."""
    from genkit._core import AbstractSampler, Guidance, Table

    if isinstance(denoiser, (AbstractSampler, Table)):
        raise TypeError(
            f"`denoiser` must be a denoiser; got {type(denoiser).__name__}. A stochastic sampler has no "
            "likelihood in closed form, and that of a model does not depend on the sampler: pass the denoiser that it "
            "draws from."
        )
    if isinstance(denoiser, Guidance):
        raise TypeError(
            f"`denoiser` must be a denoiser; got {type(denoiser).__name__}. A guided field is the score of no "
            "noisy data law, so the change of variables along it gives the density of no guided model. Pass the plain "
            "denoiser."
        )
    if not callable(denoiser):
        raise TypeError(f"`denoiser` must be a callable (x, sigma, cond=None) -> x0; got {describe(denoiser)}.")


def check_likelihood(denoiser: Any) -> None:
    """Refuse what `check_plain` refuses, and denoisers whose flow is that of no density, saying why."""
    check_plain(denoiser)
    why = getattr(denoiser, "no_likelihood", None)
    if why:
        raise ValueError(
            f"`denoiser` must be one with a likelihood; got {type(denoiser).__name__}, which has none: {why}"
        )
