"""Pictures of draws and of training logs."""

import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from genkit._core._checks import check, check_count, check_finite
from genkit.io._plots._figure import saved_figure
from genkit.storage import atomic_file


def plot_grid(
    path: str | os.PathLike[str],
    images: ArrayLike,
    *,
    columns: int | None = None,
    limits: tuple[float, float] = (-1.0, 1.0),
    scale: int | None = None,
) -> None:
    """Save images as one PNG, side by side in rows, each pixel an exact square.

    Args:
        path: the file to write or to replace.
        images: shape `(n, channels, height, width)` with 1 or 3 channels, or `(n, height, width)`.
        columns: images per row; default about the square root of n.
        limits: the values that become black and white; what lies beyond is clipped.
        scale: side of a pixel's square in the file; default makes an image about 64 wide.

    Raises:
        ValueError: if the shape is another one.
        NonFiniteError: if there is NaN or infinity.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "grid.png"
        >>> gk.io.plot_grid(path, np.zeros((4, 1, 8, 8)))
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    from matplotlib import image as writer

    images = np.asarray(images, np.float64)
    if images.ndim == 3:
        images = images[:, None]
    good = images.ndim == 4 and images.shape[1] in (1, 3) and images.size > 0
    check(good, "images", "of shape (n, 1 or 3, height, width) or (n, height, width)", f"shape {images.shape}")
    check_finite("images", images)
    number, _, _, width = images.shape
    if columns is None:
        columns = int(np.ceil(np.sqrt(number)))
    check_count("columns", columns)
    if scale is None:
        scale = max(1, round(64 / width))
    check_count("scale", scale)
    levels = np.clip((images - limits[0]) / (limits[1] - limits[0]), 0, 1)
    # Whole pixels are repeated: an interpolating plot would blur what a small image shows.
    levels = np.kron(levels, np.ones((1, 1, scale, scale)))
    canvas = _canvas(levels, columns, gap=max(1, scale // 2))
    with atomic_file(path) as file:
        writer.imsave(file, (canvas * 255).round().astype(np.uint8), format="png", origin="upper")


def _canvas(
    levels: Float[np.ndarray, "n channels height width"], columns: int, gap: int
) -> Float[np.ndarray, "tall wide 3"]:
    """Images side by side in rows on gray, with a gap between and around them."""
    number, _, height, width = levels.shape
    rows = -(-number // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 0.5)
    for i, level in enumerate(levels):
        top = gap + i // columns * (height + gap)
        left = gap + i % columns * (width + gap)
        # One channel is shown as gray: broadcasting makes three of it.
        canvas[top : top + height, left : left + width] = np.moveaxis(level, 0, -1)
    return canvas


def plot_log(path: str | os.PathLike[str], log: Mapping[str, Float[np.ndarray, " steps"]], *, smooth: int = 0) -> None:
    """Save the curves of a training log as one PNG, a panel per metric.

    Args:
        path: the file to write or to replace.
        log: metrics by name, as `Fitted.log` has them.
        smooth: steps to average over in the heavy line; default a fiftieth of all.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.png"
        >>> gk.io.plot_log(path, {"loss": 1 / np.arange(1.0, 100.0)})
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    check(len(log) > 0, "log", "a dict with at least one metric", "none")
    with saved_figure(path, len(log)) as panels:
        for panel, (name, values) in zip(panels, log.items(), strict=True):
            values = np.asarray(values, np.float64)
            width = max(1, min(smooth or len(values) // 50, len(values)))
            panel.plot(values, linewidth=0.6, alpha=0.4, color="tab:blue")
            if width > 1:
                mean = np.convolve(values, np.ones(width) / width, "valid")
                # The mean over a window belongs to the window's middle.
                panel.plot(np.arange(len(mean)) + (width - 1) / 2, mean, linewidth=1.4, color="tab:blue")
            panel.set_ylabel(name)
        panels[-1].set_xlabel("step")


def plot_draws(path: str | os.PathLike[str], values: ArrayLike) -> bool:
    """Save the picture that suits the draws: a grid of images, a scatter of points, a histogram of numbers.

    Args:
        path: the file to write or to replace.
        values: shape `(n, *shape)`.

    Returns:
        True if there is a picture for draws of this shape.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> import genkit as gk
        >>> gk.io.plot_draws(pathlib.Path(tempfile.mkdtemp()) / "draws.png", np.zeros((5, 2)))
        True
    """
    values = np.asarray(values)
    shape = values.shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3):
        plot_grid(path, values)
        return True
    if shape not in ((2,), (1,), ()):
        return False
    with saved_figure(path, height=4.0) as (panel,):
        if shape == (2,):
            panel.scatter(values[:, 0], values[:, 1], s=4, alpha=0.6, linewidths=0)
            panel.set_aspect("equal")
        else:
            panel.hist(values.reshape(-1), bins="auto", density=True)
    return True
