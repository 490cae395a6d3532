"""Records of runs, and the interface through which loops see the run they are in."""

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Key, PyTree
from numpyro.distributions.constraints import Constraint
from numpyro.primitives import CondIndepStackFrame, Messenger

from genkit.vi._runtime._keys import NameHashes


class Site(NamedTuple):
    """Facts about one site after a run: everything objectives use, restricted to what `lax.scan` can return."""

    log_prob: ArrayLike  # of the site's batch shape, mask applied, scale not
    scale: ArrayLike | None
    plates: tuple[CondIndepStackFrame, ...]
    observed: bool
    auxiliary: bool
    address: str
    distribution: dist.Distribution | None  # None for sites inside loops
    support: Constraint | None


class Record:
    """Values and densities of the sites of one run, by name."""

    def __init__(self) -> None:
        self.values: dict[str, PyTree] = {}
        self.auxiliary: dict[str, PyTree] = {}
        self.indices: dict[str, PyTree] = {}  # of subsampled plates
        self.deterministic: dict[str, PyTree] = {}
        self.sites: dict[str, Site] = {}
        self.used: set[str] = set()  # names of given values that some site has taken
        self.observed: set[str] = set()  # by the program itself, not by `condition`
        self.num_given: dict[str, int] = {}  # steps of a loop whose value is given from outside
        self.num_keys = 0  # calls of `numpyro.prng_key`
        self.hashes = NameHashes()

    @property
    def log_density(self) -> Array:
        """The sum of all site log-densities, scales included."""
        parts = [scaled(site) for site in self.sites.values()]
        if not parts:
            return jnp.zeros(())
        return sum(parts[1:], parts[0])


def scaled(site: Site) -> Array:
    """The scalar contribution of a site."""
    if site.scale is None:
        return jnp.sum(site.log_prob)
    return jnp.sum(site.scale * site.log_prob)


class Loop(NamedTuple):
    """One loop around the sites now being run: its number of steps, and the step."""

    length: int
    step: Array | np.integer


class Given(NamedTuple):
    """A value given to a program from outside.

    `current` has the axes of the first `num_sliced` loops already taken off: `lax.scan` slices what it scans over, and
    the gradient of a slice taken inside the loop would be an array as long as the loop at every step.
    """

    whole: PyTree
    current: PyTree
    num_sliced: int = 0


FrameT = TypeVar("FrameT")


class AbstractRun(Messenger, Generic[FrameT]):
    """A program being run, as loops and branches see it.

    Attributes:
        record: what has been collected so far.
        values: the values given for latent sites (empty where sites are drawn).
        key: typed PRNG key of draws outside `E`, or None.
        frame: the frame of the surrounding `E`, or None.
        loops: the loops around the sites now being run, outermost first.
        is_measured: True if densities are collected.
        state: the JAX transformation the program runs under.
    """

    record: Record
    values: dict[str, Given]
    key: Key[Array, ""] | None
    frame: FrameT | None
    loops: tuple[Loop, ...] = ()
    is_measured: bool = True
    state: object = None

    @abc.abstractmethod
    def nested(
        self,
        loop: Loop | None,
        values: dict[str, Given],
        key: Key[Array, ""] | None,
        frame: FrameT | None,
    ) -> contextlib.AbstractContextManager[Record]:
        """Collect one step of a loop (or a branch, for None) apart; its record leaves the loop as arrays."""


def at_step(array: PyTree, loops: Sequence[Loop]) -> PyTree:
    """The entry of a stacked array at the current step of the loops, outermost first."""
    if loops:
        array = jnp.asarray(array)  # NumPy's own arrays cannot be indexed by a traced step
    for loop in loops:
        array = array[loop.step]
    return array


@contextlib.contextmanager
def restored(run: AbstractRun) -> Iterator[None]:
    """Put the state of a run back at exit."""
    before = (run.record, run.values, run.key, run.frame, run.loops, run.state)
    try:
        yield
    finally:
        run.record, run.values, run.key, run.frame, run.loops, run.state = before
