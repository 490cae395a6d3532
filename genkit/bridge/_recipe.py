"""A light bridge as a recipe."""

import jax.numpy as jnp
from jaxtyping import ArrayLike, Shaped

from genkit.bridge._inputs import Scalar, check_epsilon, check_samples
from genkit.bridge._light_options import LightFit, LightTraining
from genkit.training import Recipe


def recipe(
    x0: Shaped[ArrayLike, " n d"],
    x1: Shaped[ArrayLike, " m _"],
    epsilon: Scalar,
    num_components: int,
    *,
    scale: str = "diag",
    num_steps: int = 3000,
    init: str = "balanced",
    learning_rate: Scalar | None = None,
    batch_size: int | None = None,
    rank: int = 8,
    guard: bool | None = None,
    polish: int = 0,
    noise: Scalar | None = None,
    name: str = "bridge",
) -> Recipe:
    """A light bridge as a recipe for `gk.fit` and the command line.

    The training that `fit_light` runs, with log, checkpoints and resume.

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
        guard: as in `fit_light`.
        polish: as in `fit_light`.
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
    options = LightFit(
        num_components,
        scale,
        num_steps,
        init,
        "adam",
        polish,
        learning_rate,
        batch_size,
        rank,
        guard=guard,
        noise=noise,
    )
    x0, x1 = check_samples(x0, x1, num_components, scale)
    training = LightTraining(x0, x1, jnp.asarray(epsilon, x1.dtype), options)
    return training.recipe(name=name, with_source=True)
