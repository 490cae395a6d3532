"""Programs as measures: any numpyro model or guide can be drawn from and weighed."""

from collections.abc import Callable, Mapping
from typing import overload

import equinox as eqx
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK

from genkit._core._checks import check_key, describe
from genkit.inference import DistributionMeasure, Measure, as_measure
from genkit.vi._programs._handler import DrawHandler, Settings, WeighHandler, glob_match, run_program
from genkit.vi._programs._sites import draw_site
from genkit.vi._runtime._distributions import smooth, unchecked
from genkit.vi._runtime._frame import current_frame, require_frame
from genkit.vi._runtime._record import Record
from genkit.vi._strategies._single import Strategy


# Anything that can be drawn from or weighed.
MeasureLike = Measure | dist.Distribution


def sample(name: str, distribution: dist.Distribution, obs: PyTree = None, grad: Strategy | None = None) -> PyTree:
    """A sample site: `numpyro.sample` with a gradient strategy.

    `numpyro.sample(name, distribution, obs=obs, infer={"grad": grad})` is the same thing.

    Args:
        name: the site's address, new at every site of a run.
        distribution: the numpyro distribution of the site.
        obs: the observed value, if any.
        grad: the gradient strategy of a latent site; None leaves it to the default policy.

    Returns:
        The drawn or observed value.

    Raises:
        RuntimeError: outside `E`, a program and any numpyro handler.
        ValueError: if an observed site is given a strategy.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> fn = lambda p: 2.0 * vi.sample("b", dist.Bernoulli(p), grad=vi.Enum())
        >>> round(float(vi.E(fn)(0.3, key=jax.random.key(0))), 4)
        0.6
    """
    if not _NUMPYRO_STACK and obs is None:
        raise RuntimeError(
            f"The site {name!r} must be drawn inside `gk.vi.E`, a `gk.vi.program` or a numpyro handler; got none of "
            "them. `gk.vi.program(fn)(*args).sample(key=key)` draws from a program."
        )
    if grad is not None and obs is not None:
        raise ValueError(
            f"`grad` must be None at an observed site; got {type(grad).__name__} at {name!r}. Observed sites are not "
            "drawn."
        )
    return numpyro.sample(name, distribution, obs=obs, infer={} if grad is None else {"grad": grad})


class Program(Measure):
    r"""A probabilistic program applied to its arguments, as a measure over dicts `{site: value}`.

    Its density is the product of the site densities; observed sites make it unnormalized. Inside `E` its draws belong
    to the surrounding expectation, so every site follows its gradient strategy.

    Args:
        fn: a numpyro model or guide; an `eqx.Module` with `__call__` keeps its parameters as leaves.
        args: positional arguments, passed as given.
        kwargs: keyword arguments, passed as given.
        params: values of `numpyro.param` sites (constrained); others take their initial value.
        data: sites to observe on top of those the program observes itself.
        strategies: pairs (glob, strategy) that override the sites' own.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> round(float(vi.Program(model, (1.0,)).log_density({"x": 0.5})), 4)
        -1.7697
    """

    fn: Callable
    args: tuple = ()
    kwargs: dict = eqx.field(default_factory=dict)
    params: Mapping[str, PyTree] = eqx.field(default_factory=dict)
    data: Mapping[str, PyTree] = eqx.field(default_factory=dict)
    strategies: tuple = ()

    def record_draw(self, key: Key[Array, ""] | None = None) -> Record:
        """Draw all latent sites and keep the full record.

        Args:
            key: typed PRNG key; not used inside `E`, whose draws belong to its own key.

        Returns:
            The record of the run.
        """
        frame = current_frame()
        if frame is None:
            check_key(key)
        else:
            frame.check_trace("A program")
        return self._run(DrawHandler(self._settings, key=key, frame=frame))

    def record_weights(
        self,
        values: Mapping[str, PyTree],
        key: Key[Array, ""] | None = None,
        on_site: Callable[[str, dist.Distribution], bool] | None = None,
    ) -> Record:
        """Weigh all latent sites at given values and keep the full record.

        Args:
            values: the values of latent sites (and of subsampled plates' indices).
            key: typed PRNG key, for subsampling outside `E`.
            on_site: called with name and distribution of every latent site before it is weighed; True if its value is
                known to lie in the support.

        Returns:
            The record of the run.
        """
        return self._run(WeighHandler(self._settings, values, on_site, key=key, frame=current_frame()))

    @property
    def _settings(self) -> Settings:
        return Settings(self.params, self.data, self.strategies)

    def _run(self, handler: DrawHandler | WeighHandler) -> Record:
        record = run_program(lambda: self.fn(*self.args, **self.kwargs), handler)
        self._check_names(record)
        return record

    def _check_names(self, record: Record) -> None:
        """Refuse observations and strategies for sites that are not there, or not to be had."""
        known = ", ".join(sorted(record.sites)) or "none"
        for name in self.data:
            if name not in record.sites:
                raise ValueError(f"`values` must name sites of the program; got {name!r} (its sites: {known}).")
            if name in record.observed:
                raise ValueError(
                    f"`values` must name latent sites of the program; got {name!r}, which it observes itself. Pass "
                    "the data as an argument of the program instead."
                )
        for pattern, strategy in self.strategies:
            matched = [name for name in record.sites if glob_match(name, pattern)]
            if not matched:
                raise ValueError(f"`strategies` must name sites of the program; got {pattern!r} (its sites: {known}).")
            if all(record.sites[name].observed for name in matched):
                raise ValueError(
                    f"`grad` must be None at an observed site; got {type(strategy).__name__} at {pattern!r}. Observed "
                    "sites are not drawn."
                )

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw all latent sites; auxiliary sites count in the density but are not returned.

        Args:
            key: typed PRNG key (inside `E` the surrounding key is used).

        Returns:
            The dict of values (with the indices of subsampled plates) and their log-density.
        """
        frame = current_frame()
        if frame is None:
            record = self.record_draw(key)
        else:
            with frame.within(frame.fresh("program")):
                record = self.record_draw()
        return public_value(record), record.log_density

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The log-density of a dict of site values; every latent site must be there and no other.

        Args:
            value: dict of site values.
            key: needed only by subsampled plates whose indices are not in `value`.

        Returns:
            The log-density; with a subsampled plate, an unbiased estimate of it.
        """
        return evaluate(self, value, key=key).log_density


def public_value(record: Record) -> dict[str, PyTree]:
    """The value of a program: its latent sites and the indices of subsampled plates."""
    return {**record.values, **record.indices}


def program(fn: Callable, params: Mapping[str, PyTree] | None = None) -> Callable[..., Program]:
    """Turn a numpyro model or guide into a family of measures.

    `program(fn)(*args, **kwargs)` is a `Measure` over dicts of site values. Observed sites make it unnormalized: it is
    then the joint density as a function of the latent sites. `plate` (also subsampled), `mask`, `scale`, `factor`,
    `deterministic` and numpyro's `scan` and `cond` are honored.

    Args:
        fn: a function or `eqx.Module` with sites; for an `eqx.Module` its arrays remain leaves of the measure.
        params: values of `numpyro.param` sites, in their constrained space.

    Returns:
        A function of the program's arguments that returns the measure.

    Raises:
        TypeError: if `fn` is not callable.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model(y):
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> measure = vi.program(model)(1.0)
        >>> round(float(measure.log_density({"x": 0.5})), 4)
        -1.7697
    """
    if not callable(fn):
        raise TypeError(f"`fn` must be callable; got {describe(fn)}.")

    def applied(*args: PyTree, **kwargs: PyTree) -> Program:
        return Program(fn, args, kwargs, dict(params or {}))

    return applied


@overload
def with_grad(measure: Program, strategies: Mapping[str, Strategy]) -> Program: ...
@overload
def with_grad(measure: Callable[..., Program], strategies: Mapping[str, Strategy]) -> Callable[..., Program]: ...
def with_grad(
    measure: Program | Callable[..., Program], strategies: Mapping[str, Strategy]
) -> Program | Callable[..., Program]:
    """Give the sites of a program their gradient strategies from outside.

    Args:
        measure: a program, or a function returning one (as `gk.vi.program(fn)` is).
        strategies: `{glob: strategy}`; the first match wins and overrides the strategy named at the site.

    Returns:
        The same, with strategies attached.

    Raises:
        TypeError: if a value is not a strategy or `measure` is not a program.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> coin = vi.program(lambda p: vi.sample("b", dist.Bernoulli(p)))
        >>> scored = vi.with_grad(coin, {"b": vi.Score()})
        >>> [type(d.strategy).__name__ for d in vi.explain(lambda: vi.draw(scored(0.3))[1], key=jax.random.key(0))]
        ['Score']
    """
    for name, strategy in strategies.items():
        if not isinstance(strategy, Strategy):
            raise TypeError(f"`strategies[{name!r}]` must be a gk.vi.Strategy; got {describe(strategy)}.")
    pairs = tuple(strategies.items())
    if isinstance(measure, Program):
        return eqx.tree_at(
            lambda p: p.strategies, measure, (*pairs, *measure.strategies), is_leaf=lambda x: isinstance(x, tuple)
        )
    if isinstance(measure, Measure) or not callable(measure):
        raise TypeError(f"`measure` must be a program; got {describe(measure)}. Other measures have no sites to name.")

    def applied(*args: PyTree, **kwargs: PyTree) -> Program:
        return with_grad(measure(*args, **kwargs), strategies)

    return applied


def condition(measure: Program, values: Mapping[str, PyTree]) -> Program:
    """Observe sites of a program: they leave its value and stay in its density.

    Args:
        measure: a program.
        values: `{site: observed value}`.

    Returns:
        The conditioned, unnormalized program.

    Raises:
        TypeError: if `measure` is not a program.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from genkit import vi
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(x, 0.5))
        >>> posterior = vi.condition(vi.program(model)(), {"y": 1.0})
        >>> round(float(posterior.log_density({"x": 0.5})), 4)
        -1.7697
    """
    if not isinstance(measure, Program):
        raise TypeError(f"`program` must be made by gk.vi.program; got {describe(measure)}.")
    return Program(
        measure.fn, measure.args, measure.kwargs, measure.params, {**measure.data, **values}, measure.strategies
    )


# --- inside E ---------------------------------------------------------------------------------------------------


def simulate(measure: MeasureLike) -> tuple[PyTree, Array, Record | None]:
    """Draw inside `E`: value, log-density and, for programs, the record of sites."""
    frame = require_frame("draw")
    measure = as_measure(measure)
    frame.check_trace("A draw")
    if isinstance(measure, Program):
        with frame.within(frame.fresh("draw")):
            record = measure.record_draw()
        return public_value(record), record.log_density, record
    scope = frame.fresh("draw")
    if isinstance(measure, DistributionMeasure):
        distribution = smooth(measure.distribution)
        value, intermediates = draw_site(frame, scope, distribution, None)
        plain = unchecked(distribution)
        log_prob = plain.log_prob(value, intermediates) if intermediates else plain.log_prob(value)
        return value, jnp.sum(log_prob), None
    with frame.within(scope):
        value, log_density = measure.sample(key=frame.key("/".join(frame.scope)))
    return value, log_density, None


def evaluate(
    measure: Program,
    value: PyTree,
    *,
    key: Key[Array, ""] | None = None,
    strict: bool = True,
    on_site: Callable[[str, dist.Distribution], bool] | None = None,
) -> Record:
    """Weigh a program at a value: the record of its sites.

    Args:
        measure: the program.
        value: dict of site values.
        key: as for `Program.record_weights`.
        strict: refuse values that no site takes.
        on_site: as for `Program.record_weights`.

    Returns:
        The record of the run.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"`value` must be a dict of site values; got {describe(value)}.")
    record = measure.record_weights(value, key, on_site)
    extra = sorted(set(value) - record.used - set(record.indices))
    if strict and extra:
        known = ", ".join(sorted(record.values)) or "none"
        raise ValueError(
            f"`value` must hold only latent sites of the program; got {', '.join(map(repr, extra))} as well "
            f"(its latent sites: {known}). Remove the site from the guide, mark it auxiliary "
            '(`infer={"is_auxiliary": True}`), or sum it out with `gk.vi.marginal`.'
        )
    return record


def weigh(measure: MeasureLike, value: PyTree) -> Array:
    """The log-density inside `E`, estimated ones in the surrounding expectation."""
    measure = as_measure(measure)
    if isinstance(measure, DistributionMeasure):
        measure = DistributionMeasure(smooth(measure.distribution))
    frame = current_frame()
    if frame is None:
        return measure.log_density(value, key=None)
    scope = frame.fresh("density")
    with frame.within(scope):
        if isinstance(measure, (Program, DistributionMeasure)):
            return measure.log_density(value)
        return measure.log_density(value, key=frame.key("/".join(frame.scope)))


def draw(measure: MeasureLike) -> tuple[PyTree, Float[Array, ""]]:
    """Draw from a measure inside `E`.

    Args:
        measure: a `Measure` or numpyro distribution. Sites of programs follow their strategies; a bare distribution
            is one site under the default policy.

    Returns:
        The value and its log-density (estimated, for nested measures).

    Raises:
        RuntimeError: outside `E`.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from genkit import vi
        >>> round(float(vi.E(lambda: 2.0 * vi.draw(dist.Bernoulli(0.3))[0])(key=jax.random.key(0))), 4)
        0.6
    """
    value, log_density, _ = simulate(measure)
    return value, log_density


def log_density(measure: MeasureLike, value: PyTree) -> Float[Array, ""]:
    """The log-density of `value` under a measure; estimates belong to the surrounding `E`.

    Args:
        measure: a `Measure` or numpyro distribution.
        value: a value of the measure.

    Returns:
        The log-density, or for nested measures the log of an unbiased estimate of the density.

    Example:
        >>> import numpyro.distributions as dist
        >>> from genkit import vi
        >>> round(float(vi.log_density(dist.Normal(0.0, 1.0), 0.0)), 4)
        -0.9189
    """
    return weigh(measure, value)
