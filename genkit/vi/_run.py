"""The effect handler: it answers numpyro's messages while a program is drawn from, weighed, or run under `E`."""

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from .._core._checks import NonFiniteError, is_concrete
from ._expectation import draw_site
from ._frame import Frame, current_frame, draw_law, fold_name, trace_state
from ._laws import is_everywhere, smooth, unchecked, unmask
from ._strategies import Strategy


class Site(NamedTuple):
    """What is known of one site after a run: all objectives need, nothing that cannot leave a loop."""

    log_prob: Any  # of the site's batch shape, mask applied, scale not
    scale: Any
    plates: tuple
    observed: bool
    auxiliary: bool
    address: str
    law: Any  # None for sites inside loops
    support: Any


class Record:
    """What one run of a program leaves behind."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.auxiliary: dict[str, Any] = {}
        self.indices: dict[str, Any] = {}
        self.deterministic: dict[str, Any] = {}
        self.sites: dict[str, Site] = {}
        self.used: set[str] = set()
        self.observed: set[str] = set()  # by the program itself, not by `condition`
        self.keys = 0

    @property
    def log_density(self) -> Any:
        """The sum of all site log-densities, scales included."""
        parts = [scaled(site) for site in self.sites.values()]
        return sum(parts[1:], parts[0]) if parts else jnp.zeros(())


def scaled(site: Site) -> Any:
    """The scalar contribution of a site."""
    log_prob = site.log_prob if site.scale is None else site.scale * site.log_prob
    return jnp.sum(log_prob)


_RUN: ContextVar["Run | None"] = ContextVar("genkit_vi_run", default=None)


def current_run() -> "Run | None":
    """The innermost program being run, or None."""
    return _RUN.get()


class Run(Messenger):
    """Answers the messages of one program.

    `mode` is "draw" (draw latent sites), "density" (take them from `values`) or "boundary" (sites written directly
    under `E`). Raw transformations inside the program are refused in every mode, because what a site draws or adds to
    the density could not leave them.
    """

    def __init__(
        self,
        mode: str,
        *,
        values: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        strategies: tuple = (),
        key: Any = None,
        frame: Frame | None = None,
        on_site: Callable[[str, Any], bool] | None = None,
    ):
        super().__init__()
        self.mode, self.values, self.params, self.data = mode, dict(values or {}), params or {}, data or {}
        self.strategies, self.key = strategies, key
        self.frame = frame
        self.on_site = on_site
        self.record = Record()
        self.state = trace_state()
        self.path: tuple = ()
        self._token: Any = None

    def __enter__(self) -> "Run":
        super().__enter__()
        self._token = _RUN.set(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _RUN.reset(self._token)
        super().__exit__(*error)

    @contextlib.contextmanager
    def nested(self, values: dict[str, Any], key: Any, frame: Frame | None) -> Iterator[Record]:
        """Collect the body of a loop apart; its record leaves the loop as arrays and is merged outside."""
        before = (self.record, self.values, self.key, self.frame, self.state)
        self.record, self.values, self.key, self.frame, self.state = Record(), values, key, frame, trace_state()
        try:
            yield self.record
        finally:
            self.record, self.values, self.key, self.frame, self.state = before

    def process_message(self, msg: dict) -> None:
        """Answer one message and keep it from handlers outside the program."""
        if msg["type"] in ("sample", "param", "plate", "prng_key") and trace_state() != self.state:
            raise RuntimeError(
                f"The site {msg.get('name', 'key')!r} runs under a raw JAX transformation (`lax.scan`, `lax.cond`, "
                "`jax.vmap`, `jax.grad`, `jax.checkpoint`, `jit`, ...) inside a program. Use `gk.vi.scan`, "
                "`gk.vi.vmap` or `gk.vi.cond` (numpyro's own `scan` and `cond` also work)."
            )
        handler = getattr(self, "_" + msg["type"], None)
        if handler is not None:
            handler(msg)
        msg["stop"] = True

    # --- one method per message type --------------------------------------------------------------------------

    def _sample(self, msg: dict) -> None:
        name, law = msg["name"], smooth(msg["fn"])
        named = msg["infer"].get("grad")
        if name in self.record.sites:
            raise ValueError(
                f"`name` must be new at every site of a program; got {name!r} twice. Inside a Python loop add the "
                "index to the name."
            )
        observed = msg["is_observed"]
        if observed:
            self.record.observed.add(name)
        if not observed and name in self.data:
            msg["value"], observed = self.data[name], True
        if observed and named is not None:
            raise ValueError(
                f"`grad` must be None at an observed site; got {type(named).__name__} at {name!r}. "
                "Observed sites are not drawn."
            )
        if self.mode == "boundary":
            self._directly(msg, law, named, observed)
            return
        sample_shape = msg["kwargs"].get("sample_shape", ())
        if sample_shape:
            law = law.expand(tuple(sample_shape) + tuple(law.batch_shape))
            msg["kwargs"]["sample_shape"] = ()
        intermediates: Any = ()
        address, inside = name, False
        if msg["value"] is None:
            value, intermediates, address, inside = self._latent(name, law, named, msg)
            msg["value"] = value
        plain = unchecked(law) if inside or is_everywhere(law) else law
        log_prob = plain.log_prob(msg["value"], intermediates) if intermediates else plain.log_prob(msg["value"])
        check_log_prob(name, log_prob)
        auxiliary = bool(msg["infer"].get("is_auxiliary", False))
        plates = tuple(msg["cond_indep_stack"])
        self.record.sites[name] = Site(
            log_prob, msg["scale"], plates, observed, auxiliary, address, law, None if observed else law.support
        )
        if not observed:
            (self.record.auxiliary if auxiliary else self.record.values)[name] = msg["value"]

    def _directly(self, msg: dict, law: Any, named: Strategy | None, observed: bool) -> None:
        """A site written straight into the function under `E`: only its draw matters."""
        if observed:
            raise ValueError(
                f"`obs` must be None at a site directly under `E`; got an observation at {msg['name']!r}. An "
                "observation needs a density: wrap the model, `gk.vi.program(model)(*args)`, and use an objective."
            )
        if msg["value"] is None:
            assert self.frame is not None  # this mode is that of `E`
            plates = tuple(msg["cond_indep_stack"])
            msg["value"], _ = draw_site(self.frame, msg["name"], law, named, plates)

    def _latent(self, name: str, law: dist.Distribution, named: Any, msg: dict) -> tuple[Any, Any, str, bool]:
        """The value of a site that is neither observed nor already set by another handler.

        Also the law's intermediates, the address, and whether the value is known to lie in the support.
        """
        if self.mode == "density":
            if name not in self.values:
                known = ", ".join(sorted(self.values)) or "none"
                raise ValueError(
                    f"`value` must hold every latent site of the program; got no {name!r} (given: {known}). "
                    "Let the guide sample it, observe it, or sum it out with `gk.vi.marginal`."
                )
            self.record.used.add(name)
            inside = self.on_site is not None and self.on_site(name, law)
            value = self.values[name]
            want = tuple(law.batch_shape) + tuple(law.event_shape)
            if np.shape(value) != want:
                raise ValueError(
                    f"`value` at site {name!r} must have shape {want}, as the program draws it; got {np.shape(value)}."
                )
            return value, (), name, inside
        strategy = self._strategy(name, named)
        if self.frame is not None:
            address = "/".join((*self.frame.scope, name))
            value, intermediates = draw_site(self.frame, name, law, strategy, tuple(msg["cond_indep_stack"]))
            return value, intermediates, address, True
        if self.key is None:
            raise TypeError("`key` must be given to draw from a program; got None.")
        value, intermediates = draw_law(unmask(law), fold_name(self.key, name))
        return value, intermediates, name, True

    def _strategy(self, name: str, named: Strategy | None) -> Strategy | None:
        """The first matching glob of `with_grad` wins over what the site names."""
        for pattern, strategy in self.strategies:
            if glob_match(name, pattern):
                return strategy
        return named

    def _any_key(self, name: str) -> Any:
        """A key for auxiliary randomness (subsampling, initial values): never differentiated."""
        if self.frame is not None:
            self.frame.check_trace(f"The random choice at {name!r}")
            return self.frame.key("/".join((*self.frame.scope, name)))
        if self.key is None:
            raise TypeError(f"`key` must be given: {name!r} is random; got None.")
        return fold_name(self.key, name)

    def _plate(self, msg: dict) -> None:
        name = msg["name"]
        if msg["value"] is None:
            if name in self.values:
                msg["value"] = self.values[name]
                self.record.used.add(name)
            else:
                size, subsample_size = msg["args"]
                msg["value"] = jr.permutation(self._any_key(name), size)[:subsample_size]
            self.record.indices[name] = msg["value"]

    def _param(self, msg: dict) -> None:
        name = msg["name"]
        if name in self.params:
            msg["value"] = self.params[name]
        elif msg["args"] == ():  # a callable initial value: it draws a key through numpyro's own message
            msg["value"] = msg["fn"]()

    def _prng_key(self, msg: dict) -> None:
        if msg["value"] is None:
            self.record.keys += 1
            msg["value"] = self._any_key(f"prng{self.record.keys}")

    def _deterministic(self, msg: dict) -> None:
        self.record.deterministic[msg["name"]] = msg["value"]

    def _control_flow(self, msg: dict) -> None:
        from ._branch import numpyro_control_flow

        numpyro_control_flow(msg)


def glob_match(name: str, pattern: str) -> bool:
    """Whether a site name matches a glob."""
    return fnmatch.fnmatchcase(name, pattern)


_TRACED_CHECKS: ContextVar[bool] = ContextVar("genkit_vi_traced_checks", default=False)


def check_log_prob(name: str, log_prob: Any) -> None:
    """Refuse a NaN log-density, naming the site (concrete values always, traced ones under `gk.vi.debug`)."""
    bad = jnp.any(jnp.isnan(log_prob)) if _TRACED_CHECKS.get() or is_concrete(log_prob) else None
    if bad is None:
        return
    if is_concrete(bad):
        if bool(bad):
            raise NonFiniteError(_nan_message(name))
        return
    jax.debug.callback(_raise_if_nan, bad, name=name)


def _raise_if_nan(bad: Any, *, name: str) -> None:
    if np.any(bad):
        raise NonFiniteError(_nan_message(name))


def _nan_message(name: str) -> str:
    return (
        f"The log-density of site {name!r} must not be NaN. Check the parameters of its law (a negative scale, a NaN "
        "from a network) and its value."
    )


@contextlib.contextmanager
def boundary() -> Iterator[None]:
    """Answer sites written directly under `E`."""
    with Run("boundary", frame=current_frame()):
        yield


def run_program(fn: Callable[[], Any], run: Run) -> Record:
    """Run a program under a handler and return its record."""
    with run:
        fn()
    return run.record
