"""Handwritten digits, 8 x 8: the smallest real images."""

import equinox as eqx
import numpy as np
from jaxtyping import Float, Int


_NUM_TEST = 397
_SPLIT_SEED = 0


class Digits(eqx.Module):
    """The digits with their fixed split; a pixel is `x = (k - 8) / 8` in [-1, 1] for the ink level `k` in 0, ..., 16.

    Args:
        x_train: training images.
        y_train: training labels, 0 to 9.
        x_test: held-out images.
        y_test: held-out labels.
    """

    x_train: Float[np.ndarray, " 1400 1 8 8"]
    y_train: Int[np.ndarray, " 1400"]
    x_test: Float[np.ndarray, " 397 1 8 8"]
    y_test: Int[np.ndarray, " 397"]


def digits() -> Digits:
    """Handwritten digits: 1,797 gray images of 8 by 8 pixels in ten classes, split 1,400 to 397.

    The split is fixed and stratified: every class is held out in proportion, at random within the class.

    Returns:
        A `Digits` with float32 images `x_train` (1400, 1, 8, 8) and `x_test` (397, 1, 8, 8) in [-1, 1] and int32 labels
        `y_train` (1400,) and `y_test` (397,). Raw ink levels are `8 * x + 8`.

    Example:
        >>> import genkit as gk
        >>> digits = gk.data.digits()
        >>> digits.x_train.shape, digits.x_test.shape
        ((1400, 1, 8, 8), (397, 1, 8, 8))

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, as
    shipped with scikit-learn.
    """
    from sklearn.datasets import load_digits  # takes about a second to import

    images, labels = load_digits(return_X_y=True)
    x = ((images - 8) / 8).astype(np.float32).reshape(-1, 1, 8, 8)
    y = labels.astype(np.int32)
    test = _held_out(y)
    return Digits(x[~test], y[~test], x[test], y[test])


def _held_out(labels: np.ndarray) -> np.ndarray:
    """A mask of the held-out examples: shares of the classes by largest remainder, members at random."""
    counts = np.bincount(labels)
    exact = counts * _NUM_TEST / len(labels)
    share = np.floor(exact).astype(int)
    share[np.argsort(share - exact, kind="stable")[: _NUM_TEST - share.sum()]] += 1
    # The legacy generator, because its stream is frozen across NumPy versions.
    generator = np.random.RandomState(_SPLIT_SEED)
    mask = np.zeros(len(labels), bool)
    for label, size in enumerate(share):
        mask[generator.permutation(np.flatnonzero(labels == label))[:size]] = True
    return mask
