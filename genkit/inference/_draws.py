"""Facts about draws of a numpyro model: densities, pointwise likelihoods, predictions, deterministic sites."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from genkit.inference._chunks import in_chunks
from genkit.inference._problem import Problem
from genkit.inference._traced import ConstantProblem, TracedProblem


class Jobs(NamedTuple):
    """The facts `gk.infer` computes once the draws are safe; each can be switched off.

    Args:
        log_density: the model's log-density at each draw.
        log_likelihood: the pointwise log-likelihood of the observed sites.
        predictive: new draws of the observed sites.
        deterministics: the deterministic sites.
    """

    log_density: bool = True
    log_likelihood: bool = True
    predictive: bool = True
    deterministics: bool = True

    def names(self) -> tuple[str, ...]:
        """The jobs that are switched on."""
        return tuple(name for name, wanted in self._asdict().items() if wanted)


def trace_at(problem: Problem, values: dict[str, PyTree], *, key: Key[Array, ""]) -> dict[str, dict]:
    """The numpyro trace of a model with its latent sites and parameters set.

    Args:
        problem: model and data.
        values: values of latent and `param` sites.
        key: typed PRNG key for what is random beyond them (subsampling, `numpyro.prng_key`).

    Returns:
        The trace: a dict from site names to numpyro's messages.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> problem = gk.Problem(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> gk.inference.trace_at(problem, {"x": 0.5}, key=jax.random.key(0))["x"]["value"]
        0.5
    """
    seeded = numpyro.handlers.seed(problem.model, key)
    run = numpyro.handlers.trace(numpyro.handlers.substitute(seeded, data=values))
    return run.get_trace(*problem.args, **problem.kwargs)


def _log_prob(site: dict) -> Array:
    """The log-density of a site, mask applied, scale not."""
    if site["intermediates"]:
        return site["fn"].log_prob(site["value"], site["intermediates"])
    return site["fn"].log_prob(site["value"])


def _samples(trace: dict[str, dict]) -> list[dict]:
    return [site for site in trace.values() if site["type"] == "sample"]


def _data_sites(trace: dict[str, dict]) -> list[dict]:
    """Observed sites that hold data; `numpyro.factor` observes an empty array."""
    return [site for site in _samples(trace) if site["is_observed"] and jnp.size(site["value"])]


def unmasked(distribution: dist.Distribution) -> dist.Distribution:
    """The distribution a value is drawn from: a mask changes what is counted, not what is drawn.

    Args:
        distribution: a numpyro distribution, masked or not.

    Returns:
        The same distribution without masks.

    Example:
        >>> import numpyro.distributions as dist
        >>> import genkit as gk
        >>> type(gk.inference.unmasked(dist.Normal(0.0, 1.0).mask(False))).__name__
        'Normal'
    """
    if isinstance(distribution, dist.MaskedDistribution):
        return unmasked(distribution.base_dist)
    return distribution


def mask_of(distribution: dist.Distribution | None) -> ArrayLike | None:
    """The mask around a distribution, over its batch shape; None for none.

    Args:
        distribution: a numpyro distribution.

    Returns:
        A Boolean array or None.

    Example:
        >>> import numpyro.distributions as dist
        >>> import genkit as gk
        >>> gk.inference.mask_of(dist.Normal(0.0, 1.0).mask(False)), gk.inference.mask_of(dist.Normal(0.0, 1.0))
        (False, None)
    """
    mask = None
    inner: Any = distribution
    while isinstance(inner, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(inner, dist.MaskedDistribution):
            own = inner._mask
            if mask is None:
                mask = own
            else:
                mask = mask & own
        inner = inner.base_dist
    return mask


def log_density(problem: Problem, values: dict[str, PyTree], key: Key[Array, ""]) -> Float[Array, ""]:
    """The unnormalized log-density of one draw.

    Args:
        problem: model and data.
        values: values of latent and `param` sites.
        key: typed PRNG key for subsampled plates whose indices are not in `values`.

    Returns:
        The sum of all log-densities, scales included.
    """
    total = jnp.zeros(())
    for site in _samples(trace_at(problem, values, key=key)):
        log_prob = _log_prob(site)
        if site["scale"] is not None:
            log_prob = site["scale"] * log_prob
        total = total + jnp.sum(log_prob)
    return total


def log_likelihood(problem: Problem, values: dict[str, PyTree], key: Key[Array, ""]) -> dict[str, Array]:
    """The log-likelihood of every observation at one draw.

    Args:
        problem: model and data.
        values: values of latent and `param` sites.
        key: typed PRNG key.

    Returns:
        Arrays of each observed site's batch shape; sites that are masked away as a whole, whose density is counted
        elsewhere, are left out.
    """
    trace = trace_at(problem, values, key=key)
    return {site["name"]: _log_prob(site) for site in _data_sites(trace) if mask_of(site["fn"]) is not False}


def predictive(problem: Problem, values: dict[str, PyTree], key: Key[Array, ""]) -> dict[str, Array]:
    """New observations at one draw.

    Args:
        problem: model and data.
        values: values of latent and `param` sites.
        key: typed PRNG key.

    Returns:
        Arrays of each observed site's shape.
    """
    trace = trace_at(problem, values, key=key)
    drawn = {}
    for site in _data_sites(trace):
        # Keys are folded by name, so that a site's draw does not depend on the sites before it.
        drawn[site["name"]] = unmasked(site["fn"]).sample(_fold_name(key, site["name"]))
    return drawn


def deterministics(problem: Problem, values: dict[str, PyTree], key: Key[Array, ""]) -> dict[str, Array]:
    """The deterministic sites at one draw.

    Args:
        problem: model and data.
        values: values of latent and `param` sites.
        key: typed PRNG key.

    Returns:
        Arrays by name.
    """
    trace = trace_at(problem, values, key=key)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}


def _fold_name(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """A key of its own for every name; folded byte by byte, because short checksums of names collide."""
    for start in range(0, len(name.encode()), 4):
        key = jr.fold_in(key, int.from_bytes(name.encode()[start : start + 4], "little"))
    return key


_JOBS: dict[str, Callable[[Problem, dict[str, PyTree], Key[Array, ""]], PyTree]] = {
    "log_density": log_density,
    "log_likelihood": log_likelihood,
    "predictive": predictive,
    "deterministics": deterministics,
}


@eqx.filter_jit
def _run_jobs(
    names: tuple[str, ...],
    data: TracedProblem | ConstantProblem,
    fixed: dict[str, PyTree],
    values: dict[str, PyTree],
    keys: Key[Array, " n"],
) -> dict[str, PyTree]:
    """Some jobs for a chunk of draws: one compiled program for equal models and shapes."""

    def one(value: dict[str, PyTree], key: Key[Array, ""]) -> dict[str, PyTree]:
        return {name: _JOBS[name](data.problem, {**fixed, **value}, key) for name in names}

    return jax.vmap(one)(values, keys)


def describe_draws(
    data: TracedProblem | ConstantProblem,
    values: dict[str, PyTree],
    fixed: dict[str, PyTree],
    jobs: Jobs,
    *,
    batch_size: int | None = None,
    key: Key[Array, ""],
) -> tuple[dict[str, PyTree], dict[str, str]]:
    """Compute facts about draws; a job that fails is left out and named.

    Args:
        data: model and data, as compiled programs take them.
        values: latent sites, each (n, ...).
        fixed: parameters, equal for all draws.
        jobs: the facts wanted.
        batch_size: draws per compiled call; None chooses as many as produce 64 MiB.
        key: typed PRNG key.

    Returns:
        The facts by job, NumPy arrays (n, ...), and the failures by job.
    """
    failures: dict[str, str] = {}
    sizes = 0
    names = []
    one = jax.tree.map(lambda x: x[0], values)
    for name in jobs.names():
        try:
            shapes = eqx.filter_eval_shape(_JOBS[name], data.problem, {**fixed, **one}, key)
        except Exception as error:  # a model may fail in its own way here; the draws must not be lost with it
            failures[name] = f"{type(error).__name__}: {error}"
            continue
        names.append(name)
        sizes += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    count = 1
    if values:
        count = jax.tree.leaves(values)[0].shape[0]
    keys = jr.split(key, count)

    def run(names: tuple[str, ...]) -> dict[str, PyTree]:
        return in_chunks(functools.partial(_run_jobs, names, data, fixed), values, keys, sizes, batch_size)

    if not names:
        return {}, failures
    try:
        return run(tuple(names)), failures
    except Exception:  # one of them fails when it runs: find out which, and keep the others
        facts: dict[str, PyTree] = {}
        for name in names:
            try:
                facts |= run((name,))
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}"
        return facts, failures


class ModelFacts(NamedTuple):
    """Facts about a model that do not depend on the draw.

    Args:
        observed: the data by site.
        dims: names of the plates of every sample site, from left to right; None where an axis is in no plate.
    """

    observed: dict[str, Any]
    dims: dict[str, list[str | None]]


def model_facts(problem: Problem, values: dict[str, PyTree], key: Key[Array, ""]) -> ModelFacts:
    """The data of the observed sites, as the model passes them, and the plates of all sites.

    Args:
        problem: model and data.
        values: one value of the latent sites.
        key: typed PRNG key.

    Returns:
        The facts.
    """
    trace = trace_at(problem, values, key=key)
    observed = {site["name"]: np.asarray(site["value"]) for site in _data_sites(trace)}
    dims = {}
    for site in _samples(trace):
        batch = len(site["fn"].batch_shape)
        names: list[str | None] = [None] * jnp.ndim(site["value"])
        for frame in site["cond_indep_stack"]:
            position = batch + frame.dim
            if 0 <= position < len(names) and np.shape(site["value"])[position] > 1:
                names[position] = frame.name
        dims[site["name"]] = names
    return ModelFacts(observed, dims)
