"""How good samples are: precision and recall by nearest neighbors, and a test for memorization."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from genkit._core._checks import check, check_count

from ._pairs import as_samples, map_rows, root, squares


def precision_recall(
    real: Inexact[ArrayLike, " n *shape"], fake: Inexact[ArrayLike, " m *shape"], *, k: int = 3
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Precision and recall of a sample against a real one, by the union of k-nearest-neighbor balls.

    A set's manifold is the union of balls about its points, each reaching its k-th nearest neighbor in the set.
    Precision is the share of `fake` within the manifold of `real`; recall the share of `real` within that of `fake`.

    Args:
        real: real examples `(n, *shape)`.
        fake: examples to judge `(m, *shape)`.
        k: number of neighbors, below both sample sizes.

    Returns:
        Precision and recall, scalars in [0, 1].

    Raises:
        ValueError: for shapes that differ, or a sample of `k` examples or fewer.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> real = jnp.arange(4.0)[:, None]
        >>> precision, recall = gk.divergence.precision_recall(real, real[:2], k=1)
        >>> float(precision), float(recall)
        (1.0, 0.75)

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019,
    equations 1 and 2.
    """
    check_count("k", k)
    real, fake = as_samples(real=real, fake=fake)
    for name, sample in (("real", real), ("fake", fake)):
        check(sample.shape[0] > k, name, f"more than `k` = {k} examples", f"{sample.shape[0]}")
    return _covered(fake, real, k), _covered(real, fake, k)


def nearest_distance_ratio(
    samples: Inexact[ArrayLike, " n *shape"],
    train: Inexact[ArrayLike, " m *shape"],
    test: Inexact[ArrayLike, " l *shape"],
) -> Float[Array, ""]:
    r"""Mean distance of samples to their nearest training example, relative to that of held-out examples.

    Near 1 for a model that generalizes; towards 0 for one that has memorized its training data.

    Args:
        samples: examples to judge `(n, *shape)`.
        train: what the model was trained on `(m, *shape)`.
        test: held-out real examples `(l, *shape)`.

    Returns:
        The ratio, a scalar.

    Raises:
        ValueError: for shapes that differ or empty samples.
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> train = jnp.zeros((1, 1))
        >>> float(gk.divergence.nearest_distance_ratio(train + 1, train, train + 2))
        0.5
    """
    samples, train, test = as_samples(samples=samples, train=train, test=test)
    return _nearest_distance(samples, train) / _nearest_distance(test, train)


@jax.jit
def _nearest_distance(points: Float[Array, " n d"], others: Float[Array, " m d"]) -> Float[Array, ""]:
    """Mean distance of points to the nearest of others."""
    return jnp.mean(map_rows(lambda row: root(jnp.min(squares(row, others))), points, others))


@functools.partial(jax.jit, static_argnums=2)
def _covered(points: Float[Array, " n d"], centers: Float[Array, " m d"], k: int) -> Float[Array, ""]:
    """The share of points within the k-nearest-neighbor ball of at least one center."""

    def reach(row: tuple[Array, Array]) -> Array:
        others = squares(row[0], centers).at[row[1]].set(jnp.inf)
        return -jax.lax.top_k(-others, k)[0][-1]

    reaches = map_rows(reach, (centers, jnp.arange(centers.shape[0])), centers)
    inside = map_rows(lambda row: jnp.any(squares(row, centers) <= reaches), points, centers)
    return jnp.mean(inside, dtype=points.dtype)
