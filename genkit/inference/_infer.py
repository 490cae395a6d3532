"""The verb `infer` and its result."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key, PyTree

from genkit._core._checks import check_count, check_key
from genkit.inference._draws import Jobs, describe_draws, model_facts
from genkit.inference._missing import with_missing
from genkit.inference._pareto import evidence_bracket
from genkit.inference._posterior import Posterior
from genkit.inference._problem import Problem, discrete_sites
from genkit.inference._traced import ConstantProblem, TracedProblem, as_compiled_argument


@runtime_checkable
class Method(Protocol):
    """An inference method: `run(problem, *, key) -> Posterior`.

    `run` returns its draws; `gk.infer` adds density, likelihood, predictions and deterministic sites.

    Example:
        >>> import genkit as gk
        >>> isinstance(gk.vi.Fit(), gk.inference.Method)
        True
    """

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Draw from the posterior.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            The posterior.
        """
        ...


@runtime_checkable
class PreparingMethod(Protocol):
    """A method that asks for another form of the problem, from which the facts about its draws are computed too.

    Example:
        >>> import genkit as gk
        >>> isinstance(gk.mcmc.NUTS(10, 10), gk.inference.PreparingMethod)
        True
    """

    def prepare(self, problem: Problem) -> Problem:
        """The problem as the method wants it.

        Args:
            problem: model and data.

        Returns:
            The same problem, or one with the same data and another model.
        """
        ...


def infer(
    problem: object,
    method: object,
    *,
    key: Key[Array, ""],
    log_likelihood: bool = True,
    predictive: bool = True,
    log_density: bool = True,
    deterministics: bool = True,
    batch_size: int | None = None,
) -> Posterior:
    """Condition a model on its data.

    Discrete latent sites are summed out (`gk.vi.marginalize`) by the methods that cannot draw them, and drawn
    afterwards given everything else; `attrs["summed_out"]` names them. NaN in observed data are missing values, latent
    like the rest (`gk.vi.impute`); a warning and `attrs["imputed"]` name the sites.

    Density, pointwise likelihood, predictions and deterministic sites are computed after the draws are safe. One that
    fails is left out: a warning and `attrs["failed_<job>"]` say why.

    Args:
        problem: the numpyro model and its arguments.
        method: anything with `run(problem, *, key) -> Posterior`: `gk.mcmc.NUTS(...)`, `gk.mcmc.HMC(...)`,
            `gk.vi.Fit(...)`.
        key: typed PRNG key.
        log_likelihood: compute the log-likelihood of every observation at every draw.
        predictive: draw new observations.
        log_density: compute the log-density of every draw; without it there are no weights and no evidence.
        deterministics: compute the deterministic sites.
        batch_size: draws per compiled call of these four; None chooses as many as produce 64 MiB.

    Returns:
        The posterior. Equal models and shapes compile once per process.

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
    if not isinstance(method, Method):
        raise TypeError(
            f"`method` must have run(problem, *, key), as gk.mcmc.NUTS and gk.vi.Fit do; got {type(method).__name__}."
        )
    check_key(key)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    # Folded before the method splits the key, so that its draws are those of `method.run` with the same key.
    key_facts = jr.fold_in(key, 0)
    jobs = Jobs(log_density, log_likelihood, predictive, deterministics)
    model = problem.model
    problem, masks = with_missing(problem)
    given = problem
    if isinstance(method, PreparingMethod):
        problem = method.prepare(problem)
    result = method.run(problem, key=key)
    if problem is not given:
        names = ", ".join(discrete_sites(given))
        result = dataclasses.replace(result, attrs={**result.attrs, "summed_out": names})
    result = _described(problem, result, jobs, batch_size, key_facts)
    result = dataclasses.replace(result, model=model)
    if masks:
        result = _with_gaps(result, masks)
    khat = result.khat
    if khat is not None and khat > 0.7:
        warnings.warn(
            f"The Pareto shape k-hat of the importance weights is {khat:.2f}, above 0.7: the guide misses parts of the "
            "posterior. Try a richer guide ('full_rank', 'flow'), more steps, or gk.mcmc.NUTS.",
            stacklevel=2,
        )
    return result


def _with_gaps(result: Posterior, masks: dict[str, np.ndarray]) -> Posterior:
    """The observations as they were given, not as they were filled in."""
    observed = dict(result.observed)
    for name, mask in masks.items():
        if name in observed:
            value = np.asarray(observed[name], float)
            shape = mask.shape + (1,) * (value.ndim - mask.ndim)
            observed[name] = np.where(mask.reshape(shape), value, np.nan)
    return dataclasses.replace(result, observed=observed, attrs={**result.attrs, "imputed": ", ".join(sorted(masks))})


def _described(
    problem: Problem, result: Posterior, jobs: Jobs, batch_size: int | None, key: Key[Array, ""]
) -> Posterior:
    """The posterior with every fact that was asked for and that its method has not computed itself."""
    if not result.samples:
        return result
    key_jobs, key_model = jr.split(key)
    lead = len(result.dims)
    shape = np.shape(jax.tree.leaves(result.samples)[0])[:lead]
    flat = jax.tree.map(lambda x: np.reshape(x, (-1, *np.shape(x)[lead:])), result.samples)
    attrs = dict(result.attrs)
    data: TracedProblem | ConstantProblem = as_compiled_argument(problem)
    if isinstance(data, ConstantProblem):
        attrs["data"] = f"constants of the compiled program, because the model needs their values ({data.reason})"
    if result.log_density is not None:
        jobs = jobs._replace(log_density=False)
    with jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
        facts, failures = describe_draws(data, flat, result.params, jobs, batch_size=batch_size, key=key_jobs)
        found = _attempt(lambda: model_facts(problem, {**result.params, **_first(flat)}, key_model), failures)
    for job, reason in failures.items():
        attrs[f"failed_{job}"] = reason
        warnings.warn(f"`{job}` of the draws could not be computed: {reason}. The draws are complete.", stacklevel=3)
    facts = jax.tree.map(lambda x: np.reshape(x, (*shape, *np.shape(x)[1:])), facts)
    changes: dict[str, Any] = {
        "samples": {**result.samples, **facts.get("deterministics", {})},
        "log_likelihood": {**facts.get("log_likelihood", {}), **result.log_likelihood},
        "predictive": {**facts.get("predictive", {}), **result.predictive},
        "attrs": attrs,
    }
    if "log_density" in facts:
        changes["log_density"] = facts["log_density"]
    if found is not None:
        changes["observed"] = {**found.observed, **result.observed}
        changes["plates"] = found.dims
    result = dataclasses.replace(result, **changes)
    weights = result.log_weights
    if weights is not None and result.evidence is None:
        result = dataclasses.replace(result, evidence=evidence_bracket(weights))
    return result


def _first(flat: dict[str, PyTree]) -> dict[str, PyTree]:
    # Loops read their steps with traced indices, which NumPy arrays do not take.
    return jax.tree.map(lambda x: jnp.asarray(x[0]), flat)


def _attempt(job: Callable[[], PyTree], failures: dict[str, str]) -> PyTree | None:
    """The result of one more job after the run; its failure is named like the others."""
    try:
        return job()
    except Exception as error:  # as in `describe_draws`: the draws must not be lost
        failures["observed"] = f"{type(error).__name__}: {error}"
        return None
