"""Bridges to numpyro: its guides as measures, our guides and objectives in its hands."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpyro
from jaxtyping import Array, Key
from numpyro.distributions import biject_to, constraints
from numpyro.infer.elbo import ELBO

from genkit._core._checks import check_key, describe
from genkit.vi._guides._automatic import Guide
from genkit.vi._programs._expectation import expectation
from genkit.vi._programs._program import Program


class NumpyroGuide(eqx.Module):
    """A numpyro guide with its parameters as unconstrained leaves; made by `from_numpyro`.

    Args:
        guide: the guide function or AutoGuide.
        unconstrained: parameters in unconstrained coordinates.
        transforms: bijections to their constraints.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> family = lambda: numpyro.sample("x", dist.Normal(numpyro.param("loc", 0.0), 1.0))
        >>> guide = vi.NumpyroGuide(family, {"loc": jnp.array(0.5)}, {"loc": dist.transforms.IdentityTransform()})
        >>> float(guide.params["loc"])
        0.5
    """

    guide: Callable = eqx.field(static=True)
    unconstrained: dict[str, Array]
    transforms: dict[str, Any]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters in their constrained space, as `SVI` and `Predictive` want them."""
        return {name: self.transforms[name](value) for name, value in self.unconstrained.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide as a numpyro program with these parameters.

        Args:
            *args: the guide's arguments.
            **kwargs: its keyword arguments.

        Returns:
            What the guide returns.
        """
        return numpyro.handlers.substitute(self.guide, data=self.params)(*args, **kwargs)


def from_numpyro(guide: Callable, *args: Any, key: Key[Array, ""], **kwargs: Any) -> NumpyroGuide:
    """Take a numpyro guide (a function with `param` sites or an AutoGuide) over as a module.

    Args:
        guide: the guide.
        *args: arguments to trace it with.
        key: typed PRNG key for initial values.
        **kwargs: keyword arguments to trace it with.

    Returns:
        A module whose leaves are the unconstrained parameters; `gk.vi.program(module)(*args)` is a measure.

    Raises:
        TypeError: if `guide` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> guide = lambda: numpyro.sample("x", dist.Normal(numpyro.param("loc", jnp.array(0.5)), 1.0))
        >>> float(vi.from_numpyro(guide, key=jax.random.key(0)).params["loc"])
        0.5
    """
    if not callable(guide):
        raise TypeError(f"`guide` must be a numpyro guide; got {describe(guide)}.")
    check_key(key)
    with numpyro.handlers.block():
        trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, key)).get_trace(*args, **kwargs)
    unconstrained, transforms = {}, {}
    for name, site in trace.items():
        if site["type"] == "param":
            transforms[name] = biject_to(site["kwargs"].get("constraint", constraints.real))
            unconstrained[name] = jax.tree.map(transforms[name].inv, site["value"])
    return NumpyroGuide(guide, unconstrained, transforms)


def to_numpyro(guide: Guide) -> Callable:
    """A genkit guide as a numpyro guide function, for `Predictive`, importance sampling or a further `SVI`.

    Args:
        guide: an automatic guide.

    Returns:
        A function of any arguments that emits the guide's sites.

    Raises:
        TypeError: if `guide` is no automatic guide.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> guide = vi.mean_field(lambda: numpyro.sample("x", dist.Gamma(2.0, 1.0)))
        >>> run = numpyro.handlers.seed(vi.to_numpyro(guide), 0)
        >>> sorted(numpyro.handlers.trace(run).get_trace())
        ['_genkit_latent', 'x']
    """
    if not isinstance(guide, Guide):
        raise TypeError(f"`guide` must be an automatic guide of gk.vi; got {describe(guide)}.")

    def run(*args: Any, **kwargs: Any) -> None:
        del args, kwargs
        guide()

    return run


class NumpyroObjective(ELBO):
    """A genkit objective as a numpyro loss: `SVI(model, guide, optimizer, NumpyroObjective(gk.vi.iwelbo_5))`.

    Unlike numpyro's own multi-sample losses its gradient is right for discrete latent sites too.

    Args:
        objective: a function `(p, q) -> scalar` to maximize.
        num_particles: independent estimates averaged.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> model = lambda: numpyro.sample("x", dist.Normal(0.0, 1.0))
        >>> abs(float(vi.NumpyroObjective(vi.elbo).loss(jax.random.key(0), {}, model, model)))
        0.0
    """

    can_infer_discrete = True

    def __init__(self, objective: Callable, num_particles: int = 1):
        super().__init__(num_particles=num_particles)
        self.objective = objective

    def loss(self, rng_key: Any, param_map: dict, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        """The negative objective, as numpyro's `SVI` asks for it.

        Args:
            rng_key: a PRNG key.
            param_map: constrained parameters by name.
            model: the model.
            guide: the guide.
            *args: arguments of both.
            **kwargs: keyword arguments of both.

        Returns:
            A scalar to minimize.
        """
        p, q = Program(model, args, kwargs, param_map), Program(guide, args, kwargs, param_map)

        def one(key: Any) -> Any:
            return -expectation(lambda: self.objective(p, q), key)[0]

        if self.num_particles == 1:
            return one(rng_key)
        return jax.numpy.mean(jax.vmap(one)(jax.random.split(rng_key, self.num_particles)))

    def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The loss in the form newer numpyro versions ask for.

        Args:
            *args: as for `loss`.
            **kwargs: as for `loss`.

        Returns:
            A dict with `loss` and no mutable state.
        """
        return {"loss": self.loss(*args, **kwargs), "mutable_state": None}
