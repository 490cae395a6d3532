"""Hamiltonian Monte Carlo through numpyro."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro
from jaxtyping import Array, Key
from numpyro.infer import HMC as _HMC, NUTS as _NUTS, init_to_uniform
from numpyro.infer.hmc import HMCState
from numpyro.ops.provenance import eval_provenance

from genkit import vi
from genkit._core._checks import check_count, check_interval
from genkit.inference import Posterior, Problem, as_compiled_argument, discrete_sites, trace_at
from genkit.mcmc._chains import run_chains


class AbstractHamiltonian(eqx.Module):
    """A method that runs chains of a Hamiltonian kernel of numpyro, together in one vectorized program."""

    num_warmup: eqx.AbstractVar[int]
    num_samples: eqx.AbstractVar[int]
    num_chains: eqx.AbstractVar[int]
    target_accept: eqx.AbstractVar[float]
    marginalize: eqx.AbstractVar[bool]

    def __check_init__(self) -> None:
        check_count("num_warmup", self.num_warmup)
        check_count("num_samples", self.num_samples)
        check_count("num_chains", self.num_chains)
        check_interval("target_accept", self.target_accept, 0, 1, open_lo=True, open_hi=True)

    @abc.abstractmethod
    def kernel(self, model: Callable) -> _HMC:
        """The numpyro kernel of a model."""

    def facts(self, state: HMCState) -> dict[str, Array]:
        """Facts of the last transition, under ArviZ's names.

        Args:
            state: the kernel's state, batched over chains.

        Returns:
            Arrays (chain,).
        """
        return {
            "diverging": state.diverging,
            "n_steps": state.num_steps,
            "acceptance_rate": state.accept_prob,
            "energy": state.energy,
            "step_size": state.adapt_state.step_size,
        }

    def prepare(self, problem: Problem) -> Problem:
        """Sum out the discrete latent sites, which Hamiltonian dynamics cannot move.

        Args:
            problem: model and data.

        Returns:
            The problem without them, or the same problem if there are none.
        """
        if not self.marginalize or not discrete_sites(problem):
            return problem
        return Problem(vi.marginalize(problem.model), problem.args, problem.kwargs, name=problem.name)

    def run(self, problem: Problem, *, key: Key[Array, ""]) -> Posterior:
        """Draw from the posterior.

        Args:
            problem: model and data.
            key: typed PRNG key.

        Returns:
            Samples with axes (chain, draw, ...); divergences, energies, step sizes and tree sizes in `stats`.

        Raises:
            ValueError: for discrete latent sites that are not summed out, or for a model with `numpyro.param` sites
                that its density depends on.
        """
        check_sites(problem)
        # The second key once drew the predictions; the chains keep the first, and with it their draws.
        key_run, _ = jr.split(key)
        with jax.debug_key_reuse(False):  # numpyro's own initialization uses one key twice
            samples, stats = run_chains(self, as_compiled_argument(problem), key_run)
        samples, stats = jax.device_get((samples, stats))
        return Posterior(samples, None, ("chain", "draw"), stats=stats, attrs={"method": type(self).__name__})


class NUTS(AbstractHamiltonian):
    """The no-U-turn sampler with dual averaging and a diagonal mass matrix.

    Args:
        num_warmup: adaptation steps per chain.
        num_samples: draws kept per chain.
        num_chains: chains, run together in one vectorized program.
        target_accept: acceptance probability the step size is tuned to, in (0, 1).
        max_tree_depth: at most `2 ** max_tree_depth` leapfrog steps per draw.
        dense_mass: adapt a full mass matrix.
        marginalize: sum discrete latent sites out (`gk.vi.marginalize`); False refuses them.

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
    marginalize: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self) -> None:
        check_count("max_tree_depth", self.max_tree_depth)

    def kernel(self, model: Callable) -> _HMC:
        return _NUTS(
            model,
            target_accept_prob=self.target_accept,
            max_tree_depth=self.max_tree_depth,
            dense_mass=self.dense_mass,
        )

    def facts(self, state: HMCState) -> dict[str, Array]:
        depth = 1 + jnp.floor(jnp.log2(jnp.maximum(state.num_steps, 1))).astype(jnp.int32)
        return {**super().facts(state), "tree_depth": depth}


class HMC(AbstractHamiltonian):
    """Hamiltonian Monte Carlo with a fixed trajectory length.

    Args:
        num_warmup: adaptation steps per chain.
        num_samples: draws kept per chain.
        num_chains: chains, run together in one vectorized program.
        trajectory_length: integration time per draw, positive.
        target_accept: acceptance probability the step size is tuned to, in (0, 1).
        marginalize: sum discrete latent sites out (`gk.vi.marginalize`); False refuses them.

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
    marginalize: bool = eqx.field(static=True, default=True, kw_only=True)

    def __check_init__(self) -> None:
        check_interval("trajectory_length", self.trajectory_length, 0, open_lo=True)

    def kernel(self, model: Callable) -> _HMC:
        return _HMC(model, trajectory_length=self.trajectory_length, target_accept_prob=self.target_accept)


def check_sites(problem: Problem) -> None:
    """Refuse models that a Hamiltonian method cannot draw from.

    Args:
        problem: model and data.

    Raises:
        ValueError: for discrete latent sites, and for parameters that the density depends on.
    """
    # Improper distributions cannot be drawn from: they start where the chains will.
    start = numpyro.handlers.substitute(substitute_fn=init_to_uniform())
    with numpyro.handlers.trace() as trace, start, numpyro.handlers.seed(rng_seed=0):
        problem.model(*problem.args, **problem.kwargs)
    latent = {}
    params = {}
    for name, site in trace.items():
        if site["type"] == "param":
            params[name] = site["value"]
        elif site["type"] == "sample" and not site["is_observed"]:
            latent[name] = site["value"]
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"`model` must have continuous latent sites for Hamiltonian Monte Carlo; got the discrete "
                    f"site {name!r} ({type(site['fn']).__name__}). Leave `marginalize=True`, or use "
                    "gk.vi.Fit with a guide of your own."
                )
    if not latent:
        raise ValueError(
            "`model` must have a continuous latent site for Hamiltonian Monte Carlo; got none. Discrete sites that "
            "were summed out can be drawn with `gk.vi.marginalize` under numpyro's `seed` and `trace`."
        )
    if params:
        _refuse_params(problem, latent, params)


def _refuse_params(problem: Problem, latent: dict[str, Array], params: dict[str, Array]) -> None:
    """Refuse parameters that matter; `random_flax_module` and its kin make some that they then replace by priors."""

    def contributions(**params: Array) -> list[Array]:
        trace = trace_at(problem, {**latent, **params}, key=jr.key(0))
        return [site["fn"].log_prob(site["value"]) for site in trace.values() if site["type"] == "sample"]

    used = sorted(set().union(*jax.tree.leaves(eval_provenance(contributions, **params))))
    if used:
        raise ValueError(
            "`model` must have no `numpyro.param` sites for Hamiltonian Monte Carlo; got "
            f"{', '.join(map(repr, used))}, which chains would leave at their initial values. Give them priors "
            "(`numpyro.handlers.lift`), or use gk.vi.Fit, which trains them."
        )
