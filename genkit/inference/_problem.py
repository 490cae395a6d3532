"""A numpyro model together with the data it is conditioned on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx

from genkit._core._checks import check, describe_type


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
