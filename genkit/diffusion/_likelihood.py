"""The log-density of a diffusion model under its probability flow."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, Key

from genkit._core._checks import check, check_count, check_interval, check_key, check_positive
from genkit._core._fields import as_number

from ._flow import Chart, Solution, chart, check_likelihood, solve, velocity


class AbstractTrace(eqx.Module):
    """How the divergence of the flow is taken."""

    @abc.abstractmethod
    def probes(self, z: Float[Array, " *shape"], key: Key[Array, ""] | None) -> Float[Array, " k *shape"] | None:
        """Random directions, fixed along the path; `None` where none are needed."""

    @abc.abstractmethod
    def __call__(
        self, field: Callable, z: Float[Array, " *shape"], probes: Float[Array, " k *shape"] | None
    ) -> tuple[Float[Array, " *shape"], Float[Array, " k"]]:
        """The field and one or several estimates of its divergence at `z`."""


class ExactTrace(AbstractTrace):
    """The divergence itself, one derivative for each coordinate.

    Args:
        batch_size: derivatives that are taken at once; all by default. Fewer save memory in many dimensions.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.ExactTrace().batch_size is None
        True
    """

    batch_size: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def probes(self, z: Float[Array, " *shape"], key: Key[Array, ""] | None) -> None:
        """None are needed."""
        return

    def __call__(
        self, field: Callable, z: Float[Array, " *shape"], probes: Float[Array, " k *shape"] | None
    ) -> tuple[Float[Array, " *shape"], Float[Array, " k"]]:
        """The field and its divergence."""
        value, push = jax.linearize(field, z)
        entry = lambda i: push(jnp.zeros(z.size, z.dtype).at[i].set(1).reshape(z.shape)).ravel()[i]
        places = jnp.arange(z.size)
        if self.batch_size is None or self.batch_size >= z.size:
            return value, jnp.sum(jax.vmap(entry)(places))[None]
        return value, jnp.sum(jax.lax.map(entry, places, batch_size=self.batch_size))[None]


class Hutchinson(AbstractTrace):
    r"""An unbiased estimate of the divergence from random signs $v$, $E[v^\top J v] = \mathrm{tr} J$.

    The signs are drawn once for each datum and kept along its path, so that the solver sees a smooth field. Their
    variance is $2(|S|_F^2 - \sum_i S_{ii}^2)$ with $S$ the symmetric part of $J$: none where that is diagonal.

    Args:
        num_probes: directions per datum; the standard error needs at least 2.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.Hutchinson(8).num_probes
        8

    Source: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1990; Grathwohl et al., "FFJORD",
    ICLR 2019, equation 7.
    """

    num_probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_probes", self.num_probes)

    def probes(self, z: Float[Array, " *shape"], key: Key[Array, ""] | None) -> Float[Array, " k *shape"]:
        """Random signs."""
        check_key(key)
        assert key is not None, "no key is no typed key"
        return jr.rademacher(key, (self.num_probes, *z.shape), z.dtype)

    def __call__(
        self, field: Callable, z: Float[Array, " *shape"], probes: Float[Array, " k *shape"] | None
    ) -> tuple[Float[Array, " *shape"], Float[Array, " k"]]:
        """The field and one estimate of its divergence for each direction."""
        value, push = jax.linearize(field, z)
        return value, jax.vmap(lambda v: jnp.sum(v * push(v)))(probes)


class LogProb(eqx.Module):
    """A log-density under the probability flow, with its parts.

    Args:
        value: log-density at `sigma_min` in nats; NaN where the solver did not get to the end.
        std_err: standard error over the probes; 0 with the exact trace, NaN with one probe.
        nfe: evaluations of the denoiser (each with its derivatives).
        latent: the state at `sigma_max`.
        terminal: log-density of the latent under the terminal law: all that law can get wrong is in here.
        volume: logarithm of the change of volume from `sigma_min` to `sigma_max`; `value = terminal + volume`.
        ok: whether the solver got to the end within its steps.
    """

    value: Float[Array, "*n"]
    std_err: Float[Array, "*n"]
    nfe: Int[Array, "*n"]
    latent: Float[Array, "..."]
    terminal: Float[Array, "*n"]
    volume: Float[Array, "*n"]
    ok: Bool[Array, "*n"]


def log_prob(
    denoiser: Any,
    x: Inexact[ArrayLike, " *shape"],
    *,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    trace: AbstractTrace = ExactTrace(),
    key: Key[Array, ""] | None = None,
    terminal: Any = None,
    rtol: Float[ArrayLike, ""] | float = 1e-5,
    atol: Float[ArrayLike, ""] | float = 1e-5,
    cond: Any = None,
    sigma_data: Float[ArrayLike, ""] | float | None = None,
    max_steps: int = 1024,
) -> LogProb:
    r"""The log-density of one example at `sigma_min` under the probability flow of a denoiser.

    $$\log p_{\sigma_{min}}(x) = \log p_{\sigma_{max}}(x_{\sigma_{max}})
      + \int_{\sigma_{min}}^{\sigma_{max}} \nabla\cdot\frac{x - D(x, \sigma)}{\sigma}\, d\sigma .$$

    Three errors are apart: that of the solver falls with `rtol` and `atol`; that of the terminal law is in `.terminal`
    alone; and the law is that of data with noise `sigma_min`, not of data.

    Args:
        denoiser: the model, for one example.
        x: the example.
        sigma_min: noise level at which the density is meant, positive.
        sigma_max: noise level at which the terminal law takes over.
        trace: `ExactTrace()`, or `Hutchinson(num_probes)` with a key.
        key: typed PRNG key of the probes; one for each datum.
        terminal: the law at `sigma_max`: a function from the latent to its log-density, or a numpyro law. By default
            the denoiser's own `log_density` where it has one, else centered noise of standard deviation `sigma_max`.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver, for states scaled to unit variance.
        cond: condition of the example.
        sigma_data: standard deviation of the data, for the solver's coordinates; by default the denoiser's own, or 1.
        max_steps: steps after which the solver gives up: the result is then NaN and not `ok`, other examples of a batch
            are not touched.

    Returns:
        `LogProb`; use `jax.vmap` for a batch.

    Raises:
        TypeError: for a sampler, a table or a guidance, which have no likelihood.
        ValueError: for noise levels out of order, a missing key, or a model that has none.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> found = gk.diffusion.log_prob(denoiser, jnp.ones(2), sigma_min=0.01, sigma_max=50.0)
        >>> round(float(found.value), 3)
        -2.838

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 39.
    """
    check_likelihood(denoiser)
    x = as_number(x)
    frame = chart(denoiser, sigma_min, sigma_max, sigma_data, x.dtype)
    _check_tolerances(rtol, atol)
    z = x / frame.scale(frame.sigma_min)
    ends = (frame.angle(frame.sigma_min), frame.angle(frame.sigma_max))
    options = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
    found, volumes = _solve_with_volume(denoiser, z, ends, frame, trace, key, cond, **options)
    latent = found.z * frame.scale(frame.sigma_max)
    # From the density of z to that of x at either end.
    stretch = x.size * (jnp.log(frame.scale(frame.sigma_max)) - jnp.log(frame.scale(frame.sigma_min)))
    exact = isinstance(trace, ExactTrace)
    return _assemble(denoiser, latent, volumes + stretch, terminal, frame, cond, found, exact=exact)


def sample_log_prob(
    denoiser: Any,
    *,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    shape: tuple[int, ...] | None = None,
    trace: AbstractTrace = ExactTrace(),
    terminal: dist.Distribution | None = None,
    rtol: Float[ArrayLike, ""] | float = 1e-5,
    atol: Float[ArrayLike, ""] | float = 1e-5,
    cond: Any = None,
    sigma_data: Float[ArrayLike, ""] | float | None = None,
    max_steps: int = 1024,
    key: Key[Array, ""],
) -> tuple[Float[Array, " *shape"], LogProb]:
    """Draw one example by the probability flow, with its log-density from the same solve.

    Args:
        denoiser: the model, for one example.
        sigma_min: noise level at which the solve ends, positive.
        sigma_max: noise level at which it starts.
        shape: shape of one example; needed where the denoiser does not tell.
        trace: as for `log_prob`.
        terminal: numpyro law of the state at `sigma_max`, of the shape of one example; by default centered noise of
            standard deviation `sigma_max`. The density is exact for the law that is drawn from.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        cond: condition of the example.
        sigma_data: as for `log_prob`.
        max_steps: as for `log_prob`.
        key: typed PRNG key.

    Returns:
        The example at `sigma_min`, and its `LogProb`.

    Raises:
        TypeError: for a sampler, a table or a guidance.
        ValueError: for noise levels out of order or an unknown shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.ones(2))
        >>> x, found = gk.diffusion.sample_log_prob(denoiser, sigma_min=0.01, sigma_max=50.0, key=jax.random.key(0))
        >>> x.shape, bool(found.ok)
        ((2,), True)
    """
    check_likelihood(denoiser)
    check_key(key)
    key_state, key_probes = jr.split(key)
    shape = tuple(getattr(denoiser, "shape", None) or ()) if shape is None else tuple(shape)
    check(bool(shape) or hasattr(denoiser, "shape"), "shape", "given where the denoiser does not tell it", "None")
    frame = chart(denoiser, sigma_min, sigma_max, sigma_data, jnp.result_type(float))
    _check_tolerances(rtol, atol)
    law = dist.Normal(jnp.zeros(shape), frame.sigma_max) if terminal is None else terminal
    check(isinstance(law, dist.Distribution), "terminal", "a numpyro law, because it is drawn from", type(law).__name__)
    latent = law.sample(key_state)
    check(latent.shape == shape, "terminal", f"a law over shape {shape}", f"shape {latent.shape}")
    ends = (frame.angle(frame.sigma_max), frame.angle(frame.sigma_min))
    z = latent / frame.scale(frame.sigma_max)
    options = {"rtol": rtol, "atol": atol, "max_steps": max_steps}
    found, volumes = _solve_with_volume(denoiser, z, ends, frame, trace, key_probes, cond, **options)
    stretch = latent.size * (jnp.log(frame.scale(frame.sigma_max)) - jnp.log(frame.scale(frame.sigma_min)))
    x = found.z * frame.scale(frame.sigma_min)
    exact = isinstance(trace, ExactTrace)
    return x, _assemble(denoiser, latent, stretch - volumes, law, frame, cond, found, exact=exact)


def bits_per_dim(
    log_prob: Float[ArrayLike, "*n"], dim: int, levels: int, scale: Float[ArrayLike, ""] | float
) -> Float[Array, "*n"]:
    r"""Bits per dimension of discrete data from the log-density of their dequantized form.

    With levels $k = 0, \dots, L - 1$ the model sees $x = scale\,(k + u)/L + shift$, $u$ uniform on [0, 1), and
    $-\log_2 P(k) \le -\log_2 p(x) / d + \log_2(L / scale)$ on average over $u$.

    Args:
        log_prob: log-densities of dequantized examples, in nats.
        dim: number of coordinates of one example.
        levels: number of discrete levels $L$.
        scale: width of the interval that the levels fill: 1 for [0, 1], 2 for [-1, 1].

    Returns:
        Bits per dimension, of the shape of `log_prob`.

    Raises:
        ValueError: for counts that are not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> float(gk.diffusion.bits_per_dim(jnp.array(0.0), dim=64, levels=16, scale=1.0))
        4.0

    Source: Theis, van den Oord and Bethge, "A Note on the Evaluation of Generative Models", ICLR 2016, section 3.1.
    """
    check_count("dim", dim)
    check_count("levels", levels)
    check_positive("scale", scale)
    return -jnp.asarray(log_prob) / (dim * jnp.log(2.0)) + jnp.log2(levels / jnp.asarray(scale))


def dequantize(
    ink: Int[ArrayLike, " *shape"], levels: int, scale: float = 1.0, shift: float = 0.0, *, key: Key[Array, ""]
) -> Float[Array, " *shape"]:
    """Spread discrete levels uniformly: `scale * (ink + u) / levels + shift` with `u` uniform on [0, 1).

    Args:
        ink: integer levels from 0 to `levels - 1`.
        levels: number of levels.
        scale: width of the interval that they fill.
        shift: its lower end.
        key: typed PRNG key.

    Returns:
        Continuous data, whose log-density `bits_per_dim` turns into bits.

    Raises:
        ValueError: for levels out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> x = gk.diffusion.dequantize(jnp.array([0, 3]), 4, key=jax.random.key(0))
        >>> (x * 4).astype(int).tolist()
        [0, 3]
    """
    check_key(key)
    check_count("levels", levels)
    check_interval("ink", ink, 0, levels - 1)
    ink = jnp.asarray(ink)
    return scale * (ink + jr.uniform(key, ink.shape)) / levels + shift


def _solve_with_volume(
    denoiser: Callable,
    z: Array,
    ends: tuple[Array, Array],
    frame: Chart,
    trace: AbstractTrace,
    key: Any,
    cond: Any,
    **options: Any,
) -> tuple[Solution, Array]:
    """The flow from `z`, and the integral of its divergence along it, one for each probe."""
    check(isinstance(trace, AbstractTrace), "trace", "ExactTrace() or Hutchinson(num_probes)", type(trace).__name__)
    needs_key = isinstance(trace, Hutchinson)
    check(not needs_key or key is not None, "key", "given with random probes", "None", "Or use `ExactTrace()`.")
    probes = trace.probes(z, key)
    field = velocity(denoiser, frame, cond)

    def both(theta: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
        return trace(lambda z: field(theta, z), state[0], probes)

    count = 1 if probes is None else len(probes)
    found = solve(both, (z, jnp.zeros(count, z.dtype)), ends, **options)
    return found, found.extra


def _assemble(
    denoiser: Any,
    latent: Array,
    volumes: Array,
    terminal: Any,
    frame: Chart,
    cond: Any,
    found: Solution,
    *,
    exact: bool,
) -> LogProb:
    """The parts of a log-density."""
    if terminal is None and hasattr(denoiser, "log_density"):
        end = denoiser.log_density(latent, frame.sigma_max, cond)
    else:
        law = dist.Normal(0.0, frame.sigma_max) if terminal is None else terminal
        end = jnp.sum(law.log_prob(latent)) if isinstance(law, dist.Distribution) else law(latent)
    check(jnp.shape(end) == (), "terminal", "a function from one latent to a number", f"shape {jnp.shape(end)}")
    volume = jnp.mean(volumes)
    count = len(volumes)
    spread = jnp.zeros_like(volume)
    if not exact:
        spread = jnp.std(volumes, ddof=1) / jnp.sqrt(count) if count > 1 else jnp.full_like(volume, jnp.nan)
    value = jnp.where(found.ok, end + volume, jnp.nan)
    return LogProb(value, spread, found.nfe, latent, jnp.asarray(end), volume, found.ok)


def _check_tolerances(rtol: Any, atol: Any) -> None:
    check_positive("rtol", rtol)
    check_positive("atol", atol)
