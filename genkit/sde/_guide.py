"""Guides: distributions of the noise that steer a path through its observations."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genkit._core._checks import NonFiniteError, check_count, is_concrete
from genkit.sde._affine import check_affine
from genkit.sde._filter import (
    Backward,
    Gaussian,
    backward,
    flat_state,
    flat_step,
    linearize,
    observation_rows,
    place_rows,
    require_gaussian,
    start_map,
)
from genkit.sde._grid import Grid, Noises, make_grid, make_table
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed
from genkit.sde._step import Driver, Step, make_driver, make_steps


class Plan(NamedTuple):
    """What a guide needs on one grid: for the start, and for each step (leading axis N)."""

    start: Any
    steps: Any


class AbstractGuide(eqx.Module):
    """A distribution of the standard normals behind a path: of the history and the initial state, then of each step.

    All normals of a step are coordinates in which the model's own distribution is N(0, I); a guide returns theirs, with
    the log-ratio of the two densities at the draw and their divergence in closed form.
    """

    @abc.abstractmethod
    def times(self) -> Any:
        """Times that must be step boundaries, or `None`."""

    @abc.abstractmethod
    def prepared_for(self, grid: Grid, noises: Noises) -> Plan | None:
        """The plan for this grid if there is one already."""

    @abc.abstractmethod
    def plan(self, grid: Grid, noises: Noises, seen: tuple[int, ...]) -> Plan:
        """Lay the guide out on a grid; `seen` says after how many steps each observation comes."""

    @abc.abstractmethod
    def start(self, plan: Plan, white: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        """Normals of history and initial state, log-ratio, divergence."""

    @abc.abstractmethod
    def draw(
        self, sde: FractionalSDE, driver: Driver, plan: Any, step: Step, x: Array, v: Array, white: Array
    ) -> tuple[Array, Array, Array]:
        """Normals of one step, log-ratio, divergence."""


def draw_gaussian(mean: Array, root: Array, log_det: Array, white: Array) -> tuple[Array, Array, Array]:
    """Draw N(mean, root root') from white noise, with log N(0, I) - log q and the divergence from N(0, I)."""
    eps = mean + root @ white
    log_ratio = (jnp.sum(white**2) - jnp.sum(eps**2)) / 2 + log_det
    divergence = (jnp.sum(mean**2) + jnp.sum(root**2) - mean.size) / 2 - log_det
    return eps, log_ratio, divergence


class LinearGuide(AbstractGuide):
    r"""The exact posterior of the linearized model: an affine control of every step, with its full covariance.

    The numerical step itself is linearized, so for affine drift, constant diffusion and normal observations every draw
    weighs exactly the evidence of the discretized model, at any step size. For other drifts it is linearized along
    the noise-free path, then `num_iterations - 1` times along the current posterior mean. Its numbers are constants:
    no gradient flows through them, which at the optimum loses nothing.

    Args:
        sde: the model.
        observed: observations with a normal distribution given the state; its mean may be any function of it.
        max_step: longest step of the grid it is prepared on. In use on another grid it is prepared anew; inside jit,
            where a guide that is an argument cannot be compared, another grid of as many steps gives NaN.
        steps_per_interval: equal steps per interval instead.
        num_iterations: linearizations.

    Raises:
        ValueError: if the likelihood is not normal, or times and steps are as `simulate` refuses them.
        NonFiniteError: if the path it linearizes along blows up (outside jit), naming step and state.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.ma_fbm(), hurst=0.7, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.3, 0.1]), gs.GaussianNoise(0.1))
        >>> guide = gs.LinearGuide(model, observed)
        >>> value = gs.elbo(model, guide, observed, key=jax.random.key(0))
        >>> bool(jnp.abs(value - guide.log_evidence) < 1e-4)
        True

    Source: derived for this library: Girsanov control in discrete time, from the backward information filter.
    """

    sde: FractionalSDE
    observed: Observed
    prepared: Plan
    steps: Any
    log_evidence: Array
    num_iterations: int = eqx.field(static=True)

    def __init__(
        self,
        sde: FractionalSDE,
        observed: Observed,
        *,
        max_step: float | None = None,
        steps_per_interval: int | None = None,
        num_iterations: int = 1,
    ):
        check_count("num_iterations", num_iterations)
        require_gaussian(sde, observed, "LinearGuide")
        grid = make_grid(sde, observed.ts, max_step, steps_per_interval, "observed.ts")
        if sde.step == "exact":
            check_affine(sde, uncoupled=True)
        # Known arrays have no gradient to stop, and stay known: inside jit `stop_gradient` would trace them.
        traced = lambda x: eqx.is_array(x) and not is_concrete(x)
        stop = lambda tree: jax.tree.map(lambda x: jax.lax.stop_gradient(x) if traced(x) else x, tree)
        self.sde, self.observed = stop(sde), stop(observed)
        noises = make_table(self.sde, grid)
        self.log_evidence, self.prepared = _plan(self.sde, self.observed, grid, noises, grid.slots, num_iterations)
        if is_concrete(self.log_evidence) and not bool(jnp.isfinite(self.log_evidence)):
            _explain(self.sde, grid, noises)
        self.steps = np.asarray(grid.h, sde.dtype) if is_concrete(grid.h) else grid.h
        self.num_iterations = num_iterations

    def times(self) -> Any:
        """The observation times."""
        return self.observed.ts

    def prepared_for(self, grid: Grid, noises: Noises) -> Plan | None:
        """The plan made at construction, if it was for these steps (as far as can be seen)."""
        normals = self.sde.dim * (len(noises.columns) + (self.sde.step == "exact"))
        if grid.num_steps != self.steps.shape[0] or normals != self.prepared.steps.root.shape[-1]:
            return None
        if is_concrete(grid.h) and is_concrete(self.steps):
            same = np.allclose(grid.h, self.steps, rtol=1e-4, atol=0.0)
            return self.prepared if same else None
        # Inside jit only the run can tell; a plan for other steps is none.
        same = jnp.allclose(jnp.asarray(grid.h, self.steps.dtype), self.steps, rtol=1e-4, atol=0.0)
        return jax.tree.map(lambda x: jnp.where(same, x, jnp.nan), self.prepared)

    def plan(self, grid: Grid, noises: Noises, seen: tuple[int, ...]) -> Plan:
        """A plan for another grid."""
        return _plan(self.sde, self.observed, grid, noises, seen, self.num_iterations)[1]

    def start(self, plan: Plan, white: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        """Posterior draw of the history and the initial state."""
        return draw_gaussian(plan.start.shift, plan.start.root, plan.start.log_det, white)

    def draw(
        self, sde: FractionalSDE, driver: Driver, plan: Gaussian, step: Step, x: Array, v: Array, white: Array
    ) -> tuple[Array, Array, Array]:
        """Posterior draw of one step's normals given the state."""
        return draw_gaussian(plan.shift - plan.gain @ flat_state(x, v), plan.root, plan.log_det, white)


def _explain(sde: FractionalSDE, grid: Grid, noises: Noises) -> None:
    """Raise with the first step of the noise-free path that is not finite."""
    driver = make_driver(sde, grid, noises)
    offset, noise = start_map(sde, driver)
    size = sde.dim * driver.num_normals
    z = np.asarray(_reference(sde, driver, make_steps(sde, driver, grid), offset, noise, size, None)[0])
    bad = ~np.isfinite(z).all(axis=1)
    if not bad.any():
        raise NonFiniteError(
            "`log_evidence` must be finite; the path that LinearGuide linearizes along is, so a derivative of the "
            "drift or the diffusion, or the likelihood, is not."
        )
    k = max(int(np.argmax(bad)) - 1, 0)
    raise NonFiniteError(
        f"`drift` must keep the noise-free path, along which LinearGuide linearizes, finite; it blew up in step {k} "
        f"(t = {float(grid.t[k]):.6g}, length {float(grid.h[k]):.3g}), state before it {z[k, : sde.dim]}. Try a "
        "smaller `max_step`, step='exponential' for a stiff drift, or NeuralGuide(linear=False)."
    )


@eqx.filter_jit
def _plan(
    sde: FractionalSDE, observed: Observed, grid: Grid, noises: Noises, seen: tuple[int, ...], num_iterations: int
) -> tuple[Array, Plan]:
    """Linearize along a reference path and run the backward pass; iterate along the posterior mean."""
    driver = make_driver(sde, grid, noises)
    steps = make_steps(sde, driver, grid)
    slots = np.asarray(seen)
    num_normals = sde.dim * driver.num_normals
    offset, noise = start_map(sde, driver)

    def refine(law: Backward | None) -> tuple[Backward, Array]:
        z, eps = _reference(sde, driver, steps, offset, noise, num_normals, law)
        maps = linearize(sde, driver, steps, z[:-1], eps)
        x = z[slots][:, : sde.dim]
        rows, constant = observation_rows(sde, observed, x, offset.shape[0])
        return backward(maps, *place_rows(rows, slots, grid.num_steps), offset, noise), constant

    result, constant = refine(None)
    for _ in range(num_iterations - 1):
        result, constant = refine(result)
    return result.log_evidence + constant, Plan(result.start, result.steps)


def _reference(
    sde: FractionalSDE, driver: Driver, steps: Step, offset: Array, noise: Array, size: int, law: Backward | None
) -> tuple[Array, Array]:
    """States (N + 1, n) and normals (N, p) of the noise-free path, or of the current posterior mean."""

    def body(z: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
        step, plan = xs
        eps = jnp.zeros(size, sde.dtype) if plan is None else plan.shift - plan.gain @ z
        return flat_step(sde, driver, step, z, eps), (z, eps)

    start = offset if law is None else offset + noise @ law.start.shift
    last, (z, eps) = jax.lax.scan(body, start, (steps, None if law is None else law.steps))
    return jnp.concatenate([z, last[None]]), eps
