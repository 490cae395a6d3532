"""Handlers outside a loop that reach into its body: values, masks and scales that hold all steps at once.

numpyro's handlers act on messages. One that surrounds a loop sees the message of each single step, but what it puts in
(the data of `condition` and `substitute`, the values of `replay` and `do`, an array of `mask` or `scale`) belongs to
the stacked site. An edge around every body notes what a message carried when it left the loop; whatever changed after
that came from outside and is cut to the current step, here and nowhere else:

- an array with one more axis than the site for every loop it passed, of the loops' lengths: the entry of this step;
- an array of the site's own rank: the same at every step;
- a value for the first `n` steps only: given there, and the site is latent at the others (numpyro's convention for
  forecasts);
- anything else is refused.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, PyTree
from numpyro.handlers import seed
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK, Messenger

from genkit.vi._runtime._frame import current_run
from genkit.vi._runtime._record import AbstractRun, Loop, at_step


# Keys under which a message carries our notes; numpyro's own handlers keep notes there too.
_SEEN = "_genkit_seen"
PREFIX = "_genkit_prefix"


class Prefix(NamedTuple):
    """A value given for the first `length` steps of a loop only."""

    length: int
    step: Array | np.integer
    value: Array  # of this step; meaningless from step `length` on

    def fill(self, value: ArrayLike) -> Array:
        """The given value where there is one, else `value`."""
        return jnp.where(self.step < self.length, self.value, value)


class _Seen(NamedTuple):
    """Contents of a message when it left the loops inside of `depth`."""

    kind: str
    value: PyTree
    distribution: dist.Distribution | None
    scale: PyTree
    depth: int


class LoopEdge(Messenger):
    """The edge of a loop's body.

    Args:
        depth: the number of loops outside the edge.
    """

    def __init__(self, depth: int):
        super().__init__()
        self.depth = depth

    def process_message(self, msg: dict) -> None:
        """Note what comes out of the body."""
        if msg["type"] not in ("sample", "param", "deterministic"):
            return
        localize(msg)
        msg[_SEEN] = _Seen(msg["type"], msg["value"], msg.get("fn"), msg.get("scale"), self.depth)

    def postprocess_message(self, msg: dict) -> None:
        """Cut what a handler put in that kept the message from the program's own handler (`do`, `block`)."""
        if _SEEN in msg:
            localize(msg)
            if PREFIX in msg:
                raise ValueError(
                    f"The value put at site {msg['name']!r} from outside its loop must have one entry per step; got "
                    "fewer."
                )


def localize(msg: dict) -> None:
    """Cut everything that handlers outside the loops have put into a message to the current step."""
    seen: _Seen | None = msg.pop(_SEEN, None)
    run = current_run()
    if seen is None or run is None:
        return
    loops = run.loops[seen.depth :]
    if not loops:
        return
    name = msg["name"]
    if msg["type"] == "deterministic":
        if msg["value"] is not seen.value:
            msg["value"] = cut(msg["value"], np.ndim(seen.value), loops, f"The value put at {name!r}")
        return
    if msg["type"] != "sample":
        return
    if seen.kind == "param":
        raise ValueError(
            f"`lift` must not surround a loop that holds the parameter {name!r}: it would be drawn anew at every step. "
            "Take the `param` statement out of the loop, or lift inside the body."
        )
    _localize_distribution(msg, seen, loops)
    if msg["value"] is not seen.value:
        value, prefix = given_at_step(msg["value"], msg, loops)
        msg["value"] = value
        if prefix is not None:
            msg["is_observed"] = False
            msg[PREFIX] = prefix


def cut(array: PyTree, rank: int, loops: Sequence[Loop], what: str) -> PyTree:
    """The part of an array from outside that belongs to the current step of a site of this rank."""
    shape = np.shape(array)
    extra = len(shape) - rank
    if extra <= 0:
        return array
    lengths = tuple(loop.length for loop in loops)
    if shape[:extra] != lengths:
        raise ValueError(
            f"{what} from outside its loop must have the axes of the site, or one more for every loop in front, "
            f"{lengths}; got shape {shape} for a site with {rank} axes."
        )
    return at_step(array, loops)


def given_at_step(value: PyTree, msg: dict, loops: Sequence[Loop]) -> tuple[PyTree, Prefix | None]:
    """The value of this step, or the prefix of a value that covers the first steps only."""
    distribution = msg["fn"]
    shape = np.shape(value)
    rank = len(msg["kwargs"].get("sample_shape", ())) + len(distribution.shape())
    if len(loops) == 1 and len(shape) == rank + 1 and shape[0] < loops[0].length:
        step = loops[0].step
        # Steps past the end read the last entry; `Prefix.fill` replaces it.
        last = max(shape[0] - 1, 0)
        return None, Prefix(shape[0], step, jnp.asarray(value)[jnp.minimum(step, last)])
    return cut(value, rank, loops, f"The value of site {msg['name']!r}"), None


def _localize_distribution(msg: dict, seen: _Seen, loops: Sequence[Loop]) -> None:
    """Cut masks and scales that stand for all steps; plates outside the loop stay as they are."""
    distribution = msg["fn"]
    assert seen.distribution is not None  # every sample message has one
    plate_rank = max((-plate.dim for plate in msg["cond_indep_stack"]), default=0)
    rank = max(len(seen.distribution.batch_shape), plate_rank)
    if msg["scale"] is not seen.scale:
        msg["scale"] = cut(msg["scale"], rank, loops, f"The scale of site {msg['name']!r}")
    if distribution is seen.distribution or len(distribution.batch_shape) <= rank:
        return
    masks = []
    while distribution is not seen.distribution and isinstance(distribution, dist.MaskedDistribution):
        masks.append(cut(distribution._mask, rank, loops, f"The mask of site {msg['name']!r}"))
        distribution = distribution.base_dist
    # `mask` has expanded the site to all steps: begin again from what came out of the body.
    distribution = seen.distribution.expand(np.broadcast_shapes(seen.distribution.batch_shape, *map(np.shape, masks)))
    for mask in masks:
        distribution = distribution.mask(mask)
    msg["fn"] = distribution


def _seeds(run: AbstractRun | None) -> list[seed]:
    """The `seed` handlers inside a program."""
    if run is None or run not in _NUMPYRO_STACK:
        return []
    inside = _NUMPYRO_STACK[_NUMPYRO_STACK.index(run) + 1 :]
    return [handler for handler in inside if isinstance(handler, seed) and handler.rng_key is not None]


@contextlib.contextmanager
def seeded_for_step(run: AbstractRun | None, step: ArrayLike) -> Iterator[None]:
    """Give numpyro's `seed` handlers outside a body a key of this step.

    They split a key they hold at every message; one split inside `lax.scan` would leak out of it, and hidden sites
    would draw the same at every step.
    """
    seeds = _seeds(run)
    before = [handler.rng_key for handler in seeds]
    for handler in seeds:
        handler.rng_key = jr.fold_in(handler.rng_key, step)
    try:
        yield
    finally:
        for handler, key in zip(seeds, before, strict=True):
            handler.rng_key = key


def advance_seeds(run: AbstractRun | None) -> None:
    """Move numpyro's `seed` handlers on after a loop."""
    for handler in _seeds(run):
        handler.rng_key = jr.split(handler.rng_key)[0]
