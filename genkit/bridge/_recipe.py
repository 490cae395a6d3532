"""A light bridge as a recipe."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import ArrayLike, Float, Real

from genkit._core import Phase, Recipe
from genkit._core._checks import check_choice, check_count, check_positive

from ._anchored import anchored_adam
from ._bridge import Bridge
from ._closed_form import check_epsilon
from ._fit_light import KINDS, check_samples, start_bridge
from ._objectives import LightObjective, UnpairedBatches, light_optimizer
from ._start import MAX_POINTS


def recipe(
    x0: Float[ArrayLike, " n d"],
    x1: Float[ArrayLike, " m _"],
    epsilon: Real[ArrayLike, ""],
    num_components: int,
    *,
    scale: str = "diag",
    num_steps: int = 3000,
    init: str = "balanced",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    rank: int = 8,
    noise: float | None = None,
    name: str = "bridge",
) -> Recipe:
    """A light bridge as a recipe for `gk.fit` and the command line.

    The same start, objective, coordinates and defaults as `fit_light` with Adam; the training loop is the library's own
    (log, checkpoints, resume), so components that die are not revived on the way.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        scale: covariance family.
        num_steps: optimizer steps.
        init: `balanced` or `published`.
        learning_rate: as in `fit_light`.
        batch_size: as in `fit_light`.
        rank: columns of the low-rank family.
        noise: as in `fit_light`.
        name: what the log calls it.

    Returns:
        A recipe whose model is a `Bridge` that carries up to 4096 samples of its source.

    Example:
        >>> import jax, genkit as gk
        >>> x = jax.random.normal(jax.random.key(0), (200, 2))
        >>> recipe = gk.bridge.recipe(x, x + 1.0, 0.5, 2, num_steps=20)
        >>> fitted = gk.fit(recipe, key=jax.random.key(1))
        >>> fitted.model.drift(0.5, x).shape
        (200, 2)
    """
    check_epsilon(epsilon)
    check_count("num_components", num_components)
    check_choice("scale", scale, KINDS)
    check_choice("init", init, ("balanced", "published"))
    if noise is not None:
        check_positive("noise", noise)
    x0, x1 = check_samples(x0, x1, num_components, scale)
    epsilon = jnp.asarray(epsilon, x1.dtype)

    # Fixed, so that the optimizer sees the points the start was made of.
    key_order0, key_order1 = jr.split(jr.key(0))
    few0, few1 = jr.permutation(key_order0, x0)[:MAX_POINTS], jr.permutation(key_order1, x1)[:MAX_POINTS]

    def build(key):
        """The bridge before training."""
        start = start_bridge(few0, few1, epsilon, num_components, scale=scale, init=init, rank=rank, key=key)
        return Bridge(start, source=few0)

    published = init == "published"
    if published:
        optimizer = light_optimizer(learning_rate or 1e-3, 1.0, 1.0 / epsilon)
    else:
        schedule = optax.cosine_decay_schedule(learning_rate or 2e-2, num_steps)
        optimizer = _of_potential(anchored_adam(schedule, few0, epsilon, few1.mean(0)))
    blur = None if noise is None else jnp.asarray(noise, x1.dtype)
    data = UnpairedBatches(x0, x1, batch_size or (128 if published else 1024), blur)
    return Recipe(build, data, Phase(LightObjective(), optimizer), num_steps, name=name)


def _of_potential(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of potentials, for the bridge that holds one and trains nothing else."""
    held = lambda bridge: bridge.potential

    def update(updates, state, params=None):
        assert params is not None
        moved, state = optimizer.update(updates.potential, state, params.potential)
        return eqx.tree_at(held, updates, moved), state

    return optax.GradientTransformation(lambda params: optimizer.init(params.potential), update)
