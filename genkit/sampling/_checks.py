"""Model, sampler, guidance and conditions checked against each other, before anything is compiled."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, PyTree

from genkit._core._checks import fail
from genkit._core._known import is_known
from genkit.sampling._denoiser import as_denoiser
from genkit.sampling._guidance import Guidance, check_parts
from genkit.sampling._hooks import collect_hooks
from genkit.sampling._table import Table


# Ends of a range are compared up to rounding in single precision.
_SLACK = 1e-5


def check_guidance(guidance: PyTree, table: Table, model: Callable, cond: PyTree) -> None:
    """Let every part of a guidance check the table, the model and the conditions it is used with.

    Args:
        guidance: whatever `genkit.sample` takes as `guidance`.
        table: the sampler as data.
        model: the denoiser.
        cond: conditions with leading axis `n`, or `None`. Values of all may be tracers, which pass.

    Raises:
        ValueError: if something does not fit, as the part that checks it says.
    """
    hooks = collect_hooks(guidance)
    check_parts(hooks, table, model, cond)
    if hooks.guidance is not None:
        _check_labels(hooks.guidance, model, cond)


def check_net_labels(name: str, net: Callable, cond: PyTree) -> None:
    """Refuse labels that a network does not know.

    Args:
        name: the argument that brought the network, or the labels.
        net: a denoiser; those that do not tell their number of labels pass.
        cond: labels of any shape; tracers and other conditions pass.

    Raises:
        ValueError: if a label is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.diffusion.EmpiricalDenoiser(jnp.zeros((2, 1)), labels=jnp.array([0, 1]))
        >>> gk.sampling.check_net_labels("cond", data, jnp.array([0, 1, -1]))
    """
    if cond is None or isinstance(cond, str) or not is_known(cond):
        return
    labels = as_denoiser(net).num_labels
    if labels is None:
        return
    values = np.asarray(cond).reshape(-1)
    if jnp.issubdtype(values.dtype, jnp.integer):
        wrong = values[(values < -1) | (values >= labels)]
        if wrong.size:
            fail(name, f"used with labels from 0 to {labels - 1}, or -1 for none", f"{wrong[0]}")


def _check_labels(guidance: Guidance, model: Callable, cond: PyTree) -> None:
    """Refuse labels that the networks of a guidance do not know: its own, and those of the draws."""
    for slot in guidance.slots():
        own = None
        if not isinstance(slot.cond, str):
            own = slot.cond
        if slot.net is None:
            check_net_labels("cond", model, own)
        elif isinstance(slot.cond, str):
            check_net_labels(slot.name.rpartition(".")[2], slot.net, cond)
        else:
            check_net_labels(slot.name.rpartition(".")[2], slot.net, own)


def check_levels(levels: ArrayLike | None, denoiser: Callable) -> None:
    """Refuse noise levels outside the range of a denoiser, where both are known.

    Args:
        levels: noise levels; zero, where samplers end and networks are not asked, passes. Where they are unknown
            (`None`) or traced nothing is checked.
        denoiser: a denoiser, with its `noise_range`.

    Raises:
        ValueError: naming the level and the range.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> network = gk.diffusion.Preconditioned(lambda x, t, cond: x, "eps", schedule=gk.diffusion.VP(0.1, 20.0))
        >>> gk.sampling.check_levels(jnp.array([1.0, 0.1]), network)
    """
    if levels is None or not is_known(levels):
        return
    bounds = as_denoiser(denoiser).noise_range
    if bounds is None:
        return
    low, high = bounds
    asked = np.atleast_1d(np.asarray(levels, np.float64))
    outside = asked[(asked > 0) & ((asked < low * (1 - _SLACK)) | (asked > high * (1 + _SLACK)))]
    if outside.size:
        hint = "Choose the ends of the grid within, for example by `time_uniform(schedule, ...)`."
        expected = f"within the noise levels {low:.4g} to {high:.4g} of the model's schedule"
        fail("sampler", expected, f"level {outside[0]:.4g}", hint)
