"""Objectives, the phases that follow them, and the recipe of a whole training."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Key, PyTree, Scalar

from genkit._core._checks import check, check_count, check_interval, describe_type, fail
from genkit._core._fields import trainable
from genkit.training._host import AbstractData


class Objective(eqx.Module):
    r"""Something to minimize: an estimate of a loss whose gradient is unbiased for the loss's gradient.

    With $L(\theta)$ the loss of a model of parameters $\theta$, and $\ell$ the returned value,

    $$E[\ell(\theta)] = L(\theta), \qquad E[\nabla \ell(\theta)] = \nabla L(\theta).$$

    Any callable of the same signature serves as well.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> class Squares(gk.Objective):
        ...     def __call__(self, model, batch, *, key):
        ...         return jnp.mean((model - batch) ** 2), {}
        >>> value, aux = Squares()(jnp.zeros(()), jnp.ones(3), key=jax.random.key(0))
        >>> float(value)
        1.0
    """

    @abc.abstractmethod
    def __call__(self, model: PyTree, batch: PyTree, *, key: Key[Array, ""]) -> tuple[Scalar, dict[str, PyTree]]:
        """Estimate the loss.

        Args:
            model: any pytree.
            batch: a batch of the recipe's data.
            key: typed PRNG key.

        Returns:
            The scalar to minimize, and a dict of by-products: scalars are logged under their names, and `updates`, if
            there, is written into the model after the optimizer step (see `model_updates`).
        """


def model_updates(model: PyTree, where: Callable[[PyTree], PyTree], value: PyTree) -> PyTree:
    """Build the `updates` entry of an objective's by-products: `value` at `where`, nothing elsewhere.

    Args:
        model: the model the objective was given.
        where: selects a sub-tree of the model, as in `equinox.tree_at`.
        value: the value after the optimizer step, of equal structure, shapes and dtypes.

    Returns:
        A tree like the model, with `None` wherever the model is left alone.

    Example:
        >>> import genkit as gk
        >>> gk.training.model_updates({"mean": 0.0, "net": 1.0}, lambda m: m["mean"], 0.5)
        {'mean': 0.5, 'net': None}
    """
    nothing = jax.tree.map(lambda _: None, model)
    return eqx.tree_at(where, nothing, value, is_leaf=lambda x: x is None)


@runtime_checkable
class Optimizer(Protocol):
    """Anything with the two functions of an optax optimizer."""

    @property
    def init(self) -> Callable[..., PyTree]:
        """`init(params) -> state`."""
        ...

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """`update(grads, state, params, **extra) -> (updates, state)`."""
        ...


class Phase(eqx.Module):
    """One kind of update: an objective, the optimizer that follows its gradient, and the leaves it moves.

    Args:
        objective: an `Objective`, or any callable `(model, batch, *, key) -> (scalar, aux)`.
        optimizer: any optax optimizer.
        where: selects the sub-tree of the model that is trained (a node, or a tuple of nodes), as in
            `equinox.tree_at`; `None` trains every floating JAX array of the model outside its frozen fields. NumPy
            arrays are constants and never trained.
        repeats: updates per cycle, each with a batch and a key of its own.
        after: `after(model, key) -> model`, a function that changes the model between compiled calls (calls are cut
            there, so that no step runs past it); it need not be traceable, and must keep the structure, shapes and
            dtypes of the model. Or a sequence of such functions.
        after_every: the cycles between two calls of `after`, or a `range` of the numbers of cycles after which it runs;
            `None` runs it once, at the end of the training. For a sequence of functions, a sequence of these. What runs
            at the end gives `Fitted.model`; the state, from which training may go on, stays as it was before.
        adapt: `adapt(opt_state, before, after) -> opt_state`, called when `after` has changed the model `before` into
            `after` and training goes on: for optimizers that remember something of what was changed. By default the
            optimizer's state is left alone.
        name: name of the phase in the log; needed only to tell several phases apart.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model["mean"] - batch) ** 2), {})
        >>> gk.Phase(loss, optax.adam(1e-2), where=lambda model: model["mean"], repeats=5).repeats
        5
    """

    objective: Callable[..., tuple[Scalar, dict[str, PyTree]]]
    optimizer: Optimizer
    where: Callable[[PyTree], PyTree] | None = eqx.field(static=True)
    repeats: int = eqx.field(static=True)
    after: tuple[Callable[..., PyTree], ...]
    after_every: tuple[int | range | None, ...] = eqx.field(static=True)
    adapt: Callable[..., PyTree] | None
    name: str | None = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable[..., tuple[Scalar, dict[str, PyTree]]],
        optimizer: Optimizer,
        where: Callable[[PyTree], PyTree] | None = None,
        repeats: int = 1,
        after: Callable[..., PyTree] | Sequence[Callable[..., PyTree]] | None = None,
        after_every: int | range | Sequence[int | range | None] | None = None,
        *,
        adapt: Callable[..., PyTree] | None = None,
        name: str | None = None,
    ):
        check(callable(objective), "objective", "a callable `(model, batch, *, key) -> (scalar, aux)`", objective)
        is_optimizer = isinstance(optimizer, Optimizer)
        check(is_optimizer, "optimizer", "an optax optimizer", optimizer, "For example `optax.adam(1e-3)`.")
        check(where is None or callable(where), "where", "a function from the model to a sub-tree, or None", where)
        check_count("repeats", repeats)
        self.objective = objective
        self.optimizer = optimizer
        self.where = where
        self.repeats = int(repeats)
        self.after = _as_hooks(after)
        self.after_every = _as_cycles(after_every, len(self.after))
        check(adapt is None or callable(adapt), "adapt", "a function of an optimizer state and two models", adapt)
        self.adapt = adapt
        self.name = name

    def without_hooks(self) -> "Phase":
        """The phase as compiled code reads it: hooks run outside and may change without compiling again."""
        return Phase(self.objective, self.optimizer, self.where, self.repeats, name=self.name)


def _as_hooks(after: Callable[..., PyTree] | Sequence[Callable[..., PyTree]] | None) -> tuple[Callable, ...]:
    if after is None:
        return ()
    if callable(after):
        return (after,)
    hooks = tuple(after)
    for hook in hooks:
        check(callable(hook), "after", "a function `(model, key) -> model`, or a sequence of them", hook)
    return hooks


def _as_cycles(
    after_every: int | range | Sequence[int | range | None] | None, number: int
) -> tuple[int | range | None, ...]:
    """One entry per hook."""
    if after_every is not None and number == 0:
        fail("after_every", "None where there is no `after`", after_every)
    if after_every is None or isinstance(after_every, (int, range)):
        cycles = (after_every,) * number
    else:
        cycles = tuple(after_every)
    check(len(cycles) == number, "after_every", lambda: f"one entry for each of {number} functions", len(cycles))
    for entry in cycles:
        if isinstance(entry, range):
            check(entry.step > 0 and entry.start > 0, "after_every", "an ascending range of positive numbers", entry)
        elif entry is not None:
            check_count("after_every", entry)
    return cycles


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of a recipe.

    Args:
        path: the definition file.
        text: its bytes.
        needs: the run folder behind each name that `build` takes.
    """

    path: str
    text: bytes
    needs: tuple[tuple[str, str], ...] = ()


class Recipe(eqx.Module):
    """Everything needed to train a model: how it is built, its data, its phases.

    Args:
        build: `build(key, **needs)` returns the model to start from, any pytree.
        data: a callable pytree `data(key) -> batch` that JAX can trace, its arrays being leaves (`gk.data.Batches`), or
            a `gk.data.Host`.
        phases: a `Phase` or a sequence of them; one step runs each phase in turn, `repeats` times.
        num_steps: steps (cycles over all phases) of a whole training.
        ema: decay of an exponential moving average of the trained leaves, in [0, 1), updated once per step with the
            warm-up min(ema, (1 + step) / (10 + step)); `None` keeps none.
        log_every: steps compiled into one call; the log, the progress bar and interrupts work between calls.
        save_every: steps between checkpoints of a run folder; `None` saves at most every 20 seconds. Every training
            saves at its end, and when it stops early.
        name: name of the recipe in logs; `None` for none.
        source: the definition file it came from, which `gk.load` fills in and run folders copy; `None` for none.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        >>> recipe = gk.Recipe(
        ...     build=lambda key: jnp.zeros(()),
        ...     data=jax.tree_util.Partial(lambda key: 3.0 + jax.random.normal(key, (64,))),
        ...     phases=gk.Phase(loss, optax.sgd(0.1)),
        ...     num_steps=200,
        ... )
        >>> fitted = gk.fit(recipe, key=jax.random.key(0))
        >>> bool(abs(fitted.model - 3.0) < 0.2)
        True
    """

    build: Callable[..., PyTree] = eqx.field(static=True)
    data: AbstractData | Callable[..., PyTree]
    phases: tuple[Phase, ...]
    num_steps: int = eqx.field(static=True)
    ema: float | None = eqx.field(static=True)
    log_every: int = eqx.field(static=True)
    save_every: int | None = eqx.field(static=True)
    name: str | None = eqx.field(static=True)
    source: Source | None = eqx.field(static=True, repr=False)

    def __init__(
        self,
        build: Callable[..., PyTree],
        data: AbstractData | Callable[..., PyTree],
        phases: Phase | Sequence[Phase],
        num_steps: int,
        *,
        ema: float | None = None,
        log_every: int = 100,
        save_every: int | None = None,
        name: str | None = None,
        source: Source | None = None,
    ):
        check(callable(build), "build", "a function `build(key, **needs)` that returns a model", build)
        hint = "Wrap arrays in `gk.data.Batches`, an iterator in `gk.data.Host`."
        if not (callable(data) or isinstance(data, AbstractData)):
            what = "a callable pytree `data(key) -> batch` or a `gk.data.Host`"
            fail("data", what, describe_type(data), hint)
        if isinstance(phases, Phase):
            phases = (phases,)
        phases = tuple(phases)
        check(len(phases) > 0, "phases", "at least one gk.Phase", "none")
        for i, phase in enumerate(phases):
            if not isinstance(phase, Phase):
                fail(f"phases[{i}]", "a gk.Phase", describe_type(phase))
        check_count("num_steps", num_steps)
        check_count("log_every", log_every)
        if save_every is not None:
            check_count("save_every", save_every)
        if ema is not None:
            check_interval("ema", ema, 0, 1, open_hi=True)
            ema = float(ema)
        self.build = build
        self.data = data
        self.phases = phases
        self.num_steps = int(num_steps)
        self.ema = ema
        self.log_every = int(log_every)
        self.save_every = save_every
        self.name = name
        self.source = source

    def replace(self, **changes: PyTree) -> "Recipe":
        """The same recipe with other values of some arguments.

        Args:
            **changes: arguments of `Recipe` by name.

        Returns:
            A new recipe.
        """
        return Recipe(**vars(self) | changes)


def trained_mask(model: PyTree, phase: Phase, label: str) -> PyTree[bool]:
    """A tree of booleans that marks the leaves of the model which a phase trains.

    Args:
        model: the model.
        phase: the phase.
        label: how messages call the phase.

    Returns:
        A tree of the model's structure.

    Raises:
        ValueError: if `where` fails on the model or selects nothing that can be trained.
    """
    leaves, treedef = jax.tree.flatten(model)
    chosen = model
    numbers = range(len(leaves))
    try:
        if phase.where is not None:
            chosen = phase.where(model)
            # The same selection on numbered leaves tells where in the model the chosen ones stand.
            numbers = jax.tree.leaves(phase.where(jax.tree.unflatten(treedef, numbers)))
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"`where` of {label} does not apply to the model: {error}.") from error
    trained = set()
    marks = jax.tree.leaves(trainable(chosen))
    for number, leaf, mark in zip(numbers, jax.tree.leaves(chosen), marks, strict=True):
        if mark and isinstance(leaf, jax.Array):  # NumPy leaves are constants
            trained.add(number)
    if not trained:
        fail("where", f"a selection with at least one floating JAX array ({label})", "none")
    return jax.tree.unflatten(treedef, [i in trained for i in range(len(leaves))])
