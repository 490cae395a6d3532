"""Samplers of bridges, for `gk.sample` and the command line."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Inexact, Key, PyTree

from genkit._core._checks import check, check_count, fail
from genkit.bridge._abstract import AbstractBridge
from genkit.bridge._bridge import Bridge
from genkit.bridge._euler import euler_maruyama
from genkit.bridge._inputs import as_floats
from genkit.sampling import AbstractSampler, Draws


def _starts(bridge: AbstractBridge, keys: Key[Array, " n"], x_init: Array | None) -> Float[Array, " n d"]:
    """The states that paths start in: those given, or draws of the source the bridge carries."""
    if x_init is not None:
        return as_floats(x_init)[0]
    source = bridge.start_samples
    if source is None:
        hint = "Or give the bridge samples of its source: `bridge.with_source(x0)`."
        fail("x_init", "given: this bridge does not know its source", "None", hint)
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
        cond: PyTree,
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
        if not isinstance(model, Bridge):
            fail("model", "a closed-form Bridge", type(model).__name__, "Use `EulerPaths`.")
        x0 = _starts(model, keys, x_init)
        ts = jnp.linspace(0.0, 1.0, self.num_steps + 1)
        paths = jax.vmap(lambda x, key: model.sample(x, ts, key=jr.fold_in(key, 1)))(x0, keys)
        count = jnp.ones(keys.shape[0], jnp.int32)
        if not trajectory:
            return Draws(paths[:, -1], count, count)
        return Draws(paths[:, -1], count, count, trajectory=paths)


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
        cond: PyTree,
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
        if not isinstance(model, AbstractBridge):
            fail("model", "a bridge", type(model).__name__)
        x0 = _starts(model, keys, x_init)
        step = 1.0 / self.num_steps

        def interval(x: Array, i: Array) -> tuple[Array, Array | tuple[()]]:
            def noise(_: Array) -> Array:
                return jax.vmap(lambda key: jr.normal(jr.fold_in(key, i + 1), x.shape[1:], x.dtype))(keys)

            x = euler_maruyama(model, x, i * step, step, 1, noise)
            if trajectory:
                return x, x
            return x, ()

        end, path = jax.lax.scan(interval, x0, jnp.arange(self.num_steps))
        count = jnp.full(keys.shape[0], self.num_steps, jnp.int32)
        if not trajectory:
            return Draws(end, count, count)
        path = jnp.concatenate([x0[:, None], jnp.moveaxis(jnp.asarray(path), 0, 1)], 1)
        return Draws(end, count, count, trajectory=path)
