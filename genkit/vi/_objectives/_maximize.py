"""From a function of measures to an objective for `gk.fit`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree, Scalar

from genkit._core._checks import check_key, describe
from genkit.training import Objective
from genkit.vi._programs._expectation import expectation
from genkit.vi._runtime._frame import MAX_PATHS
from genkit.vi._strategies._single import MovingBaseline


class ProgramObjective(Objective):
    """The expectation of a function `(model, batch) -> scalar`, to be followed by `gk.fit`; made by `maximize`.

    Args:
        fn: the function, run under `E` with the step's key.
        sense: +1 to maximize, -1 to minimize.
        max_paths: as for `E`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genkit import vi
        >>> loss, _ = vi.ProgramObjective(jnp.multiply, 1)(jnp.array(2.0), jnp.array(3.0), key=jax.random.key(0))
        >>> float(loss)
        -6.0
    """

    fn: Callable
    sense: int = eqx.field(static=True)
    max_paths: int = eqx.field(static=True, default=MAX_PATHS)

    def __call__(self, model: PyTree, batch: PyTree, *, key: Key[Array, ""]) -> tuple[Scalar, dict[str, Any]]:
        """The loss (the negative where `fn` is to be maximized) and updated moving baselines.

        Args:
            model: what `fn` is given first.
            batch: what `fn` is given second.
            key: typed PRNG key.

        Returns:
            The scalar to minimize, and `updates` where the model holds `MovingBaseline` baselines that were used.
        """
        check_key(key)
        value, baselines = expectation(lambda: self.fn(model, batch), key, self.max_paths, sense=self.sense)
        used = {id(b) for b in baselines if isinstance(b, MovingBaseline)}
        if not used:
            return -self.sense * value, {}
        is_baseline = lambda node: isinstance(node, MovingBaseline)

        def update(node: Any) -> Any:
            if is_baseline(node) and id(node) in used:
                new = node.update(jax.lax.stop_gradient(value))
                return eqx.tree_at(lambda m: m.decay, new, None)
            return jax.tree.map(lambda _: None, node) if is_baseline(node) else None

        return -self.sense * value, {"updates": jax.tree.map(update, model, is_leaf=is_baseline)}


def maximize(fn: Callable, *, max_paths: int = MAX_PATHS) -> ProgramObjective:
    """An objective for `gk.fit` that maximizes the expectation of `fn(model, batch)`.

    Args:
        fn: a function of model and batch returning a real scalar; run under `E` with the step's key.
        max_paths: as for `E`.

    Returns:
        An `Objective`.

    Raises:
        TypeError: if `fn` is not callable.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> objective = vi.maximize(lambda guide, y: vi.elbo(vi.program(model)(y), guide))
        >>> loss, aux = objective(vi.mean_field(model, 1.0), 1.0, key=jax.random.key(0))
        >>> loss.shape
        ()
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable; got {describe(fn)}.")
    return ProgramObjective(fn, 1, max_paths)


def minimize(fn: Callable, *, max_paths: int = MAX_PATHS) -> ProgramObjective:
    """An objective for `gk.fit` that minimizes the expectation of `fn(model, batch)`.

    Args:
        fn: a function of model and batch returning a real scalar; run under `E` with the step's key.
        max_paths: as for `E`.

    Returns:
        An `Objective`.

    Raises:
        TypeError: if `fn` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from genkit import vi
        >>> loss, _ = vi.minimize(jnp.multiply)(jnp.array(2.0), jnp.array(3.0), key=jax.random.key(0))
        >>> float(loss)
        6.0
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable; got {describe(fn)}.")
    return ProgramObjective(fn, -1, max_paths)


def average(fn: Callable[[Any], Any], key: Any, num: int) -> Any:
    """The mean of `fn(key)` over `num` independent keys."""
    if num == 1:
        return fn(key)
    return jnp.mean(jax.vmap(fn)(jax.random.split(key, num)))
