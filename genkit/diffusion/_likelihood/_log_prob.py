"""The log-density of a diffusion model under its probability flow."""

import warnings
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, Key, PyTree

from genkit._core._checks import check, check_finite, check_key, check_positive, is_concrete
from genkit._core._fields import as_number
from genkit.diffusion._flow import AngleChart, Solution, angle_chart, check_likelihood, solve, velocity
from genkit.diffusion._likelihood._trace import AbstractTrace, ExactTrace
from genkit.sampling import as_denoiser


Terminal = dist.Distribution | Callable[[Array], Array]


class LogProb(eqx.Module):
    """A log-density under the probability flow, with its parts.

    Args:
        value: log-density at `sigma_min` in nats; NaN where the solver did not get to the end.
        std_err: standard error over the probes; 0 with the exact trace, NaN with one probe.
        nfe: evaluations of the denoiser (each with its derivatives).
        latent: the state at `sigma_max`.
        terminal: log-density of the latent under the terminal distribution: all that it can get wrong is in here.
        volume: logarithm of the change of volume from `sigma_min` to `sigma_max`; `value = terminal + volume`.
        ok: true if the solver got to the end within its steps.
    """

    value: Float[Array, "*n"]
    std_err: Float[Array, "*n"]
    nfe: Int[Array, "*n"]
    latent: Float[Array, "..."]
    terminal: Float[Array, "*n"]
    volume: Float[Array, "*n"]
    ok: Bool[Array, "*n"]


def log_prob(
    denoiser: object,
    x: Inexact[ArrayLike, " *shape"],
    *,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    trace: AbstractTrace = ExactTrace(),
    key: Key[Array, ""] | None = None,
    terminal: Terminal | None = None,
    rtol: Float[ArrayLike, ""] | float = 1e-5,
    atol: Float[ArrayLike, ""] | float = 1e-5,
    cond: PyTree = None,
    sigma_data: Float[ArrayLike, ""] | float | None = None,
    max_steps: int = 1024,
) -> LogProb:
    r"""The log-density of one example at `sigma_min` under the probability flow of a denoiser.

    $$\log p_{\sigma_{min}}(x) = \log p_{\sigma_{max}}(x_{\sigma_{max}})
      + \int_{\sigma_{min}}^{\sigma_{max}} \nabla\cdot\frac{x - D(x, \sigma)}{\sigma}\, d\sigma .$$

    Three errors are apart: that of the solver falls with `rtol` and `atol`; that of the terminal distribution is in
    `.terminal` alone; and the density is that of data with noise `sigma_min`, not of data.

    Args:
        denoiser: the model, for one example.
        x: the example.
        sigma_min: noise level at which the density is meant, positive.
        sigma_max: noise level at which the terminal distribution takes over.
        trace: `ExactTrace()`, or `Hutchinson(num_probes)` with a key.
        key: typed PRNG key of the probes; one for each datum.
        terminal: distribution at `sigma_max`: a function from the latent to its log-density, or a numpyro distribution.
            By default the denoiser's own `log_density` where it has one, else centered noise of standard deviation
            `sigma_max`.
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
    denoiser = check_likelihood(denoiser)
    x = as_number(x)
    check_finite("x", x)
    chart = angle_chart(denoiser, sigma_min, sigma_max, sigma_data, x.dtype)
    solver = _Solver(rtol, atol, max_steps)
    ends = (chart.angle(chart.sigma_min), chart.angle(chart.sigma_max))
    z = x / chart.scale(chart.sigma_min)
    found, volumes = _solve_with_volume(velocity(denoiser, chart, cond), z, ends, trace, key, solver)
    latent = found.z * chart.scale(chart.sigma_max)
    if terminal is None:
        log_density = as_denoiser(denoiser).log_density
    else:
        log_density = None
    if log_density is not None:
        end = log_density(latent, chart.sigma_max, cond)
    else:
        end = _terminal_log_density(terminal, latent, chart.sigma_max)
    return _assemble(latent, end, volumes + _stretch(chart, x.size), found, is_random=trace.is_random)


def sample_log_prob(
    denoiser: object,
    *,
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    shape: tuple[int, ...] | None = None,
    trace: AbstractTrace = ExactTrace(),
    terminal: dist.Distribution | None = None,
    rtol: Float[ArrayLike, ""] | float = 1e-5,
    atol: Float[ArrayLike, ""] | float = 1e-5,
    cond: PyTree = None,
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
        terminal: numpyro distribution of the state at `sigma_max`, of the shape of one example; by default centered
            noise of standard deviation `sigma_max`. The density is exact for the distribution that is drawn from.
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
    denoiser = check_likelihood(denoiser)
    check_key(key)
    key_state, key_probes = jr.split(key)
    declared = as_denoiser(denoiser).shape
    if shape is None:
        shape = declared
    if shape is None:
        raise ValueError("`shape` must be given where the denoiser does not tell it; got None.")
    chart = angle_chart(denoiser, sigma_min, sigma_max, sigma_data, jnp.result_type(float))
    solver = _Solver(rtol, atol, max_steps)
    distribution = dist.Normal(jnp.zeros(shape), chart.sigma_max)
    if terminal is not None:
        drawable = isinstance(terminal, dist.Distribution)
        check(drawable, "terminal", "a numpyro distribution, because it is drawn from", type(terminal).__name__)
        distribution = terminal
    latent = distribution.sample(key_state)
    check(latent.shape == shape, "terminal", f"a distribution over shape {shape}", f"shape {latent.shape}")
    ends = (chart.angle(chart.sigma_max), chart.angle(chart.sigma_min))
    z = latent / chart.scale(chart.sigma_max)
    found, volumes = _solve_with_volume(velocity(denoiser, chart, cond), z, ends, trace, key_probes, solver)
    end = _terminal_log_density(distribution, latent, chart.sigma_max)
    # The solve went from the latent to the example: its volumes count backwards.
    volumes = _stretch(chart, latent.size) - volumes
    x = found.z * chart.scale(chart.sigma_min)
    return x, _assemble(latent, end, volumes, found, is_random=trace.is_random)


class _Solver(eqx.Module):
    """Tolerances and the limit of steps of the solver."""

    rtol: Float[ArrayLike, ""] | float
    atol: Float[ArrayLike, ""] | float
    max_steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)


def _solve_with_volume(
    field: Callable[[Array, Array], Array],
    z: Array,
    ends: tuple[Array, Array],
    trace: AbstractTrace,
    key: Key[Array, ""] | None,
    solver: _Solver,
) -> tuple[Solution, Float[Array, " k"]]:
    """The flow from `z`, and the integral of its divergence along it, one for each probe."""
    known = isinstance(trace, AbstractTrace)
    check(known, "trace", "ExactTrace() or Hutchinson(num_probes)", type(trace).__name__)
    if trace.is_random and key is None:
        raise ValueError("`key` must be given with random probes; got None. Or use `ExactTrace()`.")
    probes = trace.probes(z, key)

    def both(theta: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        return trace(lambda z: field(theta, z), state[0], probes)

    count = 1
    if probes is not None:
        count = len(probes)
    start = (z, jnp.zeros(count, z.dtype))
    found = solve(both, start, ends, rtol=solver.rtol, atol=solver.atol, max_steps=solver.max_steps)
    return found, found.extra


def _stretch(chart: AngleChart, size: int) -> Float[Array, ""]:
    """Logarithm of the change of volume between the scalings of the state at both ends of the chart."""
    return size * (jnp.log(chart.scale(chart.sigma_max)) - jnp.log(chart.scale(chart.sigma_min)))


def _terminal_log_density(terminal: Terminal | None, latent: Array, sigma_max: Array) -> Float[Array, ""]:
    """Log-density of the latent under the terminal distribution, by default centered noise."""
    if terminal is not None and not isinstance(terminal, dist.Distribution):
        return jnp.asarray(terminal(latent))
    distribution: dist.Distribution = dist.Normal(0.0, sigma_max)
    if isinstance(terminal, dist.Distribution):
        distribution = terminal
    # Summed, so that a scalar distribution stands for independent coordinates.
    return jnp.sum(jnp.asarray(distribution.log_prob(latent)))


def _assemble(
    latent: Array, end: Float[Array, "..."], volumes: Float[Array, " k"], found: Solution, *, is_random: bool
) -> LogProb:
    """The parts of a log-density, from that of the latent and the change of volume along each probe."""
    check(jnp.shape(end) == (), "terminal", "a function from one latent to a number", f"shape {jnp.shape(end)}")
    volume = jnp.mean(volumes)
    count = len(volumes)
    if not is_random:
        std_err = jnp.zeros_like(volume)
    elif count == 1:
        std_err = jnp.full_like(volume, jnp.nan)
    else:
        std_err = jnp.std(volumes, ddof=1) / jnp.sqrt(count)
    value = jnp.where(found.ok, end + volume, jnp.nan)
    if is_concrete(value) and bool(jnp.isnan(value)):
        # Under jit and vmap `ok` tells the same; here nobody may look at it.
        warnings.warn(
            "The log-density is NaN: the model returned NaN, or the solver gave up after its steps. See `LogProb.ok`.",
            stacklevel=3,
        )
    return LogProb(value, std_err, found.nfe, latent, end, volume, found.ok)
