r"""The probability flow in the angle chart, solved adaptively.

With $c = \sqrt{\sigma_d^2 + \sigma^2}$, $z = x / c$ and $\theta = \arctan(\sigma / \sigma_d)$ the flow is

$$\frac{dz}{d\theta} = \frac{z\cos\theta - D(c z, \sigma)/\sigma_d}{\sin\theta},$$

bounded on a bounded interval: a few dozen evaluations cover noise levels over six orders of magnitude.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, PyTree

from genkit._core._checks import check_count, check_finite, check_positive, describe, is_concrete
from genkit.sampling import AbstractSampler, Guidance, Table, as_denoiser, check_levels


# Evaluations of the fifth-order Runge-Kutta pair in one step: its last is the first of the next.
_PER_STEP = 6


class AngleChart(NamedTuple):
    """Coordinates of the flow: noise levels at both ends and the standard deviation of the data."""

    sigma_min: Array
    sigma_max: Array
    sigma_data: Array

    def angle(self, sigma: Array) -> Array:
        """Angle of a noise level."""
        return jnp.arctan2(sigma, self.sigma_data)

    def scale(self, sigma: Array) -> Array:
        """Standard deviation of the noisy data."""
        return jnp.hypot(sigma, self.sigma_data)


class Solution(NamedTuple):
    """End of a solve: the state, what was integrated beside it, evaluations, and whether the solver got there."""

    z: Array
    extra: PyTree[Array]
    nfe: Array
    ok: Array


Number = Float[ArrayLike, ""] | float


def angle_chart(
    denoiser: Callable, sigma_min: Number, sigma_max: Number, sigma_data: Number | None, dtype: DTypeLike
) -> AngleChart:
    """The chart between two noise levels, which must be in order and within those the denoiser knows.

    Args:
        denoiser: the denoiser.
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
        sigma_data: standard deviation of the data; `None` for what the denoiser declares.
        dtype: dtype of the state.

    Returns:
        The chart.
    """
    check_ends(sigma_min, sigma_max)
    check_levels(sigma_min, denoiser)
    check_levels(sigma_max, denoiser)
    if sigma_data is None:
        sigma_data = as_denoiser(denoiser).sigma_data
    check_positive("sigma_data", sigma_data)
    return AngleChart(
        sigma_min=jnp.asarray(sigma_min, dtype),
        sigma_max=jnp.asarray(sigma_max, dtype),
        sigma_data=jnp.asarray(sigma_data, dtype),
    )


def check_ends(sigma_min: Number, sigma_max: Number) -> None:
    """Refuse noise levels that are not positive, finite and in order, where they are known."""
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        check_positive(name, value)
        if is_concrete(value):
            check_finite(name, np.asarray(value, np.float64))
    if not (is_concrete(sigma_min) and is_concrete(sigma_max)):
        return
    low = float(np.asarray(sigma_min))
    high = float(np.asarray(sigma_max))
    if not low < high:
        raise ValueError(f"`sigma_min` must be smaller than `sigma_max`; got {low:g} >= {high:g}.")


def velocity(denoiser: Callable, chart: AngleChart, cond: PyTree) -> Callable[[Array, Array], Array]:
    """The field `dz / dtheta` as a function of angle and state."""

    def field(theta: Array, z: Array) -> Array:
        # The angle stays short of the quarter circle, where the tangent ends: sigma_max is finite.
        sigma = chart.sigma_data * jnp.tan(theta)
        x = z * (chart.sigma_data / jnp.cos(theta))
        return (z * jnp.cos(theta) - denoiser(x, sigma, cond) / chart.sigma_data) / jnp.sin(theta)

    return field


def solve(
    field: Callable[[Array, tuple[Array, PyTree]], tuple[Array, PyTree]],
    start: tuple[Array, PyTree],
    ends: tuple[Array, Array],
    *,
    rtol: Number,
    atol: Number,
    max_steps: int,
) -> Solution:
    """Integrate a field of (state, extra) between two angles; a failure is reported, never raised."""
    # Imported here: diffrax takes a second to load, and tables do not need it.
    import diffrax

    check_count("max_steps", max_steps)
    first, last = ends

    def term(t: ArrayLike, y: tuple[Array, PyTree], args: PyTree) -> tuple[Array, PyTree]:
        del args
        return field(jnp.asarray(t), y)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(term),
        diffrax.Tsit5(),
        t0=first,
        t1=last,
        dt0=0.02 * (last - first),
        y0=start,
        saveat=diffrax.SaveAt(t1=True),
        stepsize_controller=diffrax.PIDController(rtol=jnp.asarray(rtol), atol=jnp.asarray(atol), norm=_larger_norm),
        max_steps=max_steps,
        throw=False,
    )
    z, extra = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    ok = (solution.result == diffrax.RESULTS.successful) & jnp.all(jnp.isfinite(z))
    nfe = 1 + _PER_STEP * solution.stats["num_steps"]
    return Solution(z, extra, nfe.astype(jnp.int32), ok)


def _larger_norm(error: tuple[Array, Array]) -> Array:
    """The larger of the errors of the state and of what is integrated beside it, each a root mean square.

    One mean over both would let the single number that a density is drown among the coordinates of the state.
    """
    state, extra = error
    return jnp.maximum(_root_mean_square(state), _root_mean_square(extra))


def _root_mean_square(error: Array) -> Array:
    # Step sizes are no part of the derivative, and the root has none at zero.
    return jnp.sqrt(jnp.mean(jax.lax.stop_gradient(error) ** 2))


def check_plain(denoiser: object) -> None:
    """Refuse what has no probability flow: samplers, tables and guidance, saying why."""
    if isinstance(denoiser, (AbstractSampler, Table)):
        raise TypeError(
            f"`denoiser` must be a denoiser; got {type(denoiser).__name__}. A stochastic sampler has no "
            "likelihood in closed form, and that of a model does not depend on the sampler: pass the denoiser that it "
            "draws from."
        )
    if isinstance(denoiser, Guidance):
        raise TypeError(
            f"`denoiser` must be a denoiser; got {type(denoiser).__name__}. A guided field is the score of no "
            "noisy data distribution, so the change of variables along it gives the density of no guided model. Pass "
            "the plain denoiser."
        )
    if not callable(denoiser):
        raise TypeError(f"`denoiser` must be a callable (x, sigma, cond=None) -> x0; got {describe(denoiser)}.")


def check_likelihood(denoiser: object) -> Callable:
    """Return the denoiser, refusing what `check_plain` refuses and what has a flow that is that of no density."""
    check_plain(denoiser)
    assert callable(denoiser), "what is not callable was refused"
    why = as_denoiser(denoiser).no_likelihood
    if why is not None:
        raise ValueError(
            f"`denoiser` must be one with a likelihood; got {type(denoiser).__name__}, which has none: {why}"
        )
    return denoiser
