"""The one seam to ArviZ: results as `InferenceData` (0.x) or `DataTree` (1.x)."""

from typing import Any

import numpy as np


def _leading(values: dict[str, Any], dims: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays with axes (chain, draw, ...): independent draws become one chain."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return arrays if len(dims) == 2 else {name: value[None] for name, value in arrays.items()}


def to_arviz(posterior: Any) -> Any:
    """Convert a `Posterior`; independent draws are laid out as one chain, which `loo` and plots of both majors accept.

    Args:
        posterior: the result of `gk.infer`.

    Returns:
        `arviz.InferenceData` or `xarray.DataTree`.
    """
    import arviz as az

    dims = posterior.dims
    stats = {"log_p": posterior.log_density, **posterior.stats}
    if posterior.log_q is not None:
        stats |= {"log_q": posterior.log_q, "log_w": posterior.log_weights}
    groups = {
        "posterior": _leading(posterior.samples, dims),
        "sample_stats": _leading(stats, dims),
        "log_likelihood": _leading(posterior.log_likelihood, dims),
        "posterior_predictive": _leading(posterior.predictive, dims),
        "observed_data": {name: np.asarray(value) for name, value in posterior.observed.items()},
    }
    groups = {name: group for name, group in groups.items() if group}
    data: Any
    if int(az.__version__.split(".")[0]) >= 1:
        data = az.from_dict(groups)
    else:
        data = az.from_dict(**groups)
    _add_optimization(data, posterior)
    attrs = {"inference_library": "genkit", **posterior.attrs}
    if posterior.evidence is not None:
        attrs |= {"evidence_lower": posterior.evidence[0], "evidence_upper": posterior.evidence[1]}
    if posterior.khat is not None:
        attrs["khat"] = posterior.khat
    group = data["posterior"] if int(az.__version__.split(".")[0]) >= 1 else data.posterior
    group.attrs.update(attrs)
    return data


def _add_optimization(data: Any, posterior: Any) -> None:
    """A group of its own for the course of the optimization, dimension `step`."""
    if not posterior.optimization:
        return
    import xarray as xr

    table = xr.Dataset({name: ("step", np.asarray(values)) for name, values in posterior.optimization.items()})
    if hasattr(data, "add_groups"):
        import warnings

        with warnings.catch_warnings():  # ArviZ 0.x warns of any group outside its own schema
            warnings.simplefilter("ignore", UserWarning)
            data.add_groups({"optimization": table})
    else:
        data["optimization"] = xr.DataTree(table)


def summary(posterior: Any) -> Any:
    """The summary table; R-hat and ESS only for Markov chains, where they mean something.

    Args:
        posterior: the result of `gk.infer`.

    Returns:
        A table (pandas DataFrame).
    """
    import arviz as az

    kind = "all" if len(posterior.dims) == 2 else "stats"
    return az.summary(to_arviz(posterior), kind=kind)
