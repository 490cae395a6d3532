"""Missing entries of observed sites as latent ones."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Key, PyTree
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK, Messenger

from genkit._core._checks import check, describe
from genkit.inference._problem import Problem, improper_start


class Imputed(eqx.Module):
    """A numpyro model whose missing observations are latent; `impute` makes it.

    Args:
        model: the model.
        masks: for each site its name, the shape of the mask and its bytes; True where a value was observed.
    """

    model: Callable
    masks: tuple[tuple[str, tuple[int, ...], bytes], ...] = eqx.field(static=True)

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> Any:
        """Run the model for numpyro's handlers.

        Args:
            *args: the model's arguments.
            **kwargs: its keyword arguments.

        Returns:
            What the model returns.
        """
        masks = {name: np.frombuffer(data, bool).reshape(shape) for name, shape, data in self.masks}
        handler = _Impute(masks)
        with handler:
            result = self.model(*args, **kwargs)
        left = sorted(set(masks) - handler.met)
        if left:
            raise ValueError(
                f"`masks` must name observed sites of the model; got {left[0]!r} (observed: "
                f"{', '.join(sorted(handler.observed)) or 'none'})."
            )
        return result


class _Impute(Messenger):
    """Draws the missing entries of observed sites."""

    def __init__(self, masks: Mapping[str, Bool[np.ndarray, "..."]]):
        super().__init__()
        self.masks = masks
        self.met: set[str] = set()
        self.observed: set[str] = set()

    def process_message(self, msg: dict) -> None:
        """Fill one site in."""
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        name = msg["name"]
        self.observed.add(name)
        if name not in self.masks:
            return
        self.met.add(name)
        fn = msg["fn"]
        value = jnp.asarray(msg["value"])
        mask = _checked(name, self.masks[name], fn, value)
        if mask.all():
            return
        # What stands where nothing was observed must not make a NaN on the way.
        whole = jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, fn.shape()))
        entries = jnp.reshape(mask, mask.shape + (1,) * (whole.ndim - mask.ndim))
        if fn.support.is_discrete:
            # Member by member, so that it can be summed out along the plate.
            drawn = self._outside(msg, f"{name}_missing", fn.mask(~mask), in_plates=True)
            filled = jnp.where(entries, jnp.where(entries, whole, 0), drawn).astype(whole.dtype)
        else:
            missing = MissingEntries(fn.expand(mask.shape), mask)
            drawn = self._outside(msg, f"{name}_missing", missing, in_plates=False)
            filled = missing.filled(whole, drawn)
        msg["value"] = filled
        # The density of the observed members; the missing ones have their own.
        msg["fn"] = fn.mask(jnp.asarray(mask))

    def _outside(self, msg: dict, name: str, distribution: dist.Distribution, *, in_plates: bool) -> Array:
        """Draw a latent site for the handlers around this one only.

        The plates of the site are inside: they have put their marks on the message, and would refuse another shape.
        """
        place = _NUMPYRO_STACK.index(self)
        inside = _NUMPYRO_STACK[place:]
        del _NUMPYRO_STACK[place:]
        try:
            scale = msg["scale"]
            scaled = numpyro.handlers.scale(scale=1.0 if scale is None else scale)
            if not in_plates:
                with scaled:
                    return jnp.asarray(numpyro.sample(name, distribution))
            with scaled, _Plates(msg["cond_indep_stack"]):
                return jnp.asarray(numpyro.sample(name, distribution))
        finally:
            _NUMPYRO_STACK.extend(inside)


class _Plates(Messenger):
    """Puts a site in plates that have been entered elsewhere."""

    def __init__(self, plates: list):
        super().__init__()
        self.plates = plates

    def process_message(self, msg: dict) -> None:
        """Mark one message."""
        if msg["type"] == "sample":
            msg["cond_indep_stack"].extend(self.plates)


def _checked(name: str, mask: np.ndarray, fn: dist.Distribution, value: Array) -> np.ndarray:
    """The mask over the batch of a site."""
    batch = tuple(fn.batch_shape)
    if fn.event_dim == 0:
        batch = np.broadcast_shapes(batch, np.shape(value))
    if mask.shape == batch:
        return mask
    if fn.event_dim and mask.shape == (*batch, *fn.event_shape):
        raise ValueError(
            f"The mask of site {name!r} must tell whole vectors apart, shape {batch}; got {mask.shape}: vectors of "
            f"{type(fn).__name__} that are partly missing. Mask the whole vector, or write its entries as sites."
        )
    raise ValueError(
        f"The mask of site {name!r} must have the shape {batch} of its members; got {mask.shape}. A step of a loop "
        "that was not observed is left out in the body: `numpyro.sample(name, distribution.mask(seen), obs=...)`."
    )


class MissingEntries(dist.Distribution):
    """The missing members of a continuous site, as one vector of them.

    Args:
        base: the distribution of all members.
        mask: True where a member was observed; concrete.
    """

    def __init__(self, base: dist.Distribution, mask: Bool[np.ndarray, "..."]):
        self.base = base
        self.index = np.nonzero(~mask)
        super().__init__((), (len(self.index[0]), *base.event_shape))

    @property
    def support(self) -> dist.constraints.Constraint:
        """The supports of the missing members."""
        base = self.base.support

        def pick(bound: ArrayLike) -> ArrayLike:
            if np.ndim(bound) == 0:
                return bound
            return jnp.broadcast_to(bound, self.base.batch_shape)[self.index]

        picked = jax.tree.map(pick, base)
        return dist.constraints.independent(picked, 1)

    def filled(self, value: Array, drawn: Array) -> Array:
        """All members, the missing ones as drawn.

        Args:
            value: the observations, anything where they are missing.
            drawn: the missing members.

        Returns:
            An array of the site's shape.
        """
        return value.at[self.index].set(drawn.astype(value.dtype))

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw the missing members.

        Args:
            key: PRNG key.
            sample_shape: leading axes.

        Returns:
            A draw.
        """
        drawn = self.base.sample(key, sample_shape)
        return drawn[(..., *self.index, *(slice(None),) * len(self.base.event_shape))]

    def log_prob(self, value: ArrayLike) -> Array:
        """The joint log-density of the missing members.

        Args:
            value: their values.

        Returns:
            A scalar.
        """
        value = jnp.asarray(value)
        shape = (*self.base.batch_shape, *self.base.event_shape)
        # Members that were observed take the value of one that was not: inside the support, and not counted.
        whole = jnp.broadcast_to(value[0], shape).at[self.index].set(value)
        return jnp.sum(self.base.log_prob(whole)[self.index])


def impute(model: Callable, masks: Mapping[str, Any]) -> Callable:
    """Make missing entries of observed sites latent.

    A missing entry becomes part of the latent site `<site>_missing`: of a continuous site the vector of the missing
    members; of a discrete one all members, of which the observed ones do not count, so that `gk.vi.marginalize` sums
    the missing ones out. What the model does with the site's value sees the observations with the gaps filled in.
    `gk.infer` does this by itself for NaN in observed floating data.

    Args:
        model: a numpyro model.
        masks: for each site a Boolean NumPy array over its members, True where observed (as numpyro's `obs_mask`); or a
            NumPy masked array, whose mask is True where an entry is missing.

    Returns:
        A numpyro model.

    Raises:
        TypeError: if a mask is not Boolean.
        ValueError: when the model is run, for a site that is not observed or a mask of another shape.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     with numpyro.plate("n", 3):
        ...         numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> filled = gk.vi.impute(model, {"y": np.array([True, False, True])})
        >>> measure = gk.vi.program(filled)(np.array([1.0, np.nan, 2.0]))
        >>> round(float(measure.log_density({"y_missing": np.zeros(1)})), 4)
        -5.2568
    """
    check(callable(model), "model", "a numpyro model (a function)", describe(model))
    check(isinstance(masks, Mapping), "masks", "a dict from sites to masks", describe(masks))
    stored = []
    for name, mask in masks.items():
        if isinstance(mask, np.ma.MaskedArray):
            mask = ~np.ma.getmaskarray(mask)
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"`masks[{name!r}]` must be Boolean, True where observed; got dtype {mask.dtype}.")
        stored.append((name, mask.shape, mask.tobytes()))
    return Imputed(model, tuple(stored))


def with_missing(problem: Problem) -> tuple[Problem, dict[str, np.ndarray]]:
    """A problem whose observed NaN are latent.

    Args:
        problem: model and data.

    Returns:
        The problem (the same one if nothing is missing), and for each site with missing values the mask of the others.
    """
    masks = _nan_masks(problem)
    if not masks:
        return problem, {}
    names = sorted(masks)
    counts = ", ".join(f"{name!r} ({int((~masks[name]).sum())} of {masks[name].size})" for name in names)
    warnings.warn(
        f"NaN in the observed data are taken for missing values and drawn with the rest: {counts}. "
        "`gk.vi.impute(model, masks)` says it without this warning; drop the rows to leave them out.",
        stacklevel=3,
    )
    return Problem(impute(problem.model, masks), problem.args, problem.kwargs, name=problem.name), masks


def _nan_masks(problem: Problem) -> dict[str, np.ndarray]:
    """For each observed site with NaN a mask of the members that have none."""
    if not any(_has_nan(leaf) for leaf in jax.tree.leaves((problem.args, problem.kwargs))):
        return {}
    start = numpyro.handlers.substitute(problem.model, substitute_fn=improper_start)
    masks = {}
    try:
        with numpyro.handlers.block(), jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
            seeded = numpyro.handlers.seed(start, jax.random.key(0))
            with numpyro.validation_enabled(False):
                trace = numpyro.handlers.trace(seeded).get_trace(*problem.args, **problem.kwargs)
    except Exception:  # a wrong model is told by the method, in its own words
        return {}
    for name, site in trace.items():
        if site["type"] != "sample" or not site["is_observed"] or not _has_nan(site["value"]):
            continue
        missing = np.isnan(np.asarray(site["value"]))
        events = site["fn"].event_dim
        masks[name] = ~missing.any(tuple(range(missing.ndim - events, missing.ndim)))
    return masks


def _has_nan(leaf: object) -> bool:
    if not eqx.is_array(leaf) and not isinstance(leaf, np.ndarray):
        return False
    array = np.asarray(leaf)
    return bool(np.issubdtype(array.dtype, np.floating) and np.isnan(array).any())
