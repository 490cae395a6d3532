"""The result of a training, and the error of one that was interrupted."""

import dataclasses
from typing import TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from genkit.training._ema import ema_model
from genkit.training._log import History
from genkit.training._step import TrainState


_Result = TypeVar("_Result", bound="Fitted")


class Fitted(eqx.Module):
    """Result of a training.

    Args:
        model: the model after the last step, and after the hooks at its end.
        ema: the model with trained leaves replaced by their moving average; `model` itself where none was kept.
        log: metrics by name, NumPy arrays with one entry per step: `loss`, and every scalar by-product of the
            objective. With several phases each name begins with `phase name/`; over repeats a metric is the mean.
        state: everything that training changes, as checkpoints hold it.
        report: what the function that trained says about its result; `None` from `gk.fit` itself.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import genkit as gk
        >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
        >>> draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
        >>> recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=3, ema=0.9)
        >>> fitted = gk.fit(recipe, key=jax.random.key(0))
        >>> bool(fitted.ema > fitted.model), int(fitted.state.step)
        (True, 3)
    """

    model: PyTree
    ema: PyTree
    log: dict[str, np.ndarray]
    state: TrainState
    report: PyTree = eqx.field(default=None, kw_only=True)

    @classmethod
    def of(cls, state: TrainState, history: History, final: PyTree | None = None) -> "Fitted":
        """Build the result from a training state, its log, and the model that hooks at the end have made of it."""
        model = state.model
        if final is not None:
            model = final
        return cls(model, ema_model(state.ema, model), history.arrays(), state)

    @classmethod
    def extend(cls: type[_Result], fitted: "Fitted", **changes: PyTree) -> _Result:
        """The same result as a subclass, or with other values of some fields.

        Args:
            fitted: the result of a training.
            **changes: fields of this class: those that `fitted` lacks, and those that differ.

        Returns:
            An instance of the class on which this is called.

        Example:
            >>> import jax, jax.numpy as jnp, optax
            >>> import genkit as gk
            >>> loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
            >>> draw = jax.tree_util.Partial(lambda key: jax.random.normal(key, (8,)))
            >>> recipe = gk.Recipe(lambda key: jnp.ones(()), draw, gk.Phase(loss, optax.adam(1e-2)), num_steps=3)
            >>> class Mean(gk.Fitted):
            ...     std_err: float
            >>> Mean.extend(gk.fit(recipe, key=jax.random.key(0)), std_err=0.1).log["loss"].shape
            (3,)
        """
        fields = {field.name: vars(fitted)[field.name] for field in dataclasses.fields(Fitted)}
        return cls(**fields | changes)


class Interrupted(KeyboardInterrupt):
    """Training was interrupted between two compiled calls; `fitted` has all work done so far."""

    def __init__(self, message: str, fitted: Fitted):
        super().__init__(message)
        self.fitted = fitted
