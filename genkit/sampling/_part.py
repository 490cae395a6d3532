"""The base class of everything that takes part in a draw and may refuse what it is used with."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
from jaxtyping import PyTree

from genkit.sampling._table import Table


class AbstractPart(eqx.Module):
    """Part of a draw: a guidance, a weight or window inside one, a transform, a population, a source of noise.

    What drivers ask of a part is declared here, with defaults that ask for nothing; a part overrides what applies to
    it. `needs_grid` says whether it uses step numbers or the next noise level, which solvers that choose their own
    steps do not have.
    """

    # A class attribute and not a property: parts may keep it in a field of their own, which a property would forbid.
    needs_grid: ClassVar[bool] = False

    def check_draw(self, table: Table, model: Callable, cond: PyTree) -> None:
        """Raise ValueError if the part does not suit what it is used with; called before anything is compiled.

        Args:
            table: the sampler as data.
            model: the denoiser.
            cond: conditions with leading axis `n`, or `None`; any of the three may hold tracers, which pass.
        """

    def check_table(self, table: Table) -> None:
        """Raise ValueError if the part does not suit a table; called when a sampler is made of both.

        Args:
            table: the sampler as data.
        """
