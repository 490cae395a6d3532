"""Automatic guides: laws on the unconstrained space of a model's latent sites."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree
from numpyro.distributions import biject_to

from .._core._checks import check, check_count, check_key, check_positive
from .._core._measure import Measure
from ._guide_bases import AbstractBase, Coupling, CouplingFlow, DiagonalNormal, FullNormal, LowRankNormal
from ._laws import lane_shape, lanes, unmask
from ._program import program
from ._run import Record


class Layout(eqx.Module):
    """Where each latent site lies in the unconstrained vector.

    Args:
        transforms: numpyro bijections from the reals to each site's support.
        names: the sites, in the model's order.
        shapes: their unconstrained shapes.
    """

    transforms: tuple
    names: tuple[str, ...] = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @property
    def dim(self) -> int:
        """The length of the unconstrained vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    def constrain(self, x: Float[Array, " d"]) -> tuple[dict[str, Array], Float[Array, ""]]:
        """The site values of an unconstrained vector and the log-determinant of the map.

        Args:
            x: the vector.

        Returns:
            A dict of site values, and the log-determinant.
        """
        values, log_det, start = {}, jnp.zeros((), x.dtype), 0
        for name, shape, transform in zip(self.names, self.shapes, self.transforms, strict=True):
            size = math.prod(shape)
            u = x[start : start + size].reshape(shape)
            values[name] = transform(u)
            log_det = log_det + jnp.sum(transform.log_abs_det_jacobian(u, values[name]))
            start += size
        return values, log_det

    def unconstrain(self, values: dict[str, Any]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """The inverse of `constrain`, with the log-determinant of `constrain`.

        Args:
            values: dict of site values.

        Returns:
            The vector and the log-determinant.
        """
        parts, log_det = [], jnp.zeros(())
        for name, transform in zip(self.names, self.transforms, strict=True):
            u = transform._inverse(values[name])
            log_det = log_det + jnp.sum(transform.log_abs_det_jacobian(u, values[name]))
            parts.append(jnp.ravel(u))
        return jnp.concatenate(parts), log_det


class Guide(Measure):
    """An automatic guide: a law on the unconstrained space, mapped to the supports of a model's latent sites.

    Args:
        base: the law on R^d.
        layout: where the sites are.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> model = lambda: numpyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> guide = vi.mean_field(model)
        >>> sorted(guide.sample(key=jax.random.key(0))[0])
        ['x']
    """

    base: AbstractBase
    layout: Layout

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw a dict of site values, reparametrised.

        Args:
            key: typed PRNG key.

        Returns:
            The values and their log-density.
        """
        x, log_base = self.base.sample(key)
        values, log_det = self.layout.constrain(x)
        return values, log_base - log_det

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The exact log-density of a dict of site values.

        Args:
            value: dict of site values.
            key: not needed.

        Returns:
            The log-density.
        """
        del key
        x, log_det = self.layout.unconstrain(value)
        return self.base.log_density(x) - log_det

    def __call__(self) -> None:
        """Run the guide as a numpyro program: one auxiliary site and a Delta per model site."""
        law = _BaseLaw(self.base, self.layout.dim)
        x = numpyro.sample("_genkit_latent", law, infer={"is_auxiliary": True})
        values, _ = self.layout.constrain(x)
        for name, transform in zip(self.layout.names, self.layout.transforms, strict=True):
            value = values[name]
            start = transform._inverse(value)
            log_det = jnp.sum(transform.log_abs_det_jacobian(start, value))
            numpyro.sample(name, dist.Delta(value, log_density=-log_det, event_dim=jnp.ndim(value)))


class _BaseLaw(dist.Distribution):
    """The base of a guide as a numpyro law."""

    support = dist.constraints.real_vector
    reparametrized_params = ("base",)
    pytree_data_fields = ("base",)

    def __init__(self, base: AbstractBase, dim: int):
        self.base = base
        super().__init__(event_shape=(dim,), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return True

    def sample(self, key: Any, sample_shape: tuple = ()) -> Any:
        if not sample_shape:
            return self.base.sample(key)[0]
        keys = jr.split(key, math.prod(sample_shape))
        return jax.vmap(lambda k: self.base.sample(k)[0])(keys).reshape(*sample_shape, -1)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        del intermediates
        flat = value.reshape(-1, value.shape[-1])
        return jax.vmap(self.base.log_density)(flat).reshape(value.shape[:-1])


def layout_of(model: Any, *args: Any, **kwargs: Any) -> tuple[Layout, Array]:
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
    model = numpyro.handlers.substitute(model, substitute_fn=_start_improper)
    record: Record = program(model)(*args, **kwargs).trace("draw", key=jr.key(0))
    check(not record.indices, "model", "without subsampled plates for an automatic guide", str(list(record.indices)))
    names, shapes, transforms = [], [], []
    for name, site in record.sites.items():
        if site.observed:
            continue
        if site.support is None or site.support.is_discrete:
            kind = "a site inside a loop" if site.support is None else type(site.law).__name__
            raise ValueError(
                f"`model` must have continuous latent sites for an automatic guide; got {name!r} ({kind}). Write a "
                "guide program for it (`gk.vi.Fit(guide=...)`), where discrete sites pick a gradient strategy."
            )
        transform = biject_to(site.support)
        value = record.values[name]
        shapes.append(tuple(transform.inverse_shape(jnp.shape(value))))
        names.append(name)
        transforms.append(transform)
    check(bool(names), "model", "a model with latent sites", "none")
    layout = Layout(tuple(transforms), tuple(names), tuple(shapes))
    draws = [program(model)(*args, **kwargs).sample(key=jr.key(i))[0] for i in range(1, 9)]
    flat = jnp.stack([layout.unconstrain(d)[0] for d in draws])
    start = jnp.clip(jnp.nan_to_num(jnp.median(flat, 0)), -2.0, 2.0)
    return layout, start


def _start_improper(site: dict) -> Any:
    """A value for a latent site whose law is improper, so that nothing can be drawn from it: amid its space."""
    if site["type"] != "sample" or site["is_observed"]:
        return None
    law = unmask(site["fn"])
    if not isinstance(lanes(law), dist.ImproperUniform):
        return None
    transform = biject_to(law.support)
    return transform(jnp.zeros(transform.inverse_shape(lane_shape(law))))


def mean_field(model: Any, *args: Any, init_scale: float = 0.1, **kwargs: Any) -> Guide:
    """Independent normals on the unconstrained space of a model's latent sites.

    Args:
        model: a numpyro model.
        *args: its arguments.
        init_scale: initial standard deviation.
        **kwargs: its keyword arguments.

    Returns:
        The guide; its location and log-scales are leaves.

    Raises:
        ValueError: for a model with discrete latent sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> model = lambda: numpyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> guide = vi.mean_field(model)
        >>> sorted(guide.sample(key=jax.random.key(0))[0])
        ['x']

    Source: Kucukelbir et al., "Automatic Differentiation Variational Inference", JMLR 18 (2017), section 2.4.
    """
    return Guide(*_diagonal(model, args, kwargs, init_scale))


def _diagonal(model: Any, args: tuple, kwargs: dict, init_scale: float) -> tuple[DiagonalNormal, Layout]:
    """The base that every automatic guide starts from, and the layout of the model's sites."""
    check_positive("init_scale", init_scale)
    layout, start = layout_of(model, *args, **kwargs)
    return DiagonalNormal(start, jnp.full(start.shape, math.log(init_scale), start.dtype)), layout


def full_rank(model: Any, *args: Any, init_scale: float = 0.1, **kwargs: Any) -> Guide:
    """A normal with full covariance on the unconstrained space.

    Args:
        model: a numpyro model.
        *args: its arguments.
        init_scale: initial standard deviation.
        **kwargs: its keyword arguments.

    Returns:
        The guide.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> model = lambda: numpyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> guide = vi.full_rank(model)
        >>> sorted(guide.sample(key=jax.random.key(0))[0])
        ['x']
    """
    base, layout = _diagonal(model, args, kwargs, init_scale)
    return Guide(FullNormal(base.loc, base.log_scale, jnp.zeros((base.loc.size,) * 2, base.loc.dtype)), layout)


def low_rank(model: Any, *args: Any, rank: int | None = None, init_scale: float = 0.1, **kwargs: Any) -> Guide:
    """A normal with diagonal plus low-rank covariance on the unconstrained space.

    Args:
        model: a numpyro model.
        *args: its arguments.
        rank: rank of the shared part, default the square root of the dimension, rounded up.
        init_scale: initial standard deviation.
        **kwargs: its keyword arguments.

    Returns:
        The guide.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> model = lambda: numpyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> guide = vi.low_rank(model, rank=1)
        >>> sorted(guide.sample(key=jax.random.key(0))[0])
        ['x']
    """
    base, layout = _diagonal(model, args, kwargs, init_scale)
    dim = layout.dim
    rank = math.ceil(math.sqrt(dim)) if rank is None else rank
    check_count("rank", rank)
    factor = 0.1 * init_scale * jr.normal(jr.key(0), (dim, rank), base.loc.dtype)
    return Guide(LowRankNormal(base.loc, base.log_scale, factor), layout)


def flow_guide(
    model: Any, *args: Any, key: Key[Array, ""], num_layers: int = 4, width: int = 32, init_scale: float = 0.1,
    **kwargs: Any,
) -> Guide:  # fmt: skip
    """A coupling flow on the unconstrained space; starts as the mean-field guide.

    Args:
        model: a numpyro model.
        *args: its arguments.
        key: typed PRNG key of the networks.
        num_layers: coupling layers, alternating halves.
        width: hidden units of their networks.
        init_scale: initial standard deviation.
        **kwargs: its keyword arguments.

    Returns:
        The guide.

    Raises:
        ValueError: for a single latent coordinate, which a coupling cannot bend.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x**2, 1.0))
        >>> guide = vi.flow_guide(model, key=jax.random.key(0), num_layers=2)
        >>> sorted(guide.sample(key=jax.random.key(1))[0])
        ['x', 'y']
    """
    check_key(key)
    check_count("num_layers", num_layers)
    base, layout = _diagonal(model, args, kwargs, init_scale)
    dim = layout.dim
    check(dim >= 2, "model", "of at least two latent coordinates for a flow guide", str(dim), "Use mean_field.")
    layers = []
    for index in range(num_layers):
        flip = index % 2 == 1
        half = dim // 2
        kept = dim - half if flip else half
        net = eqx.nn.MLP(kept, 2 * (dim - kept), width, 2, jax.nn.gelu, key=jr.fold_in(key, index))
        net = eqx.tree_at(lambda n: (n.layers[-1].weight, n.layers[-1].bias), net, replace_fn=jnp.zeros_like)
        layers.append(Coupling(net, flip, dim))
    return Guide(CouplingFlow(base, tuple(layers)), layout)
