"""Toy distributions in the plane, and one in space.

Each is a function `(num_samples, *, key) -> array`, traceable, standardized to about unit scale.
"""

import math

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check, check_count


def two_moons(num_samples: int, *, noise: Float[ArrayLike, ""] = 0.05, key: Key[Array, ""]) -> Float[Array, " n 2"]:
    """Two interleaved half circles, centered, with Gaussian noise.

    Args:
        num_samples: number of points.
        noise: standard deviation of the noise; the circles have radius 1.
        key: typed PRNG key.

    Returns:
        Points `(num_samples, 2)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.two_moons(5, key=jax.random.key(0)).shape
        (5, 2)
    """
    check_count("num_samples", num_samples)
    key_moon, key_angle, key_noise = jr.split(key, 3)
    lower = jr.bernoulli(key_moon, 0.5, (num_samples,))
    angle = math.pi * jr.uniform(key_angle, (num_samples,))
    # The upper arc is centered at (-1/2, -1/4), the lower one, turned round, at (1/2, 1/4).
    sign = jnp.where(lower, -1.0, 1.0)
    points = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], axis=1) * sign[:, None]
    return points + noise * jr.normal(key_noise, points.shape)


def ring(
    num_samples: int,
    *,
    num_modes: int = 8,
    radius: Float[ArrayLike, ""] = 2.0,
    noise: Float[ArrayLike, ""] = 0.1,
    key: Key[Array, ""],
) -> Float[Array, " n 2"]:
    """Equal Gaussians evenly spaced on a circle; the first one on the positive first axis.

    Args:
        num_samples: number of points.
        num_modes: number of Gaussians.
        radius: radius of the circle.
        noise: standard deviation of each Gaussian.
        key: typed PRNG key.

    Returns:
        Points `(num_samples, 2)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.ring(5, num_modes=3, key=jax.random.key(0)).shape
        (5, 2)
    """
    check_count("num_samples", num_samples)
    check_count("num_modes", num_modes)
    key_mode, key_noise = jr.split(key)
    angle = 2 * math.pi * jr.randint(key_mode, (num_samples,), 0, num_modes) / num_modes
    points = jnp.asarray(radius) * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + noise * jr.normal(key_noise, points.shape)


def eight_gaussians(
    num_samples: int, *, noise: Float[ArrayLike, ""] = 0.1, key: Key[Array, ""]
) -> Float[Array, " n 2"]:
    """Eight Gaussians on a circle of radius 2: `ring` as it is best known.

    Args:
        num_samples: number of points.
        noise: standard deviation of each Gaussian.
        key: typed PRNG key.

    Returns:
        Points `(num_samples, 2)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.eight_gaussians(5, key=jax.random.key(0)).shape
        (5, 2)
    """
    return ring(num_samples, num_modes=8, noise=noise, key=key)


def swiss_roll(
    num_samples: int, *, dim: int = 2, noise: Float[ArrayLike, ""] = 0.05, key: Key[Array, ""]
) -> Float[Array, " n dim"]:
    """A spiral of one and a half turns, in the plane or rolled out along a third axis.

    Args:
        num_samples: number of points.
        dim: 2 for the spiral, 3 for the roll, whose last coordinate is uniform on [-1, 1].
        noise: standard deviation of the noise; the spiral reaches out to radius 1.5.
        key: typed PRNG key.

    Returns:
        Points `(num_samples, dim)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.swiss_roll(5, dim=3, key=jax.random.key(0)).shape
        (5, 3)
    """
    check_count("num_samples", num_samples)
    check(dim in (2, 3), "dim", "2 or 3", dim)
    key_angle, key_width, key_noise = jr.split(key, 3)
    # From a half turn out: nearer to the center the arms would touch.
    angle = 1.5 * math.pi * (1 + 2 * jr.uniform(key_angle, (num_samples,)))
    radius = angle / (3 * math.pi)
    columns = [radius * jnp.cos(angle), radius * jnp.sin(angle)]
    if dim == 3:
        columns.append(jr.uniform(key_width, (num_samples,), minval=-1.0, maxval=1.0))
    points = jnp.stack(columns, axis=1)
    return points + noise * jr.normal(key_noise, points.shape)


def pinwheel(
    num_samples: int,
    *,
    num_arms: int = 5,
    radial_std: Float[ArrayLike, ""] = 0.3,
    tangential_std: Float[ArrayLike, ""] = 0.1,
    twist: Float[ArrayLike, ""] = 0.25,
    key: Key[Array, ""],
) -> Float[Array, " n 2"]:
    """Gaussian arms on a wheel, each bent by a rotation that grows exponentially with the radius.

    Args:
        num_samples: number of points.
        num_arms: number of arms.
        radial_std: standard deviation along an arm, whose mean radius is 1.
        tangential_std: standard deviation across an arm.
        twist: angle of the rotation at radius 0, in radians.
        key: typed PRNG key.

    Returns:
        Points `(num_samples, 2)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.pinwheel(5, key=jax.random.key(0)).shape
        (5, 2)

    Source: Johnson et al., "Composing Graphical Models with Neural Networks for Structured Representations and Fast
    Inference", NeurIPS 2016, figure 1.
    """
    check_count("num_samples", num_samples)
    check_count("num_arms", num_arms)
    key_arm, key_noise = jr.split(key)
    arm = jr.randint(key_arm, (num_samples,), 0, num_arms)
    radial, tangential = jr.normal(key_noise, (2, num_samples))
    along = 1 + radial_std * radial
    across = tangential_std * tangential
    angle = 2 * math.pi * arm / num_arms + twist * jnp.exp(along)
    cosine = jnp.cos(angle)
    sine = jnp.sin(angle)
    return jnp.stack([along * cosine - across * sine, along * sine + across * cosine], axis=1)


def checkerboard(num_samples: int, *, num_cells: int = 4, key: Key[Array, ""]) -> Float[Array, " n 2"]:
    """Uniform on the dark cells of a checkerboard over [-2, 2] x [-2, 2].

    Args:
        num_samples: number of points.
        num_cells: cells along a side, even; the cell at the lower left corner is dark.
        key: typed PRNG key.

    Returns:
        Points `(num_samples, 2)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.checkerboard(5, key=jax.random.key(0)).shape
        (5, 2)
    """
    check_count("num_samples", num_samples)
    check_count("num_cells", num_cells, 2)
    check(num_cells % 2 == 0, "num_cells", "even", num_cells)
    key_row, key_column, key_place = jr.split(key, 3)
    row = jr.randint(key_row, (num_samples,), 0, num_cells)
    # Dark cells stand in every other column, one further to the right in every other row.
    column = 2 * jr.randint(key_column, (num_samples,), 0, num_cells // 2) + row % 2
    place = jr.uniform(key_place, (num_samples, 2))
    return 4 * (jnp.stack([column, row], axis=1) + place) / num_cells - 2


def two_gaussians(
    num_samples: int,
    *,
    distance: Float[ArrayLike, ""] = 4.0,
    noise: Float[ArrayLike, ""] = 0.5,
    weight: Float[ArrayLike, ""] = 0.5,
    key: Key[Array, ""],
) -> Float[Array, " n 2"]:
    """Two round Gaussians on the first axis, as far from each other as asked.

    Args:
        num_samples: number of points.
        distance: distance between the means, which are symmetric about 0.
        noise: standard deviation of both.
        weight: probability of the one on the right, in [0, 1].
        key: typed PRNG key.

    Returns:
        Points `(num_samples, 2)`.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> gk.data.two_gaussians(5, key=jax.random.key(0)).shape
        (5, 2)
    """
    check_count("num_samples", num_samples)
    key_side, key_noise = jr.split(key)
    side = jnp.where(jr.bernoulli(key_side, weight, (num_samples,)), 0.5, -0.5)
    centers = jnp.stack([distance * side, jnp.zeros_like(side)], axis=1)
    return centers + noise * jr.normal(key_noise, centers.shape)
