"""The result of inference: draws, and the facts computed from them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PyTree

from genkit._core._checks import check_count, check_key
from genkit.inference._arviz import summary, to_arviz
from genkit.inference._pareto import pareto_smooth
from genkit.inference._predict import draw_predictions


class Posterior(eqx.Module):
    r"""Draws of a posterior and the facts computed from them.

    Args:
        samples: site values; axes (chain, draw, ...) for Markov chains, (draw, ...) for independent draws.
        log_density: unnormalized log posterior density of each draw, up to the model's own constants; None where it
            was switched off or failed.
        dims: names of the leading axes, ("chain", "draw") or ("draw",).
        log_q: log-density of the guide at each draw; None for Markov chains.
        stats: further arrays per draw (divergences, tree sizes, energies, ...).
        log_likelihood: pointwise log-likelihood of the observed sites.
        predictive: draws of the observed sites.
        observed: the data.
        optimization: arrays per optimization step (objective, ...).
        guide: the fitted guide.
        params: fitted values of the model's `numpyro.param` sites.
        evidence: (lower, upper) estimates of the log evidence. They hold for the region the draws cover: mass of the
            posterior that the guide never reaches is in neither of them.
        plates: names of the plates of each site's axes, None where an axis is in no plate.
        model: the model the draws belong to, for predictions.
        attrs: short facts for the record; `failed_<job>` says why a fact is missing.

    Example:
        >>> import numpy as np
        >>> import genkit as gk
        >>> samples, log_p, log_q = {"x": np.zeros(2)}, np.array([-1.0, -2.0]), np.array([-1.5, -2.0])
        >>> gk.Posterior(samples, log_p, ("draw",), log_q=log_q).log_weights
        array([0.5, 0. ])
    """

    samples: dict[str, PyTree]
    log_density: ArrayLike | None
    dims: tuple[str, ...] = eqx.field(static=True)
    log_q: ArrayLike | None = eqx.field(default=None, kw_only=True)
    stats: dict[str, PyTree] = eqx.field(default_factory=dict, kw_only=True)
    log_likelihood: dict[str, PyTree] = eqx.field(default_factory=dict, kw_only=True)
    predictive: dict[str, PyTree] = eqx.field(default_factory=dict, kw_only=True)
    observed: dict[str, PyTree] = eqx.field(default_factory=dict, kw_only=True)
    optimization: dict[str, PyTree] = eqx.field(default_factory=dict, kw_only=True)
    guide: PyTree = eqx.field(default=None, kw_only=True)
    params: dict[str, PyTree] = eqx.field(default_factory=dict, kw_only=True)
    evidence: tuple[float, float] | None = eqx.field(default=None, kw_only=True)
    plates: dict[str, list[str | None]] = eqx.field(default_factory=dict, kw_only=True)
    model: Callable | None = eqx.field(default=None, kw_only=True)
    attrs: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)

    @property
    def log_weights(self) -> np.ndarray | None:
        """Log p - log q of each independent draw; None for Markov chains and without a log-density."""
        if self.log_q is None or self.log_density is None:
            return None
        return np.asarray(self.log_density, np.float64) - np.asarray(self.log_q, np.float64)

    @property
    def khat(self) -> float | None:
        """The Pareto shape of the importance weights: above 0.7 the guide is no good stand-in. None for chains."""
        weights = self.log_weights
        if weights is None:
            return None
        return pareto_smooth(weights)[1]

    def smoothed_weights(self) -> np.ndarray:
        """Pareto-smoothed importance weights of the draws, with mean 1.

        Returns:
            Array (draw,).

        Raises:
            ValueError: for Markov chains, which need none.
        """
        weights = self.log_weights
        if weights is None:
            raise ValueError(
                "`posterior` must be made of draws from a guide; got Markov chains, which need no weights."
            )
        return np.exp(pareto_smooth(weights)[0])

    def predict(
        self, *args: PyTree, key: Key[Array, ""], batch_size: int | None = None, **kwargs: PyTree
    ) -> dict[str, np.ndarray]:
        """Draw what the model draws with other arguments, its latent sites from the posterior.

        Pass the new inputs, and None where the observations were. A plate that has got more members keeps the old ones
        and draws the new ones from the model; a loop of numpyro's that has got longer goes on from its last state.

        Args:
            *args: the model's arguments.
            key: typed PRNG key.
            batch_size: draws per compiled call; None chooses as many as produce 64 MiB.
            **kwargs: the model's keyword arguments.

        Returns:
            Arrays with the posterior's leading axes: observations that are not given, sites that grew, and
            deterministic sites.

        Raises:
            ValueError: for a posterior without a model, if everything is observed, and for sites that have changed
                their shape otherwise than by growing.

        Example:
            >>> import jax, numpy as np, numpyro, numpyro.distributions as dist
            >>> import genkit as gk
            >>> def line(x, y):
            ...     slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
            ...     numpyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
            >>> x = np.arange(4.0)
            >>> method = gk.vi.Fit(num_steps=200, num_samples=100)
            >>> posterior = gk.infer(gk.Problem(line, (x, 2.0 * x)), method, key=jax.random.key(0))
            >>> posterior.predict(np.array([10.0, 20.0]), None, key=jax.random.key(1))["y"].shape
            (100, 2)
        """
        if self.model is None:
            raise ValueError(
                "`posterior` must know its model to predict; got one without. `gk.infer` keeps it; a loaded posterior "
                "gets it back with `dataclasses.replace(posterior, model=model)`."
            )
        check_key(key)
        lead = len(self.dims)
        shape = np.shape(jax.tree.leaves(self.samples)[0])[:lead]
        flat = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[lead:])), self.samples)
        drawn = draw_predictions(self.model, args, kwargs, flat, self.params, key, batch_size)
        return jax.tree.map(lambda x: np.reshape(x, (*shape, *np.shape(x)[1:])), drawn)

    def resample(self, num_samples: int, *, key: Key[Array, ""]) -> "Posterior":
        """Draws of equal weight: those of a guide by their smoothed importance weights, those of chains at random.

        Args:
            num_samples: number of draws.
            key: typed PRNG key.

        Returns:
            A posterior of independent draws.

        Example:
            >>> import jax, numpy as np
            >>> import genkit as gk
            >>> log_p, log_q = np.array([0.0, -50.0]), np.zeros(2)
            >>> posterior = gk.Posterior({"x": np.arange(2.0)}, log_p, ("draw",), log_q=log_q)
            >>> posterior.resample(3, key=jax.random.key(0)).samples["x"]
            array([0., 0., 0.])
        """
        check_count("num_samples", num_samples)
        check_key(key)
        lead = len(self.dims)
        count = math.prod(np.shape(jax.tree.leaves(self.samples)[0])[:lead])
        if self.log_weights is None:
            rows = np.asarray(jr.choice(key, count, (num_samples,)))
        else:
            # Equally spaced points of the cumulative weights, under one random shift.
            cumulative = np.cumsum(self.smoothed_weights())
            points = (np.arange(num_samples) + float(jr.uniform(key))) / num_samples
            rows = np.minimum(np.searchsorted(cumulative / cumulative[-1], points, side="right"), count - 1)

        def take(tree: PyTree) -> PyTree:
            return jax.tree.map(lambda x: np.reshape(x, (count, *np.shape(x)[lead:]))[rows], tree)

        return dataclasses.replace(
            self,
            samples=take(self.samples),
            log_density=take(self.log_density),
            dims=("draw",),
            log_q=None,
            stats={},
            log_likelihood=take(self.log_likelihood),
            predictive=take(self.predictive),
        )

    def to_arviz(
        self,
        coords: Mapping[str, Sequence] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        *,
        prior: Mapping[str, ArrayLike] | None = None,
        predictions: Mapping[str, ArrayLike] | None = None,
    ) -> Any:
        """The result as an ArviZ object: `InferenceData` (ArviZ 0.x) or `DataTree` (1.x).

        Args:
            coords: labels by dimension.
            dims: names of the axes of each site, without chain and draw; default the names of its plates.
            prior: draws of `Problem.prior`, for the groups prior and prior_predictive.
            predictions: the result of `predict`, for the group predictions.

        Returns:
            Groups posterior, sample_stats (log density, log q, log weight, and what the method counts), and where
            there are any log_likelihood, posterior_predictive, observed_data and optimization.
        """
        return to_arviz(self, coords, dims, prior or {}, predictions or {})

    def summary(self) -> Any:
        """Means, standard deviations and intervals per coordinate; for Markov chains also R-hat and ESS.

        For draws of a guide the attributes of the table hold the evidence and the region it holds for.

        Returns:
            A table (pandas DataFrame).
        """
        return summary(self)
