"""Automatic guides: distributions on the unconstrained space of a model's latent sites."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check, check_count, check_key, check_positive
from genkit.inference import Measure
from genkit.vi._guides._bases import (
    AbstractBase,
    Coupling,
    CouplingFlow,
    DiagonalNormal,
    FullNormal,
    LowRankNormal,
)
from genkit.vi._guides._layout import Layout, layout_of


class Guide(Measure):
    """An automatic guide: a distribution on the unconstrained space, mapped to the supports of a model's latent sites.

    Args:
        base: the distribution on R^d.
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
        """Draw a dict of site values, reparametrized.

        Args:
            key: typed PRNG key.

        Returns:
            The values and their log-density.
        """
        x, log_base = self.base.sample(key)
        values, log_det = self.layout.constrain(x)
        return values, log_base - log_det

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        del key
        x, log_det = self.layout.unconstrain(value)
        return self.base.log_density(x) - log_det

    def __call__(self) -> None:
        """Run the guide as a numpyro program: one auxiliary site and a Delta per model site."""
        base = _BaseDistribution(self.base, self.layout.dim)
        x = numpyro.sample("_genkit_latent", base, infer={"is_auxiliary": True})
        values, log_dets = self.layout.constrain_sites(x)
        for name, value in values.items():
            numpyro.sample(name, dist.Delta(value, log_density=-log_dets[name], event_dim=jnp.ndim(value)))


class _BaseDistribution(dist.Distribution):
    """The base of a guide as a numpyro distribution."""

    support = dist.constraints.real_vector
    reparametrized_params = ("base",)
    pytree_data_fields = ("base",)

    def __init__(self, base: AbstractBase, dim: int):
        self.base = base
        super().__init__(event_shape=(dim,), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return True

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Array:
        if not sample_shape:
            return self.base.sample(key)[0]
        keys = jr.split(key, math.prod(sample_shape))
        return jax.vmap(lambda k: self.base.sample(k)[0])(keys).reshape(*sample_shape, -1)

    def log_prob(self, value: Array, intermediates: object = None) -> Array:
        del intermediates
        flat = value.reshape(-1, value.shape[-1])
        return jax.vmap(self.base.log_density)(flat).reshape(value.shape[:-1])


def mean_field(model: Callable, *args: Any, init_scale: float = 0.1, **kwargs: Any) -> Guide:
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


def _diagonal(model: Callable, args: tuple, kwargs: dict[str, Any], init_scale: float) -> tuple[DiagonalNormal, Layout]:
    """The base that every automatic guide starts from, and the layout of the model's sites."""
    check_positive("init_scale", init_scale)
    layout, start = layout_of(model, *args, **kwargs)
    return DiagonalNormal(start, jnp.full(start.shape, math.log(init_scale), start.dtype)), layout


def full_rank(model: Callable, *args: Any, init_scale: float = 0.1, **kwargs: Any) -> Guide:
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


def low_rank(model: Callable, *args: Any, rank: int | None = None, init_scale: float = 0.1, **kwargs: Any) -> Guide:
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
    if rank is None:
        rank = math.ceil(math.sqrt(dim))
    check_count("rank", rank)
    factor = 0.1 * init_scale * jr.normal(jr.key(0), (dim, rank), base.loc.dtype)
    return Guide(LowRankNormal(base.loc, base.log_scale, factor), layout)


def flow_guide(
    model: Callable, *args: Any, key: Key[Array, ""], num_layers: int = 4, width: int = 32, init_scale: float = 0.1,
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
