"""Where the latent sites of a model lie in one unconstrained vector.

Three models show the cases. `x ~ Gamma(2, 1)` has one coordinate and a fixed map, `exp`. `y ~ Uniform(x, x + 1)` has a
map that depends on the value above it: the model is run again, site after site, at every call. A site of three lanes
under the mask (True, False, True) has two coordinates: a masked lane is in no density, so a guide that gave it one
could raise its bound without limit.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import biject_to
from numpyro.distributions.transforms import Transform

from genkit._core._checks import check, is_concrete
from genkit.inference import improper_start, mask_of
from genkit.vi._programs._program import Program, program
from genkit.vi._runtime._record import Record, Site


class Lanes(eqx.Module):
    """The lanes of a masked site that count.

    Args:
        index: their positions in the flattened batch shape.
        mask: True where a lane counts.
    """

    index: Int[Array, " k"]
    mask: Bool[Array, "..."]


class SitesAbove:
    """The transforms of a model whose supports depend on the values of other sites.

    Args:
        model: a numpyro model.
        args: its arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: dict[str, Any]):
        self.model = model
        self.args = args
        self.kwargs = kwargs

    def visit(self, value_of: Callable[[str, Transform], Any]) -> None:
        """Run the model, asking for the value of every latent site in turn.

        Args:
            value_of: called with the name and the transform of a latent site; returns its value.
        """

        def fill(site: dict) -> Any:
            if site["type"] != "sample" or site["is_observed"]:
                return None
            return value_of(site["name"], biject_to(site["fn"].support))

        # The run is none of the surrounding program's: its sites must not reach the handlers outside.
        with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
            numpyro.handlers.substitute(self.model, substitute_fn=fill)(*self.args, **self.kwargs)


class Layout(eqx.Module):
    """Where each latent site lies in the unconstrained vector.

    Args:
        transforms: numpyro bijections from the reals to each site's support.
        names: the sites, in the model's order.
        shapes: their unconstrained shapes.
        lanes: the lanes of each site that count, None where all do; empty for no masks at all.
        above: the model, where supports depend on other sites; `transforms` are then those of one draw.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> layout = vi.Layout((dist.transforms.ExpTransform(),), ("scale",), ((),))
        >>> float(layout.constrain(jnp.zeros(1))[0]["scale"])
        1.0
    """

    transforms: tuple[Transform, ...]
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    lanes: tuple[Lanes | None, ...] = ()
    above: SitesAbove | None = eqx.field(static=True, default=None)

    @property
    def dim(self) -> int:
        """The length of the unconstrained vector."""
        return sum(self._size(i) for i in range(len(self.names)))

    def _lanes(self, i: int) -> Lanes | None:
        if not self.lanes:
            return None
        return self.lanes[i]

    def _size(self, i: int) -> int:
        """The number of coordinates of a site."""
        lanes = self._lanes(i)
        if lanes is None:
            return math.prod(self.shapes[i])
        return lanes.index.size * math.prod(self.shapes[i][lanes.mask.ndim :])

    def split(self, x: Float[Array, " d"]) -> dict[str, Array]:
        """The unconstrained value of every site, zero in lanes that do not count.

        Args:
            x: the vector.

        Returns:
            Arrays by name.
        """
        parts = {}
        start = 0
        for i, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            size = self._size(i)
            part = x[start : start + size]
            lanes = self._lanes(i)
            if lanes is None:
                parts[name] = part.reshape(shape)
            else:
                event = shape[lanes.mask.ndim :]
                rows = jnp.zeros((lanes.mask.size, *event), x.dtype)
                parts[name] = rows.at[lanes.index].set(part.reshape(-1, *event)).reshape(shape)
            start += size
        return parts

    def _join(self, parts: dict[str, Array]) -> Float[Array, " d"]:
        """The inverse of `split`."""
        flat = []
        for i, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            lanes = self._lanes(i)
            part = parts[name]
            if lanes is not None:
                part = part.reshape(lanes.mask.size, *shape[lanes.mask.ndim :])[lanes.index]
            flat.append(jnp.ravel(part))
        return jnp.concatenate(flat)

    def _fixed(self) -> Iterator[tuple[str, Transform]]:
        # Bounds of supports are arrays of the guide, but no parameters: training must leave them alone.
        yield from zip(self.names, jax.lax.stop_gradient(self.transforms), strict=True)

    def _visit(self, value_of: Callable[[str, Transform], Array]) -> None:
        """Ask for the value of every site, given the transform to its support."""
        if self.above is not None:
            self.above.visit(value_of)
            return
        for name, transform in self._fixed():
            value_of(name, transform)

    def log_det(self, name: str, transform: Transform, u: Array, value: Array) -> Float[Array, ""]:
        """The log-determinant of one site's map, over the lanes that count.

        Args:
            name: the site.
            transform: the map to its support.
            u: its unconstrained value.
            value: its value.

        Returns:
            A scalar.
        """
        parts = transform.log_abs_det_jacobian(u, value)
        lanes = self._lanes(self.names.index(name))
        if lanes is not None:
            mask = lanes.mask.reshape(lanes.mask.shape + (1,) * (jnp.ndim(parts) - lanes.mask.ndim))
            parts = jnp.where(mask, parts, 0.0)
        return jnp.sum(parts)

    def constrain_sites(self, x: Float[Array, " d"]) -> tuple[dict[str, Array], dict[str, Array]]:
        """The site values of an unconstrained vector and the log-determinant of each site's map.

        Args:
            x: the vector.

        Returns:
            Two dicts by site.
        """
        parts = self.split(x)
        values: dict[str, Array] = {}
        log_dets: dict[str, Array] = {}

        def value_of(name: str, transform: Transform) -> Array:
            values[name] = transform(parts[name])
            log_dets[name] = self.log_det(name, transform, parts[name], values[name])
            return values[name]

        self._visit(value_of)
        return values, log_dets

    def constrain(self, x: Float[Array, " d"]) -> tuple[dict[str, Array], Float[Array, ""]]:
        """The site values of an unconstrained vector and the log-determinant of the map.

        Args:
            x: the vector.

        Returns:
            A dict of site values, and the log-determinant.
        """
        values, log_dets = self.constrain_sites(x)
        return values, sum(log_dets.values(), jnp.zeros((), x.dtype))

    def unconstrain(self, values: dict[str, Array]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """The inverse of `constrain`, with the log-determinant of `constrain`.

        Args:
            values: dict of site values.

        Returns:
            The vector and the log-determinant.
        """
        parts: dict[str, Array] = {}
        log_dets: list[Array] = []

        def value_of(name: str, transform: Transform) -> Array:
            parts[name] = transform._inverse(values[name])
            log_dets.append(self.log_det(name, transform, parts[name], values[name]))
            return values[name]

        self._visit(value_of)
        return self._join(parts), sum(log_dets, jnp.zeros(()))


def layout_of(model: Callable, *args: Any, **kwargs: Any) -> tuple[Layout, Float[Array, " d"]]:
    """The layout of a numpyro model's latent sites, and a start: the unconstrained prior medians, roughly.

    Args:
        model: a numpyro model.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        The layout and an unconstrained vector at which the model's density is finite.

    Raises:
        ValueError: for a model without continuous latent sites, or with discrete or subsampled ones.
    """
    drawable = numpyro.handlers.substitute(model, substitute_fn=improper_start)
    measure = program(drawable)(*args, **kwargs)
    record = measure.record_draw(jr.key(0))
    check(not record.indices, "model", "without subsampled plates for an automatic guide", str(list(record.indices)))
    latent = {name: site for name, site in record.sites.items() if not site.observed}
    check(bool(latent), "model", "a model with latent sites", "none")
    shapes = []
    transforms = []
    lanes = []
    for name, site in latent.items():
        _check_continuous(name, site)
        transform = biject_to(site.support)
        transforms.append(transform)
        shapes.append(tuple(transform.inverse_shape(jnp.shape(record.values[name]))))
        lanes.append(_counted(site))
    if all(entry is None for entry in lanes):
        lanes = []
    draws, bounds = _prior_draws(measure)
    above = None
    if _differ(bounds):
        above = SitesAbove(model, args, kwargs)
    layout = Layout(tuple(transforms), tuple(latent), tuple(shapes), tuple(lanes), above)
    flat = jax.vmap(lambda values: layout.unconstrain(values)[0])(draws)
    return layout, jnp.clip(jnp.nan_to_num(jnp.median(flat, 0)), -2.0, 2.0)


def _check_continuous(name: str, site: Site) -> None:
    if site.support is not None and not site.support.is_discrete:
        return
    kind = "a site inside a loop"
    if site.support is not None:
        kind = type(site.distribution).__name__
    raise ValueError(
        f"`model` must have continuous latent sites for an automatic guide; got {name!r} ({kind}). Write a "
        "guide program for it (`gk.vi.Fit(guide=...)`), where discrete sites pick a gradient strategy."
    )


def _counted(site: Site) -> Lanes | None:
    """The lanes that a site's mask lets count; None where it has no mask, or one whose values are not known yet."""
    if site.distribution is None:
        return None
    mask = mask_of(site.distribution)
    if mask is None or not is_concrete(mask):
        return None
    mask = np.broadcast_to(np.asarray(mask, bool), site.distribution.batch_shape)
    if mask.all():
        return None
    return Lanes(jnp.asarray(np.flatnonzero(mask)), jnp.asarray(mask))


def _prior_draws(measure: Program) -> tuple[dict[str, Array], list[Array]]:
    """Eight draws of the model in one run, and the bounds of all supports in each."""

    def one(key: Array) -> tuple[dict[str, Array], list[Any]]:
        record: Record = measure.record_draw(key)
        supports = [site.support for site in record.sites.values() if not site.observed]
        return record.values, [leaf for leaf in jax.tree.leaves(supports) if eqx.is_array_like(leaf)]

    return jax.vmap(one)(jax.vmap(jr.key)(jnp.arange(1, 9)))


def _differ(bounds: list[Array]) -> bool:
    """Whether any support changes from draw to draw."""
    return any(bool(jnp.any(bound != bound[:1])) for bound in bounds)
