"""Bridge matching onto the light family, from any plan."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Key, Shaped

from genkit._core._checks import check_choice, check_count, check_key
from genkit.bridge._batches import COUPLINGS, coupled_batches, warn_of_couplings
from genkit.bridge._fit_light import run
from genkit.bridge._inputs import Scalar, check_epsilon, check_samples
from genkit.bridge._light_options import LightFit, LightTraining
from genkit.bridge._objectives import MatchingObjective
from genkit.bridge._report import FittedBridge


def fit_matching(
    x0: Shaped[ArrayLike, " n d"],
    x1: Shaped[ArrayLike, " m _"],
    epsilon: Scalar,
    num_components: int,
    *,
    scale: str = "diag",
    coupling: str = "independent",
    num_steps: int = 5000,
    learning_rate: Scalar = 2e-2,
    batch_size: int = 512,
    rank: int = 8,
    t_max: float = 0.99,
    key: Key[Array, ""],
) -> FittedBridge:
    """Fit a light bridge by bridge matching: one regression of its drift, from pairs of any plan (LightSB-M).

    The same family and minimizer as `fit_light`, with more variance per step; for data that come as pairs, or as a
    check of the other route.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        scale: covariance family.
        coupling: `independent`, `sinkhorn` (the entropic plan of each batch) or `paired` (row by row).
        num_steps: optimizer steps.
        learning_rate: as in `fit_light`.
        batch_size: pairs per step.
        rank: columns of the low-rank family.
        t_max: largest time of the regression.
        key: typed PRNG key.

    Returns:
        As `fit_light`; the objective of the report is the regression loss.

    Raises:
        ValueError: as `fit_light`.
        NonFiniteError: if the fit diverges.

    Example:
        >>> import jax, genkit as gk
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> bridge, report = gk.bridge.fit_matching(x, x + 1.0, 0.5, 1, num_steps=5, key=jax.random.key(1))
        >>> report.objective.shape
        (5,)

    Source: Gushchin et al., "Light and optimal Schrödinger bridge matching", ICML 2024.
    """
    check_key(key)
    check_epsilon(epsilon)
    check_choice("coupling", coupling, COUPLINGS)
    check_count("batch_size", batch_size)
    options = LightFit(num_components, scale, num_steps, learning_rate=learning_rate, batch_size=batch_size, rank=rank)
    x0, x1 = check_samples(x0, x1, num_components, scale)
    epsilon = jnp.asarray(epsilon, x1.dtype)
    data = coupled_batches(coupling, x0, x1, epsilon, batch_size)
    training = LightTraining(x0, x1, epsilon, options, data=data, objective=MatchingObjective(t_max))
    fitted = run(training, key)
    warn_of_couplings(fitted.log)
    return fitted
