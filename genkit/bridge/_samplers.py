"""Samplers of bridges, for `gk.sample` and the command line."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Inexact, Key

from genkit._core import AbstractSampler, Draws
from genkit._core._checks import check, check_count

from ._bridge import AbstractBridge, Bridge


def _starts(model, keys, x_init):
    """Where the paths start: the states given, or draws of the source the bridge carries."""
    if x_init is not None:
        return x_init
    source = getattr(model, "source", None)
    hint = "Or give the bridge samples of its source: `bridge.with_source(x0)`."
    check(source is not None, "x_init", "given: this bridge does not know its source", "None", hint)
    source = jnp.asarray(source)
    return source[jax.vmap(lambda key: jr.randint(jr.fold_in(key, 0), (), 0, source.shape[0]))(keys)]


class ExactPaths(AbstractSampler):
    """Exact paths of a closed-form bridge on a uniform grid: end point first, then the bridge of the reference.

    Args:
        num_steps: intervals of the grid on [0, 1]; the draws are its last states.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> draws = gk.sample(gk.bridge.ExactPaths(), bridge, 3, x_init=jnp.zeros((3, 2)), key=jax.random.key(0))
        >>> draws.value.shape
        (3, 2)
    """

    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
        trajectory: bool = False,
    ) -> Draws:
        """Draw one path per key.

        Args:
            model: a `Bridge`.
            keys: one typed key per draw.
            cond: must be `None`.
            x_init: starting points (n, d); `None` draws them from the source of the bridge.
            shape: not used.
            trajectory: whether to keep the path, starting point included.

        Returns:
            The draws; one evaluation of the potential each.
        """
        del shape
        check(cond is None, "cond", "None: a bridge takes no condition", cond)
        check(isinstance(model, Bridge), "model", "a closed-form Bridge", type(model).__name__, "Use `EulerPaths`.")
        bridge: Any = model
        x0 = _starts(bridge, keys, x_init)
        ts = jnp.linspace(0.0, 1.0, self.num_steps + 1)
        paths = jax.vmap(lambda x, key: bridge.sample(x, ts, key=jr.fold_in(key, 1)))(x0, keys)
        count = jnp.ones(keys.shape[0], jnp.int32)
        return Draws(paths[:, -1], count, count, trajectory=paths if trajectory else None)


class EulerPaths(AbstractSampler):
    """Euler-Maruyama paths of any bridge, weak order 1: for bridges known only by their drift, and as a check.

    Args:
        num_steps: steps on [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> draws = gk.sample(gk.bridge.EulerPaths(20), bridge, 3, x_init=jnp.zeros((3, 2)), key=jax.random.key(0))
        >>> print(draws.value.shape, draws.nfe)
        (3, 2) [20 20 20]
    """

    num_steps: int = eqx.field(static=True, default=100)

    def __check_init__(self):
        check_count("num_steps", self.num_steps)

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: Any,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
        trajectory: bool = False,
    ) -> Draws:
        """Draw one path per key.

        Args:
            model: a bridge, with `drift(t, x)` and `epsilon`.
            keys: one typed key per draw.
            cond: must be `None`.
            x_init: starting points (n, d); `None` draws them from the source of the bridge.
            shape: not used.
            trajectory: whether to keep the path, starting point included.

        Returns:
            The draws; one evaluation of the drift per step.
        """
        del shape
        check(cond is None, "cond", "None: a bridge takes no condition", cond)
        check(isinstance(model, AbstractBridge), "model", "a bridge", type(model).__name__)
        bridge: Any = model
        x0 = _starts(bridge, keys, x_init)
        step = 1.0 / self.num_steps

        def euler(x, i):
            noise = jax.vmap(lambda key: jr.normal(jr.fold_in(key, i + 1), x.shape[1:], x.dtype))(keys)
            x = x + step * bridge.drift(i * step, x) + jnp.sqrt(bridge.epsilon * step) * noise
            return x, x if trajectory else ()

        end, path = jax.lax.scan(euler, x0, jnp.arange(self.num_steps))
        path = jnp.concatenate([x0[:, None], jnp.moveaxis(jnp.asarray(path), 0, 1)], 1) if trajectory else None
        count = jnp.full(keys.shape[0], self.num_steps, jnp.int32)
        return Draws(end, count, count, trajectory=path)
