"""The model: a stochastic differential equation driven by fractional noise, and ready-made coefficients."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genkit._core._checks import check, check_choice, check_finite, check_interval, check_positive, is_concrete
from genkit._core._fields import FROZEN
from genkit.noise import HURST_RANGE, Lift


STEPS = ("path_mean", "exponential", "exact")


class OrnsteinUhlenbeck(eqx.Module):
    """The linear drift `-rate * (x - mean)`, its numbers as leaves (so that sweeping or learning them costs nothing).

    Args:
        rate: mean reversion rate per unit of time, scalar or (d,).
        mean: level it reverts to, scalar or (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.sde import OrnsteinUhlenbeck
        >>> float(OrnsteinUhlenbeck(2.0, mean=1.0)(0.0, jnp.array([2.0]))[0])
        -2.0
    """

    rate: Array = eqx.field(converter=jnp.asarray)
    mean: Array = eqx.field(converter=jnp.asarray, default=0.0)

    def __call__(self, t: Float[ArrayLike, ""], x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The drift at state `x`."""
        return -self.rate * (x - self.mean)


class Constant(eqx.Module):
    """A constant diffusion, scalar or per coordinate.

    Args:
        value: the diffusion, scalar or (d,).

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.sde import Constant
        >>> Constant(0.5)(0.0, jnp.zeros(3)).shape
        (3,)
    """

    value: Array = eqx.field(converter=jnp.asarray)

    def __call__(self, t: Float[ArrayLike, ""], x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The value, per coordinate of `x`."""
        return jnp.broadcast_to(self.value, x.shape).astype(x.dtype)


class LearnedHurst(eqx.Module):
    """A Hurst index to learn by gradient, kept inside bounds by a logistic map of its one leaf.

    Args:
        init: starting value, scalar or (d,).
        lo: lower bound.
        hi: upper bound.

    Example:
        >>> from genkit.sde import LearnedHurst
        >>> float(LearnedHurst(0.3).value)
        0.3...
    """

    raw: Array
    lo: float = eqx.field(static=True)
    hi: float = eqx.field(static=True)

    def __init__(self, init: ArrayLike = 0.5, lo: float = 0.02, hi: float = 0.98):
        check_interval("lo", lo, 0, 1, open_lo=True, open_hi=True)
        check_interval("hi", hi, lo, 1, open_lo=True, open_hi=True)
        check_interval("init", init, lo, hi, open_lo=True, open_hi=True)
        self.lo, self.hi = float(lo), float(hi)
        unit = (jnp.asarray(init, jnp.result_type(float)) - lo) / (hi - lo)
        self.raw = jnp.log(unit) - jnp.log1p(-unit)

    @property
    def value(self) -> Array:
        """The index."""
        return self.lo + (self.hi - self.lo) * jax.nn.sigmoid(self.raw)


def _as_index(hurst: Any) -> Any:
    return hurst if callable(hurst) or isinstance(hurst, LearnedHurst) else jnp.asarray(hurst, jnp.result_type(float))


def _as_state(x0: Any) -> Any:
    return x0 if isinstance(x0, dist.Distribution) else jnp.atleast_1d(jnp.asarray(x0, jnp.result_type(float)))


def _as_clock(horizon: Any) -> Any:
    """Known numbers stay on the host, also inside jit, so that step tables are made there in float64."""
    dtype = np.dtype(jnp.result_type(float))
    with np.errstate(over="ignore"):  # refused as infinite
        return horizon.astype(dtype) if isinstance(horizon, jax.Array) else np.asarray(horizon, dtype)


class FractionalSDE(eqx.Module):
    r"""The model $dX=b(t,X)\,dt+s(t,X)\circ dB_H$, with unit-variance fractional noise per coordinate, $t\in[0,T]$.

    Stratonovich is the only reading that has a limit as the lift is refined; with additive noise it makes no
    difference. Coordinates have independent noises; couple them through the drift. Where the diffusion depends on the
    state and $H<1/4$, halving the step helps only once it is below `horizon / lift.hi`: sums of fourth powers of the
    increments grow until then. Take a lift with a smaller `hi` there.

    Training moves every array of the coefficients, the Hurst index and `x0`, default numbers included, but not the
    horizon.

    Args:
        drift: `drift(t, x) -> (d,)`.
        diffusion: `diffusion(t, x) -> (d,)` or scalar, the diagonal of the diffusion.
        lift: the noise, from `genkit.noise.ma_fbm` or `brownian`.
        hurst: Hurst index: a scalar, (d,), a `LearnedHurst`, or a function of physical time giving one of these shapes:
            then $B(t)=\sum_k\omega_k(H(t))Y_k(t)$ with the lift's processes Y and weights, of variance $t^{2H(t)}$.
        horizon: length T of the time interval, positive; the clock of the lift. Noise is accurate down to about
            `T / lift.hi`.
        x0: initial state (d,) or scalar, or a numpyro distribution of it with event or batch shape (d,).
        step: how one time step is made. "path_mean" uses exact means of the noise over the step (second order for
            additive noise, two drift calls); "exponential" also integrates the diagonal of the drift's Jacobian exactly
            (better by orders of magnitude where that is most of the drift, for one more derivative); "exact" draws
            affine, uncoupled drift with constant coefficients without any error.

    Raises:
        ValueError: if an index is outside (0, 1) or the lift's range, the horizon is not positive and finite, or a
            coefficient has the wrong shape.

    Example:
        >>> import genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.ma_fbm(), hurst=0.7, horizon=2.0)
        >>> model.dim
        1

    Source: Daems et al., "Variational inference for SDEs driven by fractional noise", ICLR 2024, section 3, with the
    changes named in `genkit.noise.Lift`.
    """

    drift: Callable
    diffusion: Callable
    lift: Lift
    hurst: Any = eqx.field(converter=_as_index)
    horizon: Any = eqx.field(metadata=FROZEN, converter=_as_clock)
    x0: Any = eqx.field(converter=_as_state, default=0.0)
    step: str = eqx.field(static=True, default="path_mean", kw_only=True)

    def __check_init__(self):
        check(isinstance(self.lift, Lift), "lift", "a genkit.noise.Lift (from `ma_fbm` or `brownian`)", self.lift)
        check_choice("step", self.step, STEPS)
        check(jnp.ndim(self.horizon) == 0, "horizon", "a scalar", self.horizon)
        check_positive("horizon", self.horizon)
        check_finite("horizon", self.horizon)
        if not isinstance(self.x0, dist.Distribution):
            check(self.x0.ndim == 1, "x0", "of shape (d,) or a numpyro law", self.x0)
            check_finite("x0", self.x0)
        self._check_hurst()
        d, dtype = self.dim, self.dtype
        state = (jax.ShapeDtypeStruct((), dtype), jax.ShapeDtypeStruct((d,), dtype))
        _check_coefficient("drift", self.drift, state, "", ((d,),))
        _check_coefficient("diffusion", self.diffusion, state, " or a scalar", ((d,), ()))

    def _check_hurst(self) -> None:
        value = self.hurst_at(jnp.zeros((), self.dtype))
        check(value.ndim <= 1, "hurst", "a scalar or of shape (d,)", value)
        check_interval("hurst", value, 0, 1, open_lo=True, open_hi=True)
        self.lift.weights(value)
        lo, hi = HURST_RANGE
        if self.lift.num_terms == 0:
            hint = "Brownian motion has no other; for fractional noise use lift=genkit.noise.ma_fbm()."
            check(not self.varying, "hurst", "0.5 with lift=brownian()", "a function of time", hint)
            check(not is_concrete(value) or np.allclose(value, 0.5), "hurst", "0.5 with lift=brownian()", value, hint)
        elif isinstance(self.hurst, LearnedHurst):
            ends = f"({self.hurst.lo}, {self.hurst.hi})"
            ok = lo <= self.hurst.lo and self.hurst.hi <= hi
            check(ok, "hurst", f"a LearnedHurst with bounds inside [{lo}, {hi}], where the lift ends", ends)
        ok = value.ndim == 0 or value.shape[0] == self.dim
        check(ok, "hurst", f"a scalar or of shape ({self.dim},), one per coordinate of x0", f"shape {value.shape}")

    @property
    def dtype(self) -> Any:
        """Floating type of the state."""
        return self.horizon.dtype

    @property
    def dim(self) -> int:
        """Number d of coordinates."""
        if isinstance(self.x0, dist.Distribution):
            shape = self.x0.batch_shape + self.x0.event_shape
            return int(np.prod(shape)) if shape else 1
        if self.x0.shape[0] == 1 and not callable(self.hurst):
            value = self.hurst_at(0.0)
            return value.shape[0] if value.ndim else 1
        return self.x0.shape[0]

    @property
    def clock(self) -> Any:
        """`horizon` as a constant of differentiation: a fact about the data that no training may move."""
        return jax.lax.stop_gradient(self.horizon) if isinstance(self.horizon, jax.Array) else self.horizon

    @property
    def has_law(self) -> bool:
        """Whether the initial state is drawn."""
        return isinstance(self.x0, dist.Distribution)

    @property
    def varying(self) -> bool:
        """Whether the Hurst index is a function of time."""
        return callable(self.hurst)

    def hurst_at(self, t: ArrayLike) -> Array:
        """The Hurst index at physical time `t`, scalar or (d,)."""
        if isinstance(self.hurst, LearnedHurst):
            return self.hurst.value
        return jnp.asarray(self.hurst(t)) if callable(self.hurst) else self.hurst

    def start(self) -> tuple[Array, Array]:
        """Mean and standard deviation (d,) of the initial state; zero deviation when it is known."""
        if isinstance(self.x0, dist.Distribution):
            expected, got = "a law of finite mean and variance under a guide", type(self.x0).__name__
            try:
                moments = (self.x0.mean, self.x0.variance)
            except NotImplementedError as error:
                raise ValueError(f"`x0` must be {expected}; numpyro gives none for {got}.") from error
            for moment in moments:
                check(not is_concrete(moment) or bool(np.isfinite(moment).all()), "x0", expected, got)
            mean, var = (jnp.broadcast_to(jnp.ravel(v), (self.dim,)) for v in moments)
            return mean.astype(self.dtype), jnp.sqrt(var).astype(self.dtype)
        return jnp.broadcast_to(self.x0, (self.dim,)).astype(self.dtype), jnp.zeros(self.dim, self.dtype)


def _check_coefficient(name: str, function: Any, state: tuple, also: str, shapes: tuple) -> None:
    """Refuse a coefficient that is no function of such a state, or returns another shape."""
    expected = f"a function (t, x) -> shape {state[1].shape}{also}"
    check(callable(function), name, expected, function, "Use `Constant`." if name == "diffusion" else "")
    diagonal = "Only diagonal diffusion is supported: return its diagonal; couple coordinates through the drift."
    if isinstance(function, Constant):
        check(function.value.ndim < 2, name, expected, _shape(function.value), diagonal)
    try:
        value = jax.eval_shape(function, *state)
    except (TypeError, ValueError) as error:
        hint = "The number of coordinates is that of `x0`."
        raise ValueError(f"`{name}` must be {expected}; got an error: {str(error).rstrip('.')}. {hint}") from error
    hint = diagonal if name == "diffusion" and getattr(value, "ndim", 0) == 2 else ""
    check(getattr(value, "shape", None) in shapes, name, expected, _shape(value), hint)


def _shape(value: Any) -> str:
    return f"shape {value.shape}" if hasattr(value, "shape") else f"a {type(value).__name__}"
