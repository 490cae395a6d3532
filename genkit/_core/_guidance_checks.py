"""What a guidance is used with, checked before anything is compiled."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._checks import check, is_concrete
from ._guidance import Guidance, collect_hooks


def check_guidance(guidance: Any, table: Any, model: Any, cond: Any) -> None:
    """Let every part of a guidance check the table, the model and the conditions it is used with.

    Any module inside may define `check_draw(table, model, cond)` and raise there. Values may be tracers, which pass.

    Args:
        guidance: whatever `genkit.sample` takes as `guidance`.
        table: the sampler as data.
        model: the denoiser.
        cond: conditions with leading axis `n`, or `None`.

    Raises:
        ValueError: if something does not fit, as the part that checks it says.
    """
    hooks = collect_hooks(guidance)
    check_parts(hooks, table, model, cond)
    if hooks.guidance is not None:
        _check_labels(hooks.guidance, model, cond)


def check_parts(tree: Any, table: Any, model: Any, cond: Any) -> None:
    """Call `check_draw` of every module inside `tree` that has one."""

    def visit(node: Any) -> bool:
        if isinstance(node, eqx.Module) and hasattr(node, "check_draw"):
            node.check_draw(table, model, cond)  # pyright: ignore[reportAttributeAccessIssue]
        return False

    jax.tree.leaves(tree, is_leaf=visit)


def check_net_labels(name: str, net: Any, cond: Any) -> None:
    """Refuse labels that a network does not know.

    Args:
        name: the argument that brought the network, or the labels.
        net: a denoiser; those that do not tell their number of labels pass.
        cond: labels of any shape; tracers and other conditions pass.

    Raises:
        ValueError: if a label is out of range.
    """
    labels = getattr(net, "num_labels", None)
    if labels is None or cond is None or isinstance(cond, str) or not is_concrete(cond):
        return
    values = np.asarray(cond).reshape(-1)
    if jnp.issubdtype(values.dtype, jnp.integer):
        wrong = values[(values < -1) | (values >= labels)]
        if wrong.size:
            check(False, name, f"used with labels from 0 to {labels - 1}, or -1 for none", f"{wrong[0]}")


def _check_labels(guidance: Guidance, model: Any, cond: Any) -> None:
    """Refuse labels that the networks of a guidance do not know: its own, and those of the draws."""
    for slot in guidance.slots():
        name = slot.name.rpartition(".")[2]
        if slot.net is not None:
            check_net_labels(name, slot.net, cond if isinstance(slot.cond, str) else slot.cond)
        elif not isinstance(slot.cond, str):
            check_net_labels("cond", model, slot.cond)
