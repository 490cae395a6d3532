"""Draws of a model: from the prior before the data, and for new inputs after a fit."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
from jaxtyping import Array, Key, PyTree
from numpyro.primitives import Messenger

from genkit.inference._chunks import in_chunks


class _Reuse(Messenger):
    """Puts a draw of the posterior at its sites; members that are new are drawn from the model.

    Args:
        values: one draw of the latent sites.
    """

    def __init__(self, values: Mapping[str, PyTree]):
        super().__init__()
        self.values = dict(values)

    def process_message(self, msg: dict) -> None:
        """Answer one message."""
        if msg["type"] == "control_flow":
            # numpyro's own loops take a value for the first steps and draw the others.
            msg["kwargs"]["substitute_stack"].append(("substitute", self.values))
            return
        if msg["type"] not in ("sample", "param") or msg.get("is_observed") or msg["value"] is not None:
            return
        name = msg["name"]
        if name not in self.values:
            return
        old = jnp.asarray(self.values[name])
        if msg["type"] == "param":
            msg["value"] = old
            return
        shape = tuple(msg["fn"].shape(msg["kwargs"].get("sample_shape", ())))
        if old.shape == shape:
            msg["value"] = old
            return
        grown = _grown_axes(name, old.shape, shape, msg)
        drawn = msg["fn"].sample(numpyro.prng_key(), msg["kwargs"].get("sample_shape", ()))
        rows = tuple(slice(old.shape[axis]) if axis in grown else slice(None) for axis in range(len(shape)))
        msg["value"] = drawn.at[rows].set(old.astype(drawn.dtype))


def _grown_axes(name: str, old: tuple[int, ...], new: tuple[int, ...], msg: dict) -> list[int]:
    """The axes along which a plate has got more members; any other change is refused."""
    refused = (
        f"The site {name!r} has shape {old} in the posterior and {new} with these arguments. Only a `numpyro.plate` "
        "may grow, whose new members are drawn from the model"
    )
    if len(old) != len(new):
        raise ValueError(f"{refused}; give arguments for which its rank stays.")
    batch = len(new) - msg["fn"].event_dim
    plates = {batch + plate.dim for plate in msg["cond_indep_stack"]}
    grown = [axis for axis, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]
    for axis in grown:
        if axis not in plates:
            raise ValueError(f"{refused}; its axis {axis} is in no plate.")
        if new[axis] < old[axis]:
            raise ValueError(
                f"{refused}; it has got smaller. Keep all members and take those wanted from the result, because rows "
                "that are left out cannot be told."
            )
    return grown


class _Unobserved(Messenger):
    """Draws what the model observes."""

    def process_message(self, msg: dict) -> None:
        """Change one message."""
        if msg["type"] == "control_flow":
            first, *rest = msg["args"]
            if len(msg["args"]) == 5:
                msg["args"] = (_wrapped(first), *rest)
            else:
                true_fn, false_fn, operand = rest
                msg["args"] = (first, _wrapped(true_fn), _wrapped(false_fn), operand)
        elif msg["type"] == "sample" and msg["is_observed"] and np.size(msg["value"]):
            msg["is_observed"] = False
            msg["value"] = None


def _wrapped(fn: Callable) -> Callable:
    def run(*args: PyTree) -> PyTree:
        with _Unobserved():
            return fn(*args)

    return run


def draw_prior(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], num_samples: int, key: Key[Array, ""]
) -> dict[str, np.ndarray]:
    """Draws of all sites of a model, observed ones included.

    Args:
        model: a numpyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        num_samples: number of draws.
        key: typed PRNG key.

    Returns:
        Arrays (num_samples, ...) by site.
    """

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=key), _Unobserved():
            model(*args, **kwargs)
        return {
            name: site["value"]
            for name, site in trace.items()
            if site["type"] == "deterministic" or (site["type"] == "sample" and np.size(site["value"]))
        }

    with jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
        return jax.device_get(eqx.filter_jit(jax.vmap(one))(jr.split(key, num_samples)))


def draw_predictions(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    values: dict[str, PyTree],
    fixed: dict[str, PyTree],
    key: Key[Array, ""],
    batch_size: int | None,
) -> dict[str, np.ndarray]:
    """What a model draws beside the latent sites of a posterior.

    Args:
        model: a numpyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        values: draws of the latent sites, (n, ...).
        fixed: values of `param` sites.
        key: typed PRNG key.
        batch_size: draws per compiled call; None chooses as many as produce 64 MiB.

    Returns:
        Arrays (n, ...) of the other sites, of sites that grew, and of the deterministic ones.

    Raises:
        ValueError: if there is nothing to predict, or a site has changed its shape otherwise than by growing.
    """

    def one(values: dict[str, PyTree], key: Key[Array, ""]) -> dict[str, Array]:
        with numpyro.handlers.trace() as trace, numpyro.handlers.seed(rng_seed=key), _Reuse({**fixed, **values}):
            model(*args, **kwargs)
        out = {}
        for name, site in trace.items():
            is_new = name not in values or np.shape(site["value"]) != np.shape(values[name])
            is_drawn = site["type"] == "sample" and not site["is_observed"] and is_new
            if is_drawn or site["type"] == "deterministic":
                out[name] = site["value"]
        return out

    count = jax.tree.leaves(values)[0].shape[0]
    keys = jr.split(key, count)
    with jax.debug_key_reuse(False):  # numpyro's handlers split one key several times
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], values), keys[0])
        if not shapes:
            raise ValueError(
                "`args` must leave something to predict; got a model whose sites are all observed or known. Pass None "
                "for the observations (`predict(x_new, None, key=key)`)."
            )
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        return in_chunks(eqx.filter_jit(jax.vmap(one)), values, keys, size, batch_size)
