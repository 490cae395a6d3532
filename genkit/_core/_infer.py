"""The verb `infer` and its result."""

import warnings
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Key, PyTree

from ._checks import check_key
from ._infer_psis import pareto_smooth
from ._objective import Problem


class Posterior(eqx.Module):
    r"""What inference found.

    Args:
        samples: site values; axes (chain, draw, ...) for Markov chains, (draw, ...) for independent draws.
        log_density: unnormalised log posterior density of each draw, up to the model's own constants.
        dims: names of the leading axes, ("chain", "draw") or ("draw",).
        log_q: log-density of the guide at each draw; None for Markov chains.
        stats: further arrays per draw (divergences, tree sizes, ...).
        log_likelihood: pointwise log-likelihood of the observed sites.
        predictive: draws of the observed sites.
        observed: the data.
        optimization: arrays per optimization step (objective, ...).
        guide: the fitted guide.
        evidence: (lower, upper) estimates bracketing the log evidence.
        attrs: short facts for the record.

    Example:
        >>> import numpy as np
        >>> import genkit as gk
        >>> samples, log_p, log_q = {"x": np.zeros(2)}, np.array([-1.0, -2.0]), np.array([-1.5, -2.0])
        >>> gk.Posterior(samples, log_p, ("draw",), log_q=log_q).log_weights
        array([0.5, 0. ])
    """

    samples: dict[str, Any]
    log_density: Any
    dims: tuple[str, ...] = eqx.field(static=True)
    log_q: Any = eqx.field(default=None, kw_only=True)
    stats: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)
    log_likelihood: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)
    predictive: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)
    observed: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)
    optimization: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)
    guide: PyTree = eqx.field(default=None, kw_only=True)
    evidence: tuple[float, float] | None = eqx.field(default=None, kw_only=True)
    attrs: dict[str, Any] = eqx.field(default_factory=dict, kw_only=True)

    @property
    def log_weights(self) -> np.ndarray | None:
        """Log p - log q of each independent draw; None for Markov chains."""
        if self.log_q is None:
            return None
        return np.asarray(self.log_density, np.float64) - np.asarray(self.log_q, np.float64)

    @property
    def khat(self) -> float | None:
        """The Pareto shape of the importance weights: above 0.7 the guide is no good stand-in. None for chains."""
        weights = self.log_weights
        return None if weights is None else pareto_smooth(weights)[1]

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

    def to_arviz(self) -> Any:
        """The result as an ArviZ object: `InferenceData` (ArviZ 0.x) or `DataTree` (1.x).

        Returns:
            Groups posterior, sample_stats (log density, log q, log weight), and where there are any log_likelihood,
            posterior_predictive, observed_data and optimization.
        """
        from ._arviz import to_arviz

        return to_arviz(self)

    def summary(self) -> Any:
        """Means, standard deviations and intervals per coordinate; for Markov chains also R-hat and ESS.

        Returns:
            A table (pandas DataFrame).
        """
        from ._arviz import summary

        return summary(self)


def infer(problem: Problem, method: Any, *, key: Key[Array, ""]) -> Posterior:
    """Condition a model on its data.

    Args:
        problem: the numpyro model and its arguments.
        method: anything with `run(problem, *, key) -> Posterior`: `gk.mcmc.NUTS(...)`, `gk.mcmc.HMC(...)`,
            `gk.vi.Fit(...)`.
        key: typed PRNG key.

    Returns:
        The posterior.

    Raises:
        TypeError: if `problem` is no `gk.Problem` or `method` cannot run.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> method = gk.vi.Fit(num_steps=200, num_samples=100)
        >>> gk.infer(gk.Problem(model, (1.0,)), method, key=jax.random.key(0)).samples["x"].shape
        (100,)
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"`problem` must be a gk.Problem(model, args); got {type(problem).__name__}.")
    if not callable(getattr(method, "run", None)):
        raise TypeError(
            f"`method` must have run(problem, *, key), as gk.mcmc.NUTS and gk.vi.Fit do; got {type(method).__name__}."
        )
    check_key(key)
    result = method.run(problem, key=key)
    khat = result.khat
    if khat is not None and khat > 0.7:
        warnings.warn(
            f"The Pareto shape k-hat of the importance weights is {khat:.2f}, above 0.7: the guide misses parts of the "
            "posterior. Try a richer guide (fullrank, flow), more steps, or gk.mcmc.NUTS.",
            stacklevel=2,
        )
    return result
