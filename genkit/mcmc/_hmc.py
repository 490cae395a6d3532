"""Hamiltonian Monte Carlo through numpyro."""

from typing import Any

import equinox as eqx
import jax
import numpyro
from jaxtyping import Array, Key
from numpyro.infer import HMC as _HMC, NUTS as _NUTS, init_to_uniform

from .._core._checks import check_count, check_interval
from .._core._infer import Posterior
from .._core._objective import Problem
from ..vi._posterior import describe_draw, observed_values
from ..vi._program import Program
from ._chains import advance


class NUTS(eqx.Module):
    """The no-U-turn sampler with dual averaging and a diagonal mass matrix.

    Args:
        num_warmup: adaptation steps per chain.
        num_samples: draws kept per chain.
        num_chains: chains, run together in one vectorised program.
        target_accept: acceptance probability the step size is tuned to, in (0, 1).
        max_tree_depth: at most `2 ** max_tree_depth` leapfrog steps per draw.
        dense_mass: adapt a full mass matrix.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> method = gk.mcmc.NUTS(20, 20, num_chains=2)
        >>> gk.infer(gk.Problem(model, (1.0,)), method, key=jax.random.key(0)).samples["x"].shape
        (2, 20)

    Source: Hoffman & Gelman, "The No-U-Turn Sampler", JMLR 15 (2014); numpyro's implementation.
    """

    num_warmup: int = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)
    num_chains: int = eqx.field(static=True, default=4)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)
    max_tree_depth: int = eqx.field(static=True, default=10, kw_only=True)
    dense_mass: bool = eqx.field(static=True, default=False, kw_only=True)

    def __check_init__(self) -> None:
        """Validate."""
        for name in ("num_warmup", "num_samples", "num_chains", "max_tree_depth"):
            check_count(name, getattr(self, name))
        check_interval("target_accept", self.target_accept, 0, 1, open_lo=True, open_hi=True)

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Draw from the posterior.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            Samples with axes (chain, draw, ...), with divergences and tree sizes in `stats`.

        Raises:
            ValueError: for a model with discrete latent sites.
        """
        kernel = _NUTS(
            problem.model,
            target_accept_prob=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            dense_mass=self.dense_mass,
        )
        return _run(kernel, self, problem, key)


class HMC(eqx.Module):
    """Hamiltonian Monte Carlo with a fixed trajectory length.

    Args:
        num_warmup: adaptation steps per chain.
        num_samples: draws kept per chain.
        num_chains: chains, run together in one vectorised program.
        trajectory_length: integration time per draw, positive.
        target_accept: acceptance probability the step size is tuned to, in (0, 1).

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> import genkit as gk
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> method = gk.mcmc.HMC(20, 20, num_chains=2, trajectory_length=1.0)
        >>> gk.infer(gk.Problem(model, (1.0,)), method, key=jax.random.key(0)).samples["x"].shape
        (2, 20)

    Source: Neal, "MCMC using Hamiltonian dynamics", Handbook of MCMC (2011); numpyro's implementation.
    """

    num_warmup: int = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)
    num_chains: int = eqx.field(static=True, default=4)
    trajectory_length: float = eqx.field(static=True, default=6.283185307179586, kw_only=True)
    target_accept: float = eqx.field(static=True, default=0.8, kw_only=True)

    def __check_init__(self) -> None:
        """Validate."""
        for name in ("num_warmup", "num_samples", "num_chains"):
            check_count(name, getattr(self, name))
        check_interval("trajectory_length", self.trajectory_length, 0, open_lo=True)
        check_interval("target_accept", self.target_accept, 0, 1, open_lo=True, open_hi=True)

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Draw from the posterior.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            Samples with axes (chain, draw, ...).

        Raises:
            ValueError: for a model with discrete latent sites.
        """
        kernel = _HMC(problem.model, trajectory_length=self.trajectory_length, target_accept_prob=self.target_accept)
        return _run(kernel, self, problem, key)


def _refuse_discrete(problem: Problem) -> None:
    """HMC moves on a continuous space."""
    # Improper laws cannot be drawn from: they start where the chains will.
    start = numpyro.handlers.substitute(substitute_fn=init_to_uniform())
    with numpyro.handlers.trace() as trace, start, numpyro.handlers.seed(rng_seed=0):
        problem.model(*problem.args, **problem.kwargs)
    for name, site in trace.items():
        if site["type"] == "sample" and not site["is_observed"] and site["fn"].support.is_discrete:
            raise ValueError(
                f"`model` must have continuous latent sites for Hamiltonian Monte Carlo; got the discrete "
                f"site {name!r} ({type(site['fn']).__name__}). Sum it out in the model, or use gk.vi.Fit."
            )


def _run(kernel: Any, method: Any, problem: Problem, key: Any) -> Posterior:
    _refuse_discrete(problem)
    key_run, key_predict = jax.random.split(key)
    with jax.debug_key_reuse(False):  # numpyro's own initialization uses one key twice
        keys = jax.random.split(key_run, method.num_chains)
        state = kernel.init(keys, method.num_warmup, None, problem.args, problem.kwargs)
        latent, stats = advance(kernel, state, method, problem)
    model = Program(problem.model, problem.args, problem.kwargs)
    keys = jax.random.split(key_predict, (method.num_chains, method.num_samples))
    describe = jax.jit(jax.vmap(jax.vmap(lambda value, key: describe_draw(model, value, key))))
    facts = jax.device_get(describe(latent, keys))
    return Posterior(
        {**jax.device_get(latent), **facts["deterministic"]},
        facts["log_density"],
        ("chain", "draw"),
        stats=stats,
        log_likelihood=facts["log_likelihood"],
        predictive=facts["predictive"],
        observed=observed_values(problem, jax.tree.map(lambda x: x[0, 0], latent)),
        attrs={"method": type(method).__name__},
    )
