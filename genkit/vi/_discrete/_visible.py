"""The run of a marginalized model that handlers outside see."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Key, PyTree
from numpyro.handlers import seed
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK, Messenger, apply_stack

from genkit.vi._discrete._world import Given, Settings
from genkit.vi._programs._elsewhere import LoopTaker
from genkit.vi._runtime._frame import current_run


class SummedOut(dist.Distribution):
    """The distribution of an observed site in whose density discrete sites are summed out.

    Args:
        base: the distribution at one value of the discrete sites.
        marginal: the log-density of the observation, of the site's batch shape.
    """

    def __init__(self, base: dist.Distribution, marginal: Array):
        self.base = base
        self.marginal = marginal
        super().__init__(base.batch_shape, base.event_shape)

    @property
    def support(self) -> dist.constraints.Constraint:
        """The support of the observation."""
        return self.base.support

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw at the value of the discrete sites that the run has drawn.

        Args:
            key: PRNG key.
            sample_shape: leading axes.

        Returns:
            A draw.
        """
        return self.base.sample(key, sample_shape)

    def log_prob(self, value: ArrayLike) -> Array:
        """The log-density of the observation, with the discrete sites summed out.

        Args:
            value: the observation.

        Returns:
            An array of the batch shape.
        """
        del value  # it was known when the sum was made
        return self.marginal


class Visible(LoopTaker):
    """The run of a model that handlers outside see: discrete sites to sum out are hidden, and values are kept.

    Args:
        settings: what to sum out.
        tainted: sites whose densities read a discrete site; what they add is counted with the sums.
    """

    def __init__(self, settings: Settings, tainted: frozenset[str]):
        super().__init__()
        self.settings = settings
        self.tainted = tainted
        self.given = Given()
        self.observed: dict[str, dict] = {}
        self.is_inside = False

    def process_message(self, msg: dict) -> None:
        """Hide, mask, or watch."""
        if self.is_inside:
            return
        if msg["type"] == "control_flow":
            self.is_taking = False
            if len(msg["args"]) == 5:
                f, *rest = msg["args"]
                msg["args"] = (self.wrapped(f), *rest)
            return
        if msg["type"] != "sample":
            return
        if hide(msg, self.settings, self.tainted):
            return
        if msg["is_observed"] and msg["name"] in self.tainted:
            self.observed[msg["name"]] = dict(msg)
            msg["stop"] = True

    def postprocess_message(self, msg: dict) -> None:
        """Keep the values that were taken."""
        if self.is_inside:
            return
        match msg["type"]:
            case "control_flow":
                self.is_taking = True
                if len(msg["args"]) == 5:
                    last, (trace, (ys, values)) = msg["value"]
                    self.given.values.update(values)
                    msg["value"] = (last, (trace, ys))
            case "sample":
                if not (msg["is_observed"] or self.settings.sums_out(msg)):
                    self.given.values.setdefault(msg["name"], msg["value"])
            case "param":
                self.given.params[msg["name"]] = msg["value"]
            case "plate":
                self.given.indices[msg["name"]] = msg["value"]
            case "prng_key":
                self.given.keys.append(msg["value"])

    def wrapped(self, f: Callable) -> Callable:
        """The body of a loop, which also hands out the values of its latent sites."""

        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, tuple]:
            kept = Inside(self.settings, self.tainted)
            with self.inside(), kept:
                carry, y = f(carry, x)
            return carry, (y, kept.values)

        return body

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Leave messages to the handler of the body; loops in it are taken again."""
        before = (self.is_inside, self.is_taking)
        self.is_inside = True
        try:
            yield
        finally:
            self.is_inside, self.is_taking = before

    def show(self, name: str, distribution: dist.Distribution, scale: ArrayLike | None) -> None:
        """Send the message of an observed site on, with another density."""
        msg = {**self.observed[name], "fn": distribution, "scale": scale, "stop": False}
        apply_stack(msg)


class Inside(Messenger):
    """The body of a loop in the visible run.

    Args:
        settings: what to sum out.
        tainted: sites whose densities read a discrete site.
    """

    def __init__(self, settings: Settings, tainted: frozenset[str]):
        super().__init__()
        self.settings = settings
        self.tainted = tainted
        self.values: dict[str, PyTree] = {}

    def process_message(self, msg: dict) -> None:
        """Hide or mask."""
        if msg["type"] == "sample" and not hide(msg, self.settings, self.tainted):
            if msg["is_observed"] and msg["name"] in self.tainted:
                msg["fn"] = msg["fn"].mask(False)
        elif msg["type"] == "control_flow" and len(msg["args"]) == 5:
            f, *rest = msg["args"]
            msg["args"] = (self.wrapped(f), *rest)

    def postprocess_message(self, msg: dict) -> None:
        """Keep the values that were taken."""
        if msg["type"] == "sample" and not (msg["is_observed"] or self.settings.sums_out(msg)):
            self.values.setdefault(msg["name"], msg["value"])
        elif msg["type"] == "control_flow" and len(msg["args"]) == 5:
            last, (trace, (ys, values)) = msg["value"]
            self.values.update(values)
            msg["value"] = (last, (trace, ys))

    def wrapped(self, f: Callable) -> Callable:
        """The body of a loop in the loop."""

        def body(carry: PyTree, x: PyTree) -> tuple[PyTree, tuple]:
            kept = Inside(self.settings, self.tainted)
            with kept:
                carry, y = f(carry, x)
            return carry, (y, kept.values)

        return body


def hide(msg: dict, settings: Settings, tainted: frozenset[str]) -> bool:
    """Keep a discrete site in; take the density of a latent site that reads one out. True where that was all."""
    if msg["value"] is None and settings.sums_out(msg):
        _refuse_from_outside(msg["name"])
        key = key_at_hand()
        if key is None:
            # Densities do not depend on it.
            msg["value"] = jnp.full(msg["fn"].shape(msg["kwargs"].get("sample_shape", ())), 0)
        else:
            msg["value"] = msg["fn"].sample(key, msg["kwargs"].get("sample_shape", ()))
        msg["stop"] = True
        return True
    if not msg["is_observed"] and msg["name"] in tainted:
        msg["fn"] = msg["fn"].mask(False)
        return True
    return False


def _refuse_from_outside(name: str) -> None:
    """A value put at a hidden site from outside would be lost."""
    for handler in _NUMPYRO_STACK:
        for attribute in ("data", "params"):
            put = getattr(handler, attribute, None)  # numpyro's handlers declare no common base for what they put in
            if isinstance(put, Mapping) and name in put:
                raise ValueError(
                    f"The site {name!r} must not be given from outside a model in which it is summed out; got a value "
                    f"from `{type(handler).__name__}`. Put the handler inside: marginalize(handler(model))."
                )


def key_at_hand() -> Key[Array, ""] | None:
    """A key of the run around, where it has one."""
    run = current_run()
    if run is not None:
        if run.key is None and run.frame is None:
            return None
        return numpyro.prng_key()
    if not any(isinstance(handler, seed) and handler.rng_key is not None for handler in _NUMPYRO_STACK):
        return None
    return numpyro.prng_key()
