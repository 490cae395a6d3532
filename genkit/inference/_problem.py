"""A numpyro model together with the data it is conditioned on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Key

from genkit._core._checks import check, check_count, check_key, describe_type
from genkit.inference._predict import draw_prior


class Problem(eqx.Module):
    """Something conditioned on data: a numpyro model and the arguments it is called with.

    Args:
        model: any numpyro model.
        args: its positional arguments, passed as given.
        kwargs: its keyword arguments, passed as given.
        name: what to call the problem; `None` for none.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def coin(flips):
        ...     p = numpyro.sample("p", dist.Beta(1.0, 1.0))
        ...     numpyro.sample("flips", dist.Bernoulli(p).expand([3]), obs=flips)
        >>> gk.Problem(coin, args=([1, 0, 1],)).args
        ([1, 0, 1],)
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None = eqx.field(static=True)

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
    ):
        check(callable(model), "model", "a numpyro model (a function)", model)
        check(
            isinstance(args, (tuple, list)),
            "args",
            "a tuple of arguments",
            describe_type(args),
            "One argument is `(x,)`.",
        )
        is_mapping = kwargs is None or isinstance(kwargs, Mapping)
        check(is_mapping, "kwargs", "a dict of keyword arguments", describe_type(kwargs))
        self.model = model
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.name = name

    def prior(self, num_samples: int, *args: Any, key: Key[Array, ""], **kwargs: Any) -> dict[str, Any]:
        """Draw latent sites, deterministic sites and observations from the model, before the data.

        Args:
            num_samples: number of draws.
            *args: arguments of the model; none for those of the problem, whose observations are drawn anew.
            key: typed PRNG key.
            **kwargs: keyword arguments of the model.

        Returns:
            Arrays (num_samples, ...) by site; `Posterior.to_arviz(prior=)` takes them.

        Example:
            >>> import jax, numpyro, numpyro.distributions as dist
            >>> import genkit as gk
            >>> def coin(flips):
            ...     p = numpyro.sample("p", dist.Beta(1.0, 1.0))
            ...     numpyro.sample("flips", dist.Bernoulli(p).expand([3]), obs=flips)
            >>> draws = gk.Problem(coin, (jax.numpy.array([1, 0, 1]),)).prior(5, key=jax.random.key(0))
            >>> draws["p"].shape, draws["flips"].shape
            ((5,), (5, 3))
        """
        check_count("num_samples", num_samples)
        check_key(key)
        if not args and not kwargs:
            args = self.args
            kwargs = self.kwargs
        return draw_prior(self.model, args, kwargs, num_samples, key)


def improper_start(site: dict) -> Any:
    """A value for a latent site with an improper distribution, from which nothing can be drawn.

    Args:
        site: numpyro's message.

    Returns:
        The image of zero under the map from the reals to the support; None for other sites.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> flat = dist.ImproperUniform(dist.constraints.positive, (), ())
        >>> start = gk.inference.improper_start
        >>> model = numpyro.handlers.substitute(lambda: numpyro.sample("s", flat), substitute_fn=start)
        >>> float(model())
        1.0
    """
    if site["type"] != "sample" or site["is_observed"]:
        return None
    base = site["fn"]
    while isinstance(base, (dist.MaskedDistribution, dist.ExpandedDistribution, dist.Independent)):
        base = base.base_dist
    if not isinstance(base, dist.ImproperUniform):
        return None
    transform = dist.biject_to(site["fn"].support)
    shape = tuple(site["fn"].batch_shape) + tuple(site["fn"].event_shape)
    return transform(jnp.zeros(transform.inverse_shape(shape)))


def discrete_sites(problem: Problem) -> list[str]:
    """The names of a model's discrete latent sites.

    Args:
        problem: model and data.

    Returns:
        The names in the order of the model; none where the model cannot be run, which the method will tell.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> gk.inference.discrete_sites(gk.Problem(lambda: numpyro.sample("z", dist.Bernoulli(0.5))))
        ['z']
    """
    names: list[str] = []

    def run() -> None:
        start = numpyro.handlers.substitute(problem.model, substitute_fn=improper_start)
        with numpyro.handlers.block(), numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=0):
            start(*problem.args, **problem.kwargs)
        for name, site in trace.items():
            if site["type"] == "sample" and not site["is_observed"] and site["fn"].support.is_discrete:
                names.append(name)

    try:
        with jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
            jax.eval_shape(run)  # names need no values: nothing is computed
    except Exception:  # a wrong model is told by the method, in its own words
        return []
    return names
