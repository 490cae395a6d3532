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
        _check_labels(hooks.guidance, model)


def check_parts(tree: Any, table: Any, model: Any, cond: Any) -> None:
    """Call `check_draw` of every module inside `tree` that has one."""

    def visit(node: Any) -> bool:
        if isinstance(node, eqx.Module) and hasattr(node, "check_draw"):
            node.check_draw(table, model, cond)  # pyright: ignore[reportAttributeAccessIssue]
        return False

    jax.tree.leaves(tree, is_leaf=visit)


def _check_labels(guidance: Guidance, model: Any) -> None:
    """Refuse slots whose label the model does not know."""
    for slot in guidance.slots():
        labels = getattr(model if slot.net is None else slot.net, "num_labels", None)
        if labels is None or slot.cond is None or isinstance(slot.cond, str) or not is_concrete(slot.cond):
            continue
        value = np.asarray(slot.cond)
        if jnp.issubdtype(value.dtype, jnp.integer):
            ok = bool(np.all((value >= -1) & (value < labels)))
            check(ok, "cond", f"a label from 0 to {labels - 1} in a guidance, or -1 for none", str(value))
