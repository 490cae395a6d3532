"""Guidance: which evaluations a draw needs, and how they combine; the contract of the three hooks."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ._checks import check_choice


class Slot(eqx.Module):
    """One evaluation of a denoiser that a guidance may need.

    Slots that differ in their name alone are evaluated once, also when they belong to different parts of a composed
    guidance.

    Args:
        name: the name under which the prediction is handed to `combine`; unique within one guidance.
        cond: `"given"` for the condition of the draw, `"null"` for none, `"asked"` for the one that `ask` returns, or a
            condition (a scalar or an array, the same for all draws).
        net: another denoiser to evaluate, `None` for the one that is sampled.
        loss: a callable `(x0, ctx) -> scalar`; the prediction then carries the gradient of `loss(D(x), ctx)` with
            respect to the noisy example, through the denoiser.
        ask: a callable `(preds, ctx, carry) -> (need, cond)` for a second stage: whether and under which condition to
            evaluate, once the other slots are known. Its slot is left out of `plan`.

    Example:
        >>> from genkit._core import Slot
        >>> Slot("uncond", cond="null").second_stage
        False
    """

    name: str = eqx.field(static=True)
    cond: Any = "given"
    net: Callable | None = None
    loss: Callable | None = None
    ask: Callable | None = None

    def __check_init__(self) -> None:
        """Refuse conditions that are words but not known ones."""
        if isinstance(self.cond, str):
            check_choice("cond", self.cond, ("given", "null", "asked"))

    @property
    def second_stage(self) -> bool:
        """Whether the evaluation depends on those of the first stage."""
        return self.ask is not None


class Prediction(NamedTuple):
    """What became of a slot: the prediction, whether it was made at all, and the gradient where one was asked for."""

    x0: Float[Array, " *shape"]
    present: Bool[Array, ""]
    gradient: Float[Array, " *shape"] | None = None


class Context(eqx.Module):
    """Where a draw stands when the denoiser is about to be evaluated, for one example.

    Args:
        x: the noisy example at which the denoiser is evaluated.
        sigma: its noise level.
        sigma_start: noise level at the start of the step.
        sigma_next: noise level at the end of the step.
        step: index of the step.
        num_steps: number of steps.
        corrector: whether this is a later evaluation within the step; the carry is read but not written then.
        cond: condition of the draw.
        key: typed PRNG key of this evaluation and draw.
    """

    x: Float[Array, " *shape"]
    sigma: Float[Array, ""]
    sigma_start: Float[Array, ""]
    sigma_next: Float[Array, ""]
    step: Int[Array, ""]
    num_steps: Int[Array, ""]
    corrector: Bool[Array, ""]
    cond: Any
    key: Key[Array, "..."]


class Guidance(eqx.Module):
    """Steers a denoiser: says which evaluations it needs and combines them, for ONE example, in data space.

    The drawing loop calls `plan` for every draw of a batch, evaluates a slot where some draw needs it (and truly skips
    it where none does), then calls `combine` for every draw. The carry lives inside the compiled loop and is written
    once per step; corrector rows read it.

    Example:
        >>> import equinox as eqx
        >>> from genkit._core import Guidance, Slot
        >>> class Shrink(Guidance):
        ...     def slots(self):
        ...         return (Slot("main"),)
        ...     def init(self, x):
        ...         return None
        ...     def plan(self, carry, ctx):
        ...         return {"main": True}
        ...     def combine(self, preds, ctx, carry):
        ...         return 0.9 * preds["main"].x0, carry, {}
        >>> Shrink().slots()[0].name
        'main'
    """

    @abc.abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """The evaluations it may need; their number and names are fixed.

        The first is the plain prediction: what is left when the guidance is switched off.
        """

    @abc.abstractmethod
    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        """The carry before the first step: any tree of arrays, `None` for the stateless.

        Args:
            x: the initial noisy example.
        """

    @abc.abstractmethod
    def plan(self, carry: PyTree, ctx: Context) -> Mapping[str, bool | Bool[Array, ""]]:
        """What is needed now, known before evaluating.

        Args:
            carry: the carry.
            ctx: where the draw stands.

        Returns:
            For each first-stage slot by name whether it is needed: a Python bool where that never changes, else a
            boolean scalar. Slots not named are not needed.
        """

    @abc.abstractmethod
    def combine(
        self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree
    ) -> tuple[Float[Array, " *shape"], PyTree, dict[str, Array]]:
        """The guided prediction.

        Args:
            preds: one `Prediction` per slot; one that is not `present` is all zeros unless another draw of the batch
                needed it, so never use it.
            ctx: where the draw stands.
            carry: the carry.

        Returns:
            The guided `x0`, the new carry, and a dict of arrays to report: `Draws.info` holds them per draw and row.
        """

    def __add__(self, other: Any) -> "Guidance":
        """Sum of what both guidances add to their plain predictions; equal evaluations are made once."""
        from ._guidance_algebra import add

        return add(self, other) if isinstance(other, Guidance) else NotImplemented

    def __rshift__(self, post: Any) -> "Guidance":
        """This guidance with an operation on the guided prediction behind it."""
        from ._guidance_algebra import AbstractPost, Posted

        return Posted(self, post) if isinstance(post, AbstractPost) else NotImplemented


class StepTransform(eqx.Module):
    """Acts on the state between solver steps: reflection, time travel, Langevin corrections, projections.

    Transforms see the whole batch, because they may evaluate denoisers; they must treat the draws alike and apart.

    Args:
        at: when it acts: `"start"` (before the first evaluation of a step) or `"end"` (after its last update).
    """

    at: eqx.AbstractVar[str]

    @abc.abstractmethod
    def init(self, x: Float[Array, " n *shape"]) -> PyTree[Array]:
        """The carry before the first step: a tree of arrays with leading axis `n`, or `None`."""

    @abc.abstractmethod
    def active(self, ctx: Context) -> bool | Bool[Array, ""]:
        """Whether it acts at this step; one answer for the batch, from noise levels and step alone."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, " n *shape"], carry: PyTree, ctx: Context, step: Any
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
    """What a population sees of one step, for its particles."""

    x_prev: Float[Array, " k *shape"]
    x: Float[Array, " k *shape"]
    x0: Float[Array, " k *shape"]
    aux: dict[str, Array]


class Population(eqx.Module):
    """Weighs and resamples particles after each step; blocks of `num_particles` draws are one population.

    All methods see ONE population. The driver permutes everything the draws carry (state, history, carries of guidance
    and transforms) by the ancestors that `update` returns.

    Args:
        num_particles: particles per population.
    """

    num_particles: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(self, x: Float[Array, " k *shape"]) -> PyTree[Array]:
        """The carry of one population before the first step."""

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

    @abc.abstractmethod
    def report(self, carry: PyTree) -> dict[str, Array]:
        """What to report of one population at the end; `Draws.info` holds one entry per population."""


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


def collect_hooks(guidance: Any) -> Hooks:
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
    main, transforms, population = None, [], None
    items = guidance if isinstance(guidance, (tuple, list)) else (guidance,)
    for item in items:
        if isinstance(item, Hooks):
            layers = [item.guidance, *item.transforms, item.population]
        else:
            layers = [item]
        for layer in layers:
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


def same_evaluation(first: Slot, second: Slot) -> bool:
    """Whether two slots ask for the same evaluation: equal but for the name, arrays being the very same objects."""
    left, left_tree = jax.tree.flatten((first.cond, first.net, first.loss, first.ask))
    right, right_tree = jax.tree.flatten((second.cond, second.net, second.loss, second.ask))
    return left_tree == right_tree and all(
        a is b or (isinstance(a, str) and a == b) for a, b in zip(left, right, strict=True)
    )
