"""What acts on the states between solver steps: transforms and populations, and the layers of a guided draw."""

import abc
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from genkit.sampling._context import Context
from genkit.sampling._guidance import Guidance
from genkit.sampling._part import AbstractPart


@runtime_checkable
class Stepping(Protocol):
    """First-order steps and predictions that a transform may ask for; both count their evaluations.

    Example:
        >>> import equinox as eqx
        >>> import genkit as gk
        >>> class ThereAndBack(gk.sampling.StepTransform):
        ...     at: str = eqx.field(default="start", init=False, static=True)
        ...     def __call__(self, x, carry, ctx, step: gk.sampling.Stepping):
        ...         return step(step(x, ctx.sigma, ctx.sigma_next), ctx.sigma_next, ctx.sigma), carry
        >>> ThereAndBack().at
        'start'
    """

    def __call__(self, x: Array, sigma: ArrayLike, sigma_next: ArrayLike, net: Callable | None = None) -> Array:
        """One first-order step between any two noise levels, up or down, of the sampled denoiser or of `net`."""
        ...

    def denoise(self, x: Array, sigma: ArrayLike, net: Callable | None = None) -> Array:
        """The prediction at a noise level."""
        ...


class StepTransform(AbstractPart):
    """Acts on the state between solver steps: reflection, time travel, Langevin corrections, projections.

    Transforms see the whole batch, because they may evaluate denoisers; they must treat the draws alike and apart.

    Args:
        at: when it acts: `"start"` (before the first evaluation of a step) or `"end"` (after its last update).
    """

    at: eqx.AbstractVar[str]

    def init(self, x: Float[Array, " n *shape"]) -> PyTree[Array]:
        """Make the carry before the first step: a tree of arrays with leading axis `n`; by default there is none.

        Args:
            x: the initial states.
        """
        return None

    def active(self, ctx: Context) -> bool | Bool[Array, ""]:
        """Say whether it acts at this step: one answer for the batch, from noise levels and step alone.

        Args:
            ctx: where the batch stands.
        """
        return True

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, " n *shape"], carry: PyTree, ctx: Context, step: Stepping
    ) -> tuple[Float[Array, " n *shape"], PyTree]:
        """Transform the state.

        Args:
            x: the states.
            carry: the carry of this transform.
            ctx: where the batch stands: `x`, `cond` and `key` with a leading axis `n`, the rest scalar; `sigma` is the
                noise level of `x`.
            step: `step(x, sigma, sigma_next, net=None)` takes one first-order step between any two noise levels, up or
                down, with the sampled (and guided) denoiser or with `net`; `step.denoise(x, sigma, net=None)` returns
                the prediction. Both count their evaluations.

        Returns:
            The new states, at the same noise level, and the new carry.
        """


class StepEvent(NamedTuple):
    """One step as the particles of a population saw it: states before and after, predictions, reports."""

    x_prev: Float[Array, " k *shape"]
    x: Float[Array, " k *shape"]
    x0: Float[Array, " k *shape"]
    aux: dict[str, Array]


class Population(AbstractPart):
    """Weighs and resamples particles after each step; blocks of `num_particles` draws are one population.

    All methods see ONE population. The driver permutes everything the draws carry (state, history, carries of guidance
    and transforms) by the ancestors that `update` returns.

    Args:
        num_particles: particles per population.
    """

    num_particles: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(self, x: Float[Array, " k *shape"]) -> PyTree[Array]:
        """Make the carry of one population before the first step."""

    @abc.abstractmethod
    def update(self, event: StepEvent, carry: PyTree, ctx: Context) -> tuple[Int[Array, " k"], PyTree]:
        """Weigh the particles after a step and resample them, or not.

        Args:
            event: states before and after the step, the (guided) predictions and reports of its last evaluation.
            carry: the carry of this population.
            ctx: where it stands after the step: `sigma` is the noise level of `event.x`; `cond` and `key` are those of
                the population, the rest as for guidance.

        Returns:
            Ancestor indices (`arange` leaves everybody in place), and the carry, already in the new order.
        """

    def report(self, carry: PyTree) -> dict[str, Array]:
        """Report on one population at the end; `Draws.info` holds one entry per population. By default nothing.

        Args:
            carry: the carry of this population.
        """
        return {}


class Hooks(eqx.Module):
    """The three layers of a guided draw, in the order in which they act.

    Args:
        guidance: combines evaluations; `None` takes the plain prediction.
        transforms: act on the state between steps, in this order.
        population: weighs and resamples after each step.
    """

    guidance: Guidance | None = None
    transforms: tuple[StepTransform, ...] = ()
    population: Population | None = None


Steering = Guidance | StepTransform | Population | Hooks
"""What a user passes as `guidance`, or a tuple or list of these."""


def collect_hooks(guidance: PyTree) -> Hooks:
    """Sort what a user passes as `guidance` into its three layers.

    Args:
        guidance: `None`, a `Guidance`, a `StepTransform`, a `Population`, `Hooks`, or a tuple or list of these with at
            most one guidance and one population.

    Returns:
        The layers.

    Raises:
        TypeError: if something is none of these.
        ValueError: if there are two guidances or two populations.
    """
    main = None
    transforms = []
    population = None
    for layer in _flat(guidance):
        if isinstance(layer, Guidance):
            if main is not None:
                raise ValueError("`guidance` must hold at most one `Guidance` per tuple; got two.")
            main = layer
        elif isinstance(layer, StepTransform):
            transforms.append(layer)
        elif isinstance(layer, Population):
            if population is not None:
                raise ValueError("`guidance` must hold at most one population; got two.")
            population = layer
        elif layer is not None:
            raise TypeError(
                "`guidance` must be a genkit `Guidance`, `StepTransform` or `Population`, or a tuple of these; "
                f"got {type(layer).__name__}. Try `gk.guidance.cfg(scale)`."
            )
    return Hooks(main, tuple(transforms), population)


def _flat(guidance: PyTree) -> list[PyTree]:
    if isinstance(guidance, Hooks):
        return [guidance.guidance, *guidance.transforms, guidance.population]
    if isinstance(guidance, (tuple, list)):
        return [layer for item in guidance for layer in _flat(item)]
    return [guidance]
