"""From draws of a guide or chain to a `Posterior`: densities, likelihoods, predictions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from .._core._checks import NonFiniteError
from .._core._objective import Problem
from ._frame import fold_name
from ._program import Program, evaluate


def describe_draw(model: Program, value: Any, key: Any) -> dict[str, Any]:
    """Everything about one draw: its log-density, pointwise likelihood, predictions, deterministic sites."""
    record = evaluate(model, value, strict=False)
    observed = {name: site for name, site in record.sites.items() if site.observed and site.law is not None}
    data = {name: site for name, site in observed.items() if site.law.event_shape != (0,)}  # factors have no data
    predictive = {}
    for name, site in data.items():
        predictive[name] = site.law.sample(fold_name(key, name))
    return {
        "log_density": record.log_density,
        "log_likelihood": {name: site.log_prob for name, site in data.items()},
        "predictive": predictive,
        "deterministic": record.deterministic,
    }


def observed_values(problem: Problem, value: Any) -> dict[str, Any]:
    """The data of the observed sites, as the model passes them."""
    seen: dict[str, Any] = {}
    model = Program(problem.model, problem.args, problem.kwargs)

    with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=0):
        with numpyro.handlers.substitute(data=value):
            model.fn(*model.args, **model.kwargs)
    for name, site in trace.items():
        if site["type"] == "sample" and site["is_observed"] and jnp.size(site["value"]):
            seen[name] = site["value"]
    return seen


def name_the_culprit(model: Program, guide: Any, key: Any, error: Exception) -> None:
    """After a training went non-finite: look for the site whose log-density is NaN, and say so."""
    for index in range(16):
        value, _ = guide.sample(key=jax.random.fold_in(key, index))
        try:
            evaluate(model, value)
        except NonFiniteError as found:
            raise NonFiniteError(f"{found} (after: {error})") from error
