"""Paths of a trained model through `gk.sample` and the command line."""

from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Key

from genkit._core._checks import check, check_count
from genkit.sampling import AbstractSampler, Draws
from genkit.sde._model import FractionalSDE
from genkit.sde._simulate import simulate


class PathSampler(AbstractSampler):
    """Draw prior paths of a model that holds a `FractionalSDE` as `.sde` (a `LatentSDE`), at equal times.

    Args:
        num_times: times per path, the last at the horizon.
        steps_per_interval: time steps between two of them.

    Example:
        >>> from genkit.sde import PathSampler
        >>> PathSampler(50, steps_per_interval=2).num_times
        50
    """

    num_times: int = eqx.field(static=True)
    steps_per_interval: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_times", self.num_times)
        check_count("steps_per_interval", self.steps_per_interval)

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        """Draw one path per key, values (n, num_times, d); `x_init` (n, d) are initial states."""
        check(cond is None, "cond", "None: a path has no condition", cond)
        found = getattr(model, "sde", None)
        check(isinstance(found, FractionalSDE), "model", "a model with a FractionalSDE as `.sde`", model)
        sde = cast(FractionalSDE, found)
        ts = sde.horizon * jnp.arange(1, self.num_times + 1, dtype=sde.dtype) / self.num_times

        def one(key: Array, x0: Any) -> Array:
            return simulate(sde, ts, x0=x0, steps_per_interval=self.steps_per_interval, key=key).x

        x = jax.vmap(one, in_axes=(0, None if x_init is None else 0))(keys, x_init)
        cost = jnp.full(x.shape[0], 2 * self.num_times * self.steps_per_interval)  # two drift calls a step
        return Draws(x, cost, cost)
