"""The result of a sampler."""

import equinox as eqx
from jaxtyping import Array, Inexact, Int, PyTree


class Draws(eqx.Module):
    """Draws and what they cost.

    Args:
        value: the draws `(n, *shape)`.
        nfe: network rows executed for each draw, padding of the last batch included; the sum is the number of rows
            really evaluated.
        nfe_logical: evaluations that the method needs for each draw alone.
        info: reports of guidance `(n, rows)` and of populations, by name.
        trajectory: where asked for, the state at each level of the grid `(n, num_steps + 1, *shape)`.
    """

    value: Inexact[Array, " n *shape"]
    nfe: Int[Array, " n"]
    nfe_logical: Int[Array, " n"]
    info: dict[str, PyTree] = eqx.field(default_factory=dict)
    trajectory: Inexact[Array, " n levels *shape"] | None = None
