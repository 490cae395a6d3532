"""The one seam to ArviZ: results as `InferenceData` (0.x) or `DataTree` (1.x)."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import PyTree


if TYPE_CHECKING:
    import pandas


_REGION = "the region that the draws of the guide cover; mass it misses is in neither bound"


def _leading(values: Mapping[str, Any], dims: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays with axes (chain, draw, ...): independent draws become one chain."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    if len(dims) == 2:
        return arrays
    return {name: value[None] for name, value in arrays.items()}


def to_arviz(
    posterior: PyTree,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    prior: Mapping[str, Any] | None = None,
    predictions: Mapping[str, Any] | None = None,
) -> Any:
    """Convert a `Posterior`; independent draws are laid out as one chain, which `loo` and plots of both majors accept.

    Args:
        posterior: a `Posterior`, which this module lies below.
        coords: labels by dimension.
        dims: names of the axes of each site, without chain and draw; default the names of its plates.
        prior: draws of all sites before the data.
        predictions: draws for new inputs.

    Returns:
        `arviz.InferenceData` or `xarray.DataTree`.
    """
    import arviz as az

    leading = posterior.dims
    stats = dict(posterior.stats)
    if posterior.log_density is not None:
        stats["log_p"] = posterior.log_density
    if posterior.log_q is not None:
        stats["log_q"] = posterior.log_q
    if posterior.log_weights is not None:
        stats["log_w"] = posterior.log_weights
    # Leave-one-out weights are ratios of tail probabilities: in float32 they overflow to NaN for ordinary models.
    log_likelihood = {name: np.asarray(value, np.float64) for name, value in posterior.log_likelihood.items()}
    groups = {
        "posterior": _leading(posterior.samples, leading),
        "sample_stats": _leading(stats, leading),
        "log_likelihood": _leading(log_likelihood, leading),
        "posterior_predictive": _leading(posterior.predictive, leading),
        "observed_data": {name: np.asarray(value) for name, value in posterior.observed.items()},
    }
    prior = {name: np.asarray(value)[None] for name, value in (prior or {}).items()}
    groups["prior"] = {name: value for name, value in prior.items() if name not in posterior.observed}
    groups["prior_predictive"] = {name: value for name, value in prior.items() if name in posterior.observed}
    groups["predictions"] = _leading(predictions or {}, leading)
    groups = {name: group for name, group in groups.items() if group}
    named = _axis_names(posterior, dims or {})
    options: dict[str, Any] = {"dims": named, "coords": {name: list(labels) for name, labels in (coords or {}).items()}}
    is_tree = int(az.__version__.split(".")[0]) >= 1
    data: Any
    if is_tree:
        data = az.from_dict(groups, **options)
        group = data["posterior"]
    else:
        data = az.from_dict(**groups, **options)
        group = data.posterior
    _add_optimization(data, posterior)
    attrs = {"inference_library": "genkit", **posterior.attrs}
    if posterior.evidence is not None:
        attrs |= {"evidence_lower": posterior.evidence[0], "evidence_upper": posterior.evidence[1]}
        attrs["evidence_region"] = _REGION
    if posterior.khat is not None:
        attrs["khat"] = posterior.khat
    group.attrs.update(attrs)
    return data


def _axis_names(posterior: PyTree, given: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names of the axes of each site: what the caller says, else its plates; other axes are named as ArviZ does."""
    names = {}
    for site, plates in posterior.plates.items():
        if any(plate is not None for plate in plates):
            axes = []
            for i, plate in enumerate(plates):
                axes.append(f"{site}_dim_{i}" if plate is None else plate)
            names[site] = axes
    return {**names, **{site: list(axes) for site, axes in given.items()}}


def _add_optimization(data: Any, posterior: PyTree) -> None:
    """A group of its own for the course of the optimization, dimension `step`."""
    if not posterior.optimization:
        return
    import xarray as xr

    table = xr.Dataset({name: ("step", np.asarray(values)) for name, values in posterior.optimization.items()})
    if isinstance(data, xr.DataTree):
        data["optimization"] = xr.DataTree(table)
        return
    with warnings.catch_warnings():  # ArviZ 0.x warns of any group outside its own schema
        warnings.simplefilter("ignore", UserWarning)
        data.add_groups({"optimization": table})


def summary(posterior: PyTree) -> "pandas.DataFrame":
    """The summary table; R-hat and ESS only for Markov chains, where they mean something.

    Args:
        posterior: the result of `gk.infer`.

    Returns:
        A table whose `attrs` hold the evidence and the region it holds for, where there is one.
    """
    import arviz as az

    kind = "stats"
    if len(posterior.dims) == 2:
        kind = "all"
    table: Any = az.summary(to_arviz(posterior), kind=kind)
    if posterior.evidence is not None:
        table.attrs["evidence"] = posterior.evidence
        table.attrs["evidence_region"] = _REGION
    return table
