"""The effect handlers that answer numpyro's messages: one draws, one weighs, one serves sites directly under `E`."""

import abc
import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Key, PyTree

from genkit._core._checks import NonFiniteError, is_concrete
from genkit.vi._programs._branches import answer_control_flow
from genkit.vi._programs._outside import PREFIX, Prefix, given_at_step, localize
from genkit.vi._programs._sites import draw_site
from genkit.vi._runtime._distributions import is_everywhere, lane_shape, smooth, unchecked, unmask
from genkit.vi._runtime._enumeration import draw_from
from genkit.vi._runtime._frame import Frame, changed, interpreter
from genkit.vi._runtime._keys import fold_name, trace_state
from genkit.vi._runtime._record import AbstractRun, Given, Loop, Record, Site, at_step, restored
from genkit.vi._runtime._strategy import Strategy


class Settings(NamedTuple):
    """Settings of a program, whether it is drawn from or weighed.

    Attributes:
        params: values of `numpyro.param` sites (constrained).
        data: sites observed on top of those the program observes itself.
        strategies: pairs (glob, strategy) that override the sites' own.
    """

    params: Mapping[str, PyTree] = {}
    data: Mapping[str, PyTree] = {}
    strategies: tuple[tuple[str, Strategy], ...] = ()


class Latent(NamedTuple):
    """The value of a latent site: how it came about, and whether it is known to lie in the support."""

    value: PyTree
    address: str
    inside: bool
    intermediates: PyTree = ()


class AbstractHandler(AbstractRun[Frame]):
    """Answers the messages of one program.

    Raw transformations inside the program are refused, because what a site draws or adds to the density could not
    leave them.

    Args:
        settings: what the program brings along.
        key: typed PRNG key for draws outside `E`.
        frame: the frame of the surrounding `E`, or None.
        values: the values of latent sites, where they are given.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        key: Key[Array, ""] | None = None,
        frame: Frame | None = None,
        values: Mapping[str, PyTree] | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.key = key
        self.frame = frame
        self.values = {name: Given(value, value) for name, value in (values or {}).items()}
        self.record = Record()
        self.state = trace_state()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "AbstractHandler":
        super().__enter__()
        self._exit.enter_context(changed(run=self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()
        super().__exit__(kind, error, traceback)

    @contextlib.contextmanager
    def nested(
        self, loop: Loop | None, values: dict[str, Given], key: Key[Array, ""] | None, frame: Frame | None
    ) -> Iterator[Record]:
        """Collect one step of a loop apart."""
        with restored(self):
            self.record = Record()
            self.values = values
            self.key = key
            self.frame = frame
            self.state = trace_state()
            if loop is not None:
                self.loops = (*self.loops, loop)
            yield self.record

    def process_message(self, msg: dict) -> None:
        """Answer one message and keep it from handlers outside the program."""
        kind = msg["type"]
        if kind in ("sample", "param", "plate", "prng_key") and trace_state() != self.state:
            raise RuntimeError(
                f"The site {msg.get('name', 'key')!r} runs under a raw JAX transformation (`lax.scan`, `lax.cond`, "
                "`jax.vmap`, `jax.grad`, `jax.checkpoint`, `jit`, ...) inside a program. Use `gk.vi.scan`, "
                "`gk.vi.vmap` or `gk.vi.cond` (numpyro's own `scan` and `cond` also work)."
            )
        match kind:
            case "sample":
                localize(msg)
                self._sample(msg)
            case "param":
                self._param(msg)
            case "plate":
                self._plate(msg)
            case "prng_key":
                self._prng_key(msg)
            case "deterministic":
                localize(msg)
                self.record.deterministic[msg["name"]] = msg["value"]
            case "control_flow":
                answer_control_flow(msg)
            case _:
                pass  # numpyro's own default is right: `inspect`, `subsample`, `mutable`, `module`
        # Handlers around the call of a program are not part of it.
        msg["stop"] = True

    @abc.abstractmethod
    def _sample(self, msg: dict) -> None:
        """Answer a sample statement."""

    def _strategy(self, name: str, named: Strategy | None) -> Strategy | None:
        """The first matching glob of `with_grad` wins over what the site names."""
        for pattern, strategy in self.settings.strategies:
            if glob_match(name, pattern):
                return strategy
        return named

    def _any_key(self, name: str) -> Key[Array, ""]:
        """A key for auxiliary randomness (subsampling, initial values): never differentiated."""
        if self.frame is not None:
            self.frame.check_trace(f"The random choice at {name!r}")
            return self.frame.key("/".join((*self.frame.scope, name)))
        if self.key is None:
            raise TypeError(f"`key` must be given: {name!r} is random; got None.")
        return fold_name(self.key, name, self.record.hashes)

    def _plate(self, msg: dict) -> None:
        if msg["value"] is not None:
            return
        name = msg["name"]
        if name in self.values:
            msg["value"] = self.values[name].current
            self.record.used.add(name)
        else:
            size, subsample_size = msg["args"]
            msg["value"] = jr.permutation(self._any_key(name), size)[:subsample_size]
        self.record.indices[name] = msg["value"]

    def _param(self, msg: dict) -> None:
        name = msg["name"]
        if name in self.settings.params:
            msg["value"] = self.settings.params[name]
        elif msg["args"] == ():  # a callable initial value: it draws a key through numpyro's own message
            msg["value"] = msg["fn"]()

    def _prng_key(self, msg: dict) -> None:
        if msg["value"] is None:
            self.record.num_keys += 1
            msg["value"] = self._any_key(f"prng{self.record.num_keys}")


class AbstractMeasuringHandler(AbstractHandler):
    """Answers a program whose densities count."""

    @abc.abstractmethod
    def _latent(
        self,
        name: str,
        distribution: dist.Distribution,
        named: Strategy | None,
        plates: tuple,
        num_given: int,
    ) -> Latent:
        """The value of a site that is neither observed nor already set by another handler."""

    def _sample(self, msg: dict) -> None:
        name = msg["name"]
        distribution = smooth(msg["fn"])
        named = msg["infer"].get("grad")
        if name in self.record.sites:
            raise ValueError(
                f"`name` must be new at every site of a program; got {name!r} twice. Inside a Python loop add the "
                "index to the name."
            )
        prefix = self._observe(msg)
        observed = msg["is_observed"]
        if observed and named is not None:
            raise ValueError(
                f"`grad` must be None at an observed site; got {type(named).__name__} at {name!r}. "
                "Observed sites are not drawn."
            )
        sample_shape = msg["kwargs"].get("sample_shape", ())
        if sample_shape:
            distribution = distribution.expand(tuple(sample_shape) + tuple(distribution.batch_shape))
            msg["kwargs"]["sample_shape"] = ()
        plates = tuple(msg["cond_indep_stack"])
        latent = Latent(msg["value"], name, False)
        if latent.value is None:
            num_given = 0 if prefix is None else prefix.length
            latent = self._latent(name, distribution, self._strategy(name, named), plates, num_given)
        value = latent.value
        if prefix is not None:
            value = prefix.fill(value)
            self.record.num_given[name] = prefix.length
            latent = latent._replace(intermediates=())  # they belong to the value that was replaced
        if observed:
            check_observation(name, value, distribution)
        msg["value"] = value
        log_prob = _log_prob(distribution, value, latent)
        check_scale(name, msg["scale"], log_prob)
        check_log_prob(name, log_prob)
        auxiliary = bool(msg["infer"].get("is_auxiliary", False))
        self.record.sites[name] = Site(
            log_prob=log_prob,
            scale=msg["scale"],
            plates=plates,
            observed=observed,
            auxiliary=auxiliary,
            address=latent.address,
            distribution=distribution,
            support=None if observed else distribution.support,
        )
        if observed:
            return
        if auxiliary:
            self.record.auxiliary[name] = value
        else:
            self.record.values[name] = value

    def _observe(self, msg: dict) -> Prefix | None:
        """Apply `condition`; a value for the first steps of a loop leaves the site latent at the others."""
        name = msg["name"]
        if msg["is_observed"]:
            self.record.observed.add(name)
            return None
        prefix: Prefix | None = msg.pop(PREFIX, None)
        if name not in self.settings.data:
            return prefix
        msg["value"], prefix = given_at_step(self.settings.data[name], msg, self.loops)
        msg["is_observed"] = prefix is None
        return prefix


def _log_prob(distribution: dist.Distribution, value: PyTree, latent: Latent) -> ArrayLike:
    """The log-density of a site, without numpyro's check where the value lies in the support by construction."""
    if latent.inside or is_everywhere(distribution):
        distribution = unchecked(distribution)
    if latent.intermediates:
        return distribution.log_prob(value, latent.intermediates)
    return distribution.log_prob(value)


class DrawHandler(AbstractMeasuringHandler):
    """Draws the latent sites of a program: in a frame by their strategies, else with a key."""

    def _latent(
        self,
        name: str,
        distribution: dist.Distribution,
        named: Strategy | None,
        plates: tuple,
        num_given: int,
    ) -> Latent:
        del num_given  # the draws of steps whose value is given are not used
        if self.frame is not None:
            address = "/".join((*self.frame.scope, name))
            value, intermediates = draw_site(self.frame, name, distribution, named, plates)
            return Latent(value, address, True, intermediates)
        if self.key is None:
            raise TypeError("`key` must be given to draw from a program; got None.")
        key = fold_name(self.key, name, self.record.hashes)
        value, intermediates = draw_from(unmask(distribution), key)
        return Latent(value, name, True, intermediates)


class WeighHandler(AbstractMeasuringHandler):
    """Takes the latent sites of a program from given values.

    Args:
        settings: what the program brings along.
        values: the values of latent sites.
        on_site: called with name and distribution of every latent site before it is weighed; True if its value is
            known to lie in the support.
        key: typed PRNG key, for subsampled plates whose indices are not given.
        frame: the frame of the surrounding `E`, or None.
    """

    def __init__(
        self,
        settings: Settings,
        values: Mapping[str, PyTree],
        on_site: Callable[[str, dist.Distribution], bool] | None = None,
        *,
        key: Key[Array, ""] | None = None,
        frame: Frame | None = None,
    ):
        super().__init__(settings, key=key, frame=frame, values=values)
        self.on_site = on_site

    def _latent(
        self,
        name: str,
        distribution: dist.Distribution,
        named: Strategy | None,
        plates: tuple,
        num_given: int,
    ) -> Latent:
        del named, plates
        if name not in self.values:
            known = ", ".join(sorted(self.values)) or "none"
            raise ValueError(
                f"`value` must hold every latent site of the program; got no {name!r} (given: {known}). "
                "Let the guide sample it, observe it, or sum it out with `gk.vi.marginal`."
            )
        self.record.used.add(name)
        inside = self.on_site is not None and self.on_site(name, distribution)
        given = self.values[name]
        lengths = [loop.length for loop in self.loops]
        if num_given:
            lengths[0] -= num_given
        want = (*lengths, *lane_shape(distribution))
        if np.shape(given.whole) != want:
            raise ValueError(
                f"`value` at site {name!r} must have shape {want}, as the program draws it; got "
                f"{np.shape(given.whole)}."
            )
        if num_given:
            # Steps before the first latent one read the first entry, which is then replaced.
            value = jnp.asarray(given.whole)[jnp.maximum(self.loops[0].step - num_given, 0)]
        else:
            value = at_step(given.current, self.loops[given.num_sliced :])
        return Latent(value, name, inside)


class ExpectationHandler(AbstractHandler):
    """Serves sites written straight into the function under `E`: only their draws matter."""

    is_measured = False

    def _sample(self, msg: dict) -> None:
        if msg["is_observed"]:
            raise ValueError(
                f"`obs` must be None at a site directly under `E`; got an observation at {msg['name']!r}. An "
                "observation needs a density: wrap the model, `gk.vi.program(model)(*args)`, and use an objective."
            )
        prefix: Prefix | None = msg.pop(PREFIX, None)
        if msg["value"] is not None:
            return
        assert self.frame is not None  # this handler is that of `E`
        distribution = smooth(msg["fn"])
        named = msg["infer"].get("grad")
        value, _ = draw_site(self.frame, msg["name"], distribution, named, tuple(msg["cond_indep_stack"]))
        msg["value"] = value if prefix is None else prefix.fill(value)


def glob_match(name: str, pattern: str) -> bool:
    """True if a site name matches a glob."""
    return fnmatch.fnmatchcase(name, pattern)


# --- checks of what a site carries ------------------------------------------------------------------------------------


def check_observation(name: str, value: PyTree, distribution: dist.Distribution) -> None:
    """Refuse an observation that the site's distribution would broadcast to more numbers than were observed."""
    if distribution.event_shape == (0,):  # `numpyro.factor` observes nothing
        return
    got = np.shape(value)
    if got == () and not distribution.event_shape:
        return  # one number for every member of the site, which cannot be meant otherwise
    want = lane_shape(distribution)
    try:
        counted = np.broadcast_shapes(got, want)
    except ValueError:
        counted = None
    if counted == got:
        return
    batch = tuple(distribution.batch_shape)
    event = tuple(distribution.event_shape)
    masked = ", its mask included," if isinstance(distribution, dist.MaskedDistribution) else ""
    effect = "does not fit" if counted is None else f"would count {counted} numbers"
    raise ValueError(
        f"`obs` at site {name!r} must have the shape of the site{masked} batch {batch} and event {event}, or one that "
        f"holds it; got {got}, which {effect}. Reshape the observation (a column of a data frame: `y[:, 0]`)."
    )


def check_scale(name: str, scale: ArrayLike | None, log_prob: ArrayLike) -> None:
    """Refuse a scale with more entries than the site has."""
    if scale is None or np.ndim(scale) == 0:
        return
    batch = np.shape(log_prob)
    try:
        counted = np.broadcast_shapes(np.shape(scale), batch)
    except ValueError:
        counted = None
    if counted != batch:
        raise ValueError(
            f"`scale` at site {name!r} must broadcast to the site's batch {batch}; got shape {np.shape(scale)}."
        )


def check_log_prob(name: str, log_prob: ArrayLike) -> None:
    """Refuse a NaN log-density, naming the site (concrete values always, traced ones under `gk.vi.debug`)."""
    if not (interpreter().check_traced or is_concrete(log_prob)):
        return
    bad = jnp.any(jnp.isnan(log_prob))
    if not is_concrete(bad):
        jax.debug.callback(_raise_if_nan, bad, name=name)
    elif bool(bad):
        raise NonFiniteError(_nan_message(name))


def _raise_if_nan(bad: ArrayLike, *, name: str) -> None:
    if np.any(bad):
        raise NonFiniteError(_nan_message(name))


def _nan_message(name: str) -> str:
    return (
        f"The log-density of site {name!r} must not be NaN. Check the parameters of its distribution (a negative "
        "scale, a NaN from a network) and its value."
    )


# --- running a program under a handler --------------------------------------------------------------------------------


def run_program(fn: Callable[[], PyTree], handler: AbstractHandler) -> Record:
    """Run a program under a handler and return its record."""
    with handler:
        try:
            fn()
        except (TypeError, ValueError) as error:
            _note_site(error)
            raise
    return handler.record


def _note_site(error: Exception) -> None:
    """Say at which site an error arose that does not name it (a shape error of JAX, say)."""
    traceback = error.__traceback__
    name = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "apply_stack":  # numpyro's dispatch of one message
            name = frame.f_locals.get("msg", {}).get("name", name)
        traceback = traceback.tb_next
    if name is not None and repr(name) not in str(error):
        error.add_note(f"This happened at site {name!r}.")
