"""What is minimized, by which optimizer, over which leaves: objectives, phases, recipes, problems."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Key, PyTree, Scalar

from ._checks import check, check_count, check_interval, describe
from ._fields import trainable
from ._host import AbstractHost


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
    def __call__(self, model: PyTree, batch: PyTree, *, key: Key[Array, ""]) -> tuple[Scalar, dict[str, Any]]:
        """Estimate the loss.

        Args:
            model: any pytree.
            batch: what the recipe's data returned.
            key: typed PRNG key.

        Returns:
            The scalar to minimize, and a dict of by-products: scalars are logged under their names, and `updates`, if
            there, is written into the model after the optimizer step (see `model_updates`).
        """


def model_updates(model: PyTree, where: Callable[[Any], Any], value: PyTree) -> PyTree:
    """Build the `updates` entry of an objective's by-products: `value` at `where`, nothing elsewhere.

    Args:
        model: the model the objective was given.
        where: selects a sub-tree of the model, as in `equinox.tree_at`.
        value: what shall stand there after the optimizer step, of equal structure, shapes and dtypes.

    Returns:
        A tree like the model, with `None` wherever the model is left alone.

    Example:
        >>> import genkit as gk
        >>> gk._core.model_updates({"mean": 0.0, "net": 1.0}, lambda m: m["mean"], 0.5)
        {'mean': 0.5, 'net': None}
    """
    nothing = jax.tree.map(lambda _: None, model)
    return eqx.tree_at(where, nothing, value, is_leaf=lambda x: x is None)


class Phase(eqx.Module):
    """One kind of update: an objective, the optimizer that follows its gradient, and the leaves it moves.

    Args:
        objective: an `Objective`, or any callable `(model, batch, *, key) -> (scalar, aux)`.
        optimizer: any optax optimizer.
        where: selects the sub-tree of the model that is trained (a node, or a tuple of nodes), as in
            `equinox.tree_at`; `None` trains every floating JAX array of the model outside its frozen fields. NumPy
            arrays are constants and never trained.
        repeats: updates per cycle, each with a batch and a key of its own.
        name: what the log calls the phase; needed only to tell several phases apart.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model["mean"] - batch) ** 2), {})
        >>> gk.Phase(loss, optax.adam(1e-2), where=lambda model: model["mean"], repeats=5).repeats
        5
    """

    objective: Callable[..., Any]
    optimizer: optax.GradientTransformation | optax.MultiSteps
    where: Callable[[Any], Any] | None = eqx.field(static=True)
    repeats: int = eqx.field(static=True)
    name: str | None = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable[..., Any],
        optimizer: optax.GradientTransformation | optax.MultiSteps,
        where: Callable[[Any], Any] | None = None,
        repeats: int = 1,
        *,
        name: str | None = None,
    ):
        check(callable(objective), "objective", "a callable `(model, batch, *, key) -> (scalar, aux)`", objective)
        is_optimizer = hasattr(optimizer, "init") and hasattr(optimizer, "update")
        check(is_optimizer, "optimizer", "an optax optimizer", optimizer, "For example `optax.adam(1e-3)`.")
        check(where is None or callable(where), "where", "a function from the model to a sub-tree, or None", where)
        check_count("repeats", repeats)
        self.objective = objective
        self.optimizer = optimizer
        self.where = where
        self.repeats = int(repeats)
        self.name = name


class Recipe(eqx.Module):
    """Everything needed to train a model: what it is, what it learns from, and how.

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
        name: what to call the recipe in logs; `None` for none.
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
    data: Any
    phases: tuple[Phase, ...]
    num_steps: int = eqx.field(static=True)
    ema: float | None = eqx.field(static=True)
    log_every: int = eqx.field(static=True)
    save_every: int | None = eqx.field(static=True)
    name: str | None = eqx.field(static=True)
    source: Any = eqx.field(static=True, repr=False)

    def __init__(
        self,
        build: Callable[..., PyTree],
        data: Any,
        phases: Phase | Sequence[Phase],
        num_steps: int,
        *,
        ema: float | None = None,
        log_every: int = 100,
        save_every: int | None = None,
        name: str | None = None,
        source: Any = None,
    ):
        check(callable(build), "build", "a function `build(key, **needs)` that returns a model", build)
        hint = "Wrap arrays in `gk.data.Batches`, an iterator in `gk.data.Host`."
        is_data = callable(data) or isinstance(data, AbstractHost)
        check(is_data, "data", "a callable pytree `data(key) -> batch` or a `gk.data.Host`", _kind(data), hint)
        phases = (phases,) if isinstance(phases, Phase) else tuple(phases)
        check(len(phases) > 0, "phases", "at least one gk.Phase", "none")
        for i, phase in enumerate(phases):
            check(isinstance(phase, Phase), f"phases[{i}]", "a gk.Phase", _kind(phase))
        check_count("num_steps", num_steps)
        check_count("log_every", log_every)
        if save_every is not None:
            check_count("save_every", save_every)
        if ema is not None:
            check_interval("ema", ema, 0, 1, open_hi=True)
        self.build = build
        self.data = data
        self.phases = phases
        self.num_steps = int(num_steps)
        self.ema = None if ema is None else float(ema)
        self.log_every = int(log_every)
        self.save_every = save_every
        self.name = name
        self.source = source

    def replace(self, **changes: Any) -> "Recipe":
        """The same recipe with other values of some arguments.

        Args:
            **changes: arguments of `Recipe` by name.

        Returns:
            A new recipe.
        """
        names = ["build", "data", "phases", "num_steps", "ema", "log_every", "save_every", "name", "source"]
        return Recipe(**{name: getattr(self, name) for name in names} | changes)


class Problem(eqx.Module):
    """Something conditioned on data: a numpyro model and the arguments it is called with.

    Args:
        model: any numpyro model.
        args: its positional arguments, passed as given.
        kwargs: its keyword arguments, passed as given.
        name: what to call the problem; `None` for none.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def coin(flips):
        ...     p = numpyro.sample("p", dist.Beta(1.0, 1.0))
        ...     numpyro.sample("flips", dist.Bernoulli(p).expand([3]), obs=flips)
        >>> gk.Problem(coin, args=([1, 0, 1],)).args
        ([1, 0, 1],)
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None = eqx.field(static=True)

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ):
        check(callable(model), "model", "a numpyro model (a function)", model)
        check(isinstance(args, (tuple, list)), "args", "a tuple of arguments", _kind(args), "One argument is `(x,)`.")
        is_mapping = kwargs is None or isinstance(kwargs, Mapping)
        check(is_mapping, "kwargs", "a dict of keyword arguments", _kind(kwargs))
        self.model = model
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.name = name


def _kind(thing: Any) -> str:
    return describe(thing) if hasattr(thing, "shape") or isinstance(thing, str) else type(thing).__name__


def trained_mask(model: PyTree, phase: Phase, label: str) -> PyTree[bool]:
    """Which leaves of the model a phase trains, as a tree of booleans.

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
    where = phase.where or (lambda tree: tree)
    try:
        chosen = where(model)
        numbers = jax.tree.leaves(where(jax.tree.unflatten(treedef, range(len(leaves)))))
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"`where` of {label} does not apply to the model: {error}.") from error
    trained = set()
    marks = jax.tree.leaves(trainable(chosen))
    for number, leaf, mark in zip(numbers, jax.tree.leaves(chosen), marks, strict=True):
        if mark and isinstance(leaf, jax.Array):  # NumPy leaves are constants
            trained.add(number)
    check(bool(trained), "where", f"a selection with at least one floating JAX array ({label})", "none")
    return jax.tree.unflatten(treedef, [i in trained for i in range(len(leaves))])
