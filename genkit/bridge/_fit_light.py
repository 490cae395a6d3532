"""Fitting a light bridge to samples of its two ends."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, ArrayLike, Key, Shaped

from genkit._core._checks import check_key
from genkit.bridge._inputs import Scalar, check_epsilon, check_samples
from genkit.bridge._light_options import LightFit, LightTraining
from genkit.bridge._report import FitReport, FittedBridge, summarize
from genkit.training import fit


def fit_light(
    x0: Shaped[ArrayLike, " n d"],
    x1: Shaped[ArrayLike, " m _"],
    epsilon: Scalar,
    num_components: int,
    *,
    scale: str = "diag",
    num_steps: int = 3000,
    init: str = "balanced",
    optimizer: str = "adam",
    polish: int = 0,
    learning_rate: Scalar | None = None,
    batch_size: int | None = None,
    rank: int = 8,
    start_scale: Scalar = 0.1,
    guard: bool | None = None,
    noise: Scalar | None = None,
    key: Key[Array, ""],
) -> FittedBridge:
    r"""Fit a light Schrödinger bridge to unpaired samples of its two ends.

    Minimizes $E_{p_0}\log c(X_0) - E_{p_1}\log v(X_1)$, the Kullback-Leibler divergence from the true plan up to a
    constant. The balanced start puts components on k-means clusters of the target, solves a Riccati equation for each
    scale and a convex problem for the weights, so that no component begins dead; the guard gives a component that
    dies on the way half of the heaviest one.

    Args:
        x0: samples of the source, shape (n, d).
        x1: samples of the target, shape (m, d).
        epsilon: variance of the reference at t = 1.
        num_components: K.
        scale: covariance family: `iso`, `diag`, `full` or `lowrank`.
        num_steps: optimizer steps.
        init: `balanced`, or `published` for the recipe of the source below: random targets as shifts, one scale,
            plain Adam with a constant rate, no guard.
        optimizer: `adam` on minibatches, or `lbfgs` on all samples at once.
        polish: steps of L-BFGS on all samples after Adam: they take out the noise of minibatches.
        learning_rate: step of the log-scales; end points move in widths of the plan, log-weights in nats. Default
            2e-2 with cosine decay; 1e-3 (constant) for the published recipe.
        batch_size: samples of each end per step; default 1024, or 128 for the published recipe.
        rank: columns of the low-rank family.
        start_scale: initial scale of the published recipe.
        guard: revive dead components; by default with `init="balanced"` and Adam.
        noise: standard deviation of normal noise added to the samples whenever they are looked at, in the units of the
            data. It smooths both ends, which keeps fits to few samples from following each of them; choose it, like
            `num_components`, on samples left out. Default none.
        key: typed PRNG key.

    Returns:
        A `gk.Fitted` with the bridge as `.model` and a `FitReport` as `.report`; it also unpacks as (bridge, report).

    Raises:
        ValueError: if epsilon is not positive, the ends differ in dimension, samples are too few for K or degenerate.
        NonFiniteError: if the fit diverges.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> key0, key1, key_fit = jax.random.split(jax.random.key(0), 3)
        >>> x0, x1 = jax.random.normal(key0, (500, 2)), 2.0 + 0.5 * jax.random.normal(key1, (500, 2))
        >>> bridge, report = gk.bridge.fit_light(x0, x1, 0.5, 2, num_steps=50, key=key_fit)
        >>> report.objective.shape
        (50,)

    Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024, algorithm 1.
    """
    check_key(key)
    check_epsilon(epsilon)
    options = LightFit(
        num_components,
        scale,
        num_steps,
        init,
        optimizer,
        polish,
        learning_rate,
        batch_size,
        rank,
        start_scale,
        guard,
        noise,
    )
    x0, x1 = check_samples(x0, x1, num_components, scale)
    return run(LightTraining(x0, x1, jnp.asarray(epsilon, x1.dtype), options), key)


def run(training: LightTraining, key: Key[Array, ""]) -> FittedBridge:
    """Train by `gk.fit`, and report.

    Args:
        training: what to train.
        key: typed PRNG key.

    Returns:
        The result.
    """
    key_fit, key_report = jr.split(key)
    fitted = fit(training.recipe(name="bridge", with_source=False), key=key_fit)
    # L-BFGS has no objective of its own before the descent.
    traces = []
    if training.options.optimizer == "adam":
        traces.append(jnp.asarray(fitted.log["loss"]))
    if training.polish.trace is not None:
        traces.append(training.polish.trace)
    summary = summarize(fitted.model.potential, training.few0, training.few1, key_report)
    report = FitReport(jnp.concatenate(traces), *summary, jnp.asarray(training.revival.count))
    return FittedBridge.extend(fitted, report=report)
