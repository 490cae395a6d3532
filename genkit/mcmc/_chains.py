"""The loop over the transitions of a numpyro kernel: one compiled program, called for a second's work at a time.

A numpyro kernel fills its closures when it is initialized, also with what depends on the data. Every compiled function
here therefore makes and initializes a kernel of its own while it is traced; what only the closures need is dead code
to the compiler. The data stay arguments, and a second run of equal shapes compiles nothing.
"""

import time
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, Key, PyTree
from numpyro.infer.hmc import HMC, HMCState
from tqdm import tqdm

from genkit._core._checks import NonFiniteError
from genkit.inference import ConstantProblem, TracedProblem


@runtime_checkable
class HamiltonianMethod(Protocol):
    """The part of a method that the loop needs."""

    num_warmup: int
    num_samples: int
    num_chains: int

    def kernel(self, model: Any) -> HMC:
        """The numpyro kernel of a model."""
        ...

    def facts(self, state: HMCState) -> dict[str, Array]:
        """Facts of the last transition, each (chain,)."""
        ...


# Method and data of a run: read by every compiled call, never donated.
Fixed = tuple[Any, TracedProblem | ConstantProblem]


def _initialized(fixed: Fixed, keys: Key[Array, " chain"]) -> tuple[HMC, HMCState]:
    method, data = fixed
    kernel = method.kernel(data.problem.model)
    state = kernel.init(keys, method.num_warmup, None, data.problem.args, data.problem.kwargs)
    return kernel, state


@eqx.filter_jit
def _start(fixed: Fixed, keys: Key[Array, " chain"]) -> HMCState:
    return _initialized(fixed, keys)[1]


def _kernel(fixed: Fixed) -> HMC:
    """A kernel whose closures belong to the trace under way; its state is thrown away."""
    return _initialized(fixed, jr.split(jr.key(0), fixed[0].num_chains))[0]


@eqx.filter_jit(donate="all-except-first")
def _transitions(
    fixed: Fixed, state: HMCState, kept: PyTree, first: Int[Array, ""], last: Int[Array, ""]
) -> tuple[HMCState, PyTree]:
    """Transitions `first` to `last`; those after the warm-up are written to the rows of `kept`."""
    method, data = fixed
    kernel = _kernel(fixed)

    def body(i: Array, carry: tuple[HMCState, PyTree]) -> tuple[HMCState, PyTree]:
        state, kept = carry
        state = kernel.sample(state, data.problem.args, data.problem.kwargs)
        # The warm-up goes to a row that is not there.
        row = jnp.where(i < method.num_warmup, method.num_samples, i - method.num_warmup)

        def keep(column: Array, entry: Array) -> Array:
            return column.at[row].set(entry, mode="drop")

        return state, jax.tree.map(keep, kept, (state.z, method.facts(state)))

    return jax.lax.fori_loop(first, last, body, (state, kept))


@eqx.filter_jit
def _constrain(fixed: Fixed, draws: dict[str, Array]) -> dict[str, Array]:
    """Latent sites in their supports, axes (chain, draw, ...), of unconstrained draws (draw, chain, ...)."""
    problem = fixed[1].problem
    constrain = _kernel(fixed).postprocess_fn(problem.args, problem.kwargs)
    values = jax.vmap(jax.vmap(constrain))(jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), draws))
    return {name: values[name] for name in draws}


def run_chains(
    method: HamiltonianMethod, data: TracedProblem | ConstantProblem, key: Key[Array, ""]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Warm up and draw.

    How many transitions a call makes is a run-time number, set by the clock: it moves the progress bar and lets an
    interrupt through, and changes no draw.

    Args:
        method: the kernel and the numbers of chains and draws.
        data: model and data.
        key: typed PRNG key.

    Returns:
        The constrained latent sites (chain, draw, ...), and the facts of the transitions (chain, draw).

    Raises:
        NonFiniteError: if no starting point has a finite density and gradient.
    """
    fixed = (method, data)
    state = _start(fixed, jr.split(key, method.num_chains))
    _check_start(state)
    report = (state.z, method.facts(state))
    kept = jax.tree.map(lambda x: jnp.zeros((method.num_samples, *x.shape), x.dtype), report)
    # Entries of the state may share a buffer (the energy of the start), which cannot be donated twice.
    state = jax.tree.map(jnp.copy, state)
    total = method.num_warmup + method.num_samples
    done = 0
    count = 1
    with tqdm(total=total, desc="warm-up", unit="step", disable=None, leave=False, delay=2) as bar:
        while done < total:
            last = min(done + count, total)
            began = time.perf_counter()
            state, kept = jax.block_until_ready(_transitions(fixed, state, kept, jnp.asarray(done), jnp.asarray(last)))
            bar.set_description("draws" if last > method.num_warmup else "warm-up", refresh=False)
            bar.update(last - done)
            # The first call compiles; trees differ in size, so the pace changes by little at a time.
            is_fast = done > 0 and time.perf_counter() - began < 0.5
            if is_fast or done == 0:
                count = 2 * count
            else:
                count = max(1, count // 2)
            done = last
    draws, facts = kept
    return _constrain(fixed, draws), jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), facts)


def _check_start(state: HMCState) -> None:
    """Refuse chains that start where the density is zero; numpyro cannot see it while it is compiled."""
    finite = jnp.all(jnp.isfinite(state.potential_energy))
    for gradient in jax.tree.leaves(state.z_grad):
        finite = finite & jnp.all(jnp.isfinite(gradient))
    if not bool(finite):
        raise NonFiniteError(
            "`model` must have a finite log-density and gradient at some of the starting points tried; got none. "
            "Check the data for NaN and for values outside the support of their distribution."
        )
