"""The loop over the transitions of a numpyro kernel: one compiled program, called for a second's work at a time."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from tqdm import tqdm

from .._core._objective import Problem


def advance(kernel: Any, state: Any, method: Any, problem: Problem) -> tuple[dict[str, Array], dict[str, Any]]:
    """Warm up and draw.

    How many transitions a call makes is a run-time number, set by the clock: it moves the progress bar and lets an
    interrupt through, and changes no draw.

    Args:
        kernel: the initialised numpyro kernel.
        state: its state, batched over chains.
        method: holds `num_warmup` and `num_samples`.
        problem: holds the arguments of the model.

    Returns:
        The constrained latent sites (chain, draw, ...), and the facts of the transitions (chain, draw).
    """
    total = method.num_warmup + method.num_samples

    def report(state: Any) -> tuple[Any, dict[str, Array]]:
        facts = {"diverging": state.diverging, "n_steps": state.num_steps, "acceptance_rate": state.accept_prob}
        return state.z, facts

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def transitions(state: Any, kept: Any, first: Array, last: Array) -> tuple[Any, Any]:
        def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state = kernel.sample(carry[0], problem.args, problem.kwargs)
            # The warm-up goes to a row that is not there.
            row = jnp.where(i < method.num_warmup, method.num_samples, i - method.num_warmup)
            keep = lambda column, entry: column.at[row].set(entry, mode="drop")
            return state, jax.tree.map(keep, carry[1], report(state))

        return jax.lax.fori_loop(first, last, body, (state, kept))

    kept = jax.tree.map(lambda x: jnp.zeros((method.num_samples, *x.shape), x.dtype), report(state))
    done, count = 0, 1
    with tqdm(total=total, desc="warm-up", unit="step", disable=None, leave=False, delay=2) as bar:
        while done < total:
            last, began = min(done + count, total), time.perf_counter()
            state, kept = jax.block_until_ready(transitions(state, kept, jnp.asarray(done), jnp.asarray(last)))
            bar.set_description("draws" if last > method.num_warmup else "warm-up", refresh=False)
            bar.update(last - done)
            # The first call compiles; trees differ in size, so the pace changes by little at a time.
            fast = done > 0 and time.perf_counter() - began < 0.5
            done, count = last, 2 * count if fast or done == 0 else max(1, count // 2)
    constrain = jax.vmap(jax.vmap(kernel.postprocess_fn(problem.args, problem.kwargs)))
    draws, facts = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), kept)
    values = constrain(draws)
    return {name: values[name] for name in draws}, jax.device_get(facts)
