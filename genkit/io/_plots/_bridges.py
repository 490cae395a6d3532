"""Pictures of bridges: paths in the plane between two clouds."""

import os

import numpy as np
from numpy.typing import ArrayLike

from genkit._core._checks import check, check_finite
from genkit.io._plots._figure import saved_figure


def plot_bridge(
    path: str | os.PathLike[str],
    paths: ArrayLike,
    *,
    source: ArrayLike | None = None,
    target: ArrayLike | None = None,
    title: str = "",
) -> None:
    """Save a picture of paths in the plane of their first two coordinates.

    Args:
        path: the file to write or to replace.
        paths: states along paths, shape (n, num_times, d) with d >= 2.
        source: samples of the distribution at t = 0, shape (m, d), drawn as a cloud.
        target: samples of the distribution at t = 1, shape (m, d), drawn as a cloud.
        title: text above the picture.

    Raises:
        ValueError: if the shape is another one.
        NonFiniteError: if there is NaN or infinity.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> paths = bridge.sample(jnp.zeros((4, 2)), jnp.linspace(0.0, 1.0, 5), key=jax.random.key(0))
        >>> gk.io.plot_bridge("paths.png", paths, title="Four paths")
    """
    paths = np.asarray(paths, np.float64)
    check(paths.ndim == 3 and paths.shape[-1] >= 2, "paths", "of shape (n, num_times, d), d >= 2", f"{paths.shape}")
    check_finite("paths", paths)
    with saved_figure(path, width=5.0, height=5.0) as (panel,):
        for cloud, color in ((source, "tab:blue"), (target, "tab:orange")):
            if cloud is not None:
                cloud = np.asarray(cloud, np.float64)
                panel.scatter(cloud[:, 0], cloud[:, 1], s=4, color=color, alpha=0.3, linewidths=0)
        panel.plot(paths[..., 0].T, paths[..., 1].T, color="black", alpha=0.35, linewidth=0.6)
        panel.scatter(paths[:, 0, 0], paths[:, 0, 1], s=10, color="tab:blue", zorder=3)
        panel.scatter(paths[:, -1, 0], paths[:, -1, 1], s=10, color="tab:orange", zorder=3)
        panel.set_aspect("equal")
        panel.set_title(title)
