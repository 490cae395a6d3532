"""The result of inference: draws, and the facts computed from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import ArrayLike, PyTree

from genkit.inference._arviz import summary, to_arviz
from genkit.inference._pareto import pareto_smooth


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

    def to_arviz(
        self, coords: Mapping[str, Sequence] | None = None, dims: Mapping[str, Sequence[str]] | None = None
    ) -> Any:
        """The result as an ArviZ object: `InferenceData` (ArviZ 0.x) or `DataTree` (1.x).

        Args:
            coords: labels by dimension.
            dims: names of the axes of each site, without chain and draw; default the names of its plates.

        Returns:
            Groups posterior, sample_stats (log density, log q, log weight, and what the method counts), and where
            there are any log_likelihood, posterior_predictive, observed_data and optimization.
        """
        return to_arviz(self, coords, dims)

    def summary(self) -> Any:
        """Means, standard deviations and intervals per coordinate; for Markov chains also R-hat and ESS.

        For draws of a guide the attributes of the table hold the evidence and the region it holds for.

        Returns:
            A table (pandas DataFrame).
        """
        return summary(self)
