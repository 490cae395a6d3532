"""Models in the coordinates of a fitted guide, for chains that would struggle in their own."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to
from numpyro.infer.reparam import Reparam as _Reparam

from genkit._core._checks import check, describe
from genkit.vi._guides._automatic import Guide


class _Transported(_Reparam):
    """One latent site of a model, set to what the guide makes of the shared standard normal coordinates."""

    def __init__(self, guide: Guide, shared: dict[str, Array]):
        self.guide = guide
        self.shared = shared

    def __call__(self, name: str, fn: dist.Distribution, obs: object) -> tuple[None, Array]:
        check(obs is None, "model", "without observations of the guide's own sites", name)
        layout = self.guide.layout
        log_det = jnp.zeros(())
        # The first site of a run draws the coordinates of all of them.
        if not self.shared:
            coordinates = dist.Normal(jnp.zeros(layout.dim), 1.0).to_event(1).mask(False)
            z = numpyro.sample("_genkit_coordinates", coordinates)
            x, log_det = self.guide.base.transport(z)
            self.shared.update(layout.split(x))
        u = self.shared[name]
        transform = biject_to(fn.support)
        value = transform(u)
        log_det = log_det + layout.log_det(name, transform, u, value)
        numpyro.factor(f"_{name}_log_prob", jnp.sum(fn.log_prob(value)) + log_det)
        return None, value


def neutra(model: Callable, guide: Guide) -> Callable:
    """A model whose latent sites are functions of standard normal coordinates, through a fitted guide.

    The posterior is the same; where the guide is close to it, the new coordinates are close to independent normals and
    chains move freely: `gk.infer(gk.Problem(vi.neutra(model, guide), args), gk.mcmc.NUTS(...), key=key)`. The sites of
    the model become deterministic ones, and are part of the samples under their own names.

    Args:
        model: a numpyro model with continuous latent sites.
        guide: an automatic guide of that model, fitted.

    Returns:
        A numpyro model with the one latent site `_genkit_coordinates`.

    Raises:
        TypeError: if `guide` is no automatic guide.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> model = lambda: numpyro.sample("x", dist.Gamma(2.0, 1.0))
        >>> moved = vi.neutra(model, vi.mean_field(model))
        >>> sorted(numpyro.handlers.trace(numpyro.handlers.seed(moved, 0)).get_trace())
        ['_genkit_coordinates', '_x_log_prob', 'x']

    Source: Hoffman et al., "NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo", 2019, section 3.
    """
    if not isinstance(guide, Guide):
        raise TypeError(f"`guide` must be an automatic guide of gk.vi; got {describe(guide)}.")

    def run(*args: Any, **kwargs: Any) -> Any:
        config = dict.fromkeys(guide.layout.names, _Transported(guide, {}))
        return numpyro.handlers.reparam(model, config=config)(*args, **kwargs)

    return run
