"""The bridge: plan, distribution of paths and drift as three views of one object."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, Real, Shaped

from genkit._core._checks import check, check_finite, check_key, check_shape, fail, is_concrete
from genkit._core._fields import FROZEN
from genkit.bridge._abstract import AbstractExactBridge
from genkit.bridge._distribution import BridgeDistribution
from genkit.bridge._inputs import as_floats, check_points, check_times
from genkit.bridge._potential import MixturePotential
from genkit.bridge._reference import AbstractReference, Brownian
from genkit.bridge._scales import Points
from genkit.inference import Measure, as_measure


class Bridge(AbstractExactBridge):
    r"""A Schrödinger bridge in closed form: the reference tilted by a `MixturePotential`.

    $$\frac{dP}{dW^{x_0}}(X) = \frac{\varphi(X_1, 1)}{\varphi(x_0, 0)}, \qquad
      dX = \epsilon\nabla\log\varphi(X_t, t)\,dt + \sqrt{\epsilon}\,dB_t .$$

    The distribution given the start needs `potential` alone. Methods that look back in time (marginals, score, backward
    drift, reverse) also need the distribution at t = 0, held as the potential of the reverse bridge: `gaussian` and
    `mixture_pair` know it, others get it from samples by `with_source`.

    Methods take leading batch axes on points and times; one key serves a whole batch.

    Args:
        potential: the forward potential.
        reference: the reference process; by default the Brownian one with the epsilon of the potential.
        backward: the potential of the reverse bridge, on its own clock, normalized so that the marginal density
            is the product of the two.
        source: samples of the distribution at t = 0, shape (n, d), for bridges that start in an empirical distribution.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 1.0)
        >>> path = bridge.sample(jnp.zeros(2), jnp.linspace(0.0, 1.0, 5), key=jax.random.key(0))
        >>> path.shape, bool(jnp.isfinite(bridge.path_log_prob(jnp.linspace(0.0, 1.0, 5), path)))
        ((5, 2), True)

    Source: Léonard, "A survey of the Schrödinger problem", 2014; Korotin, Gushchin, Burnaev, ICLR 2024.
    """

    potential: MixturePotential
    reference: AbstractReference = eqx.field(metadata=FROZEN)
    backward: MixturePotential | None = eqx.field(metadata=FROZEN)
    source: Float[Array, " n d"] | None = eqx.field(metadata=FROZEN)

    def __init__(
        self,
        potential: MixturePotential,
        reference: AbstractReference | None = None,
        backward: MixturePotential | None = None,
        source: Float[Array, " n d"] | None = None,
    ):
        self.potential = potential
        if reference is None:
            reference = Brownian(potential.epsilon)
        self.reference = reference
        self.backward = backward
        self.source = source

    @property
    def start_samples(self) -> Float[Array, " n d"] | None:
        return self.source

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (d,) of a state."""
        return (self.dim,)

    @property
    def epsilon(self) -> Float[Array, ""]:
        """The variance of the reference at t = 1."""
        return self.potential.epsilon

    @property
    def dim(self) -> int:
        """The dimension of the space."""
        return self.potential.dim

    # --- forward: all from the potential -----------------------------------------------------------------------

    def drift(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The drift epsilon grad log phi(x, t); finite at t = 1.

        Args:
            t: times in [0, 1], broadcast against the leading axes of `x`.
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """
        return self.potential.drift(x, t)

    def coupling(self, x0: Shaped[ArrayLike, " *batch d"]) -> dist.MixtureSameFamily:
        """The plan given its start: the distribution of X1 given X0 = x0.

        Args:
            x0: starting points, shape (..., d).

        Returns:
            A numpyro mixture with batch shape (...) and event shape (d,).
        """
        check_points("x0", x0, self.dim)
        return self.potential.coupling(x0)

    def sample(
        self,
        x0: Shaped[ArrayLike, " *batch d"],
        ts: Real[ArrayLike, " n"],
        *,
        start: Real[ArrayLike, ""] = 0.0,
        key: Key[Array, ""],
    ) -> Float[Array, " *batch n d"]:
        """Exact paths on any grid: draw the end point, then fill in the bridge of the reference. No Euler steps.

        Args:
            x0: states at time `start`, shape (..., d).
            ts: non-decreasing times in [start, 1], shape (n,).
            start: the time at which the path is at `x0`.
            key: typed PRNG key.

        Returns:
            States at `ts`, shape (..., n, d).

        Raises:
            ValueError: for times outside [start, 1] or points of another dimension.
        """
        check_key(key)
        check_times(ts, start=start)
        check_points("x0", x0, self.dim)
        x0 = as_floats(x0)[0]
        ts = jnp.asarray(ts)

        def one(x: Float[Array, " d"], key: Key[Array, ""]) -> Float[Array, " n d"]:
            key_end, key_path = jr.split(key)
            x1 = self.potential.sample_endpoint(x, start, key=key_end)
            return self.reference.bridge(x, x1, ts, start, key=key_path)

        flat = x0.reshape(-1, self.dim)
        paths = jax.vmap(one)(flat, jr.split(key, flat.shape[0]))
        return paths.reshape(*x0.shape[:-1], *paths.shape[1:])

    def transition_log_prob(
        self,
        s: Real[ArrayLike, " ..."],
        x: Shaped[ArrayLike, " *#batch d"],
        t: Real[ArrayLike, " ..."],
        y: Shaped[ArrayLike, " *#batch d"],
    ) -> Float[Array, " ..."]:
        """Log p(X_t = y | X_s = x), exact: the reference kernel times the ratio of the potential.

        Args:
            s: earlier times in [0, 1).
            x: states at `s`, shape (..., d).
            t: later times in (s, 1].
            y: states at `t`, shape (..., d).

        Returns:
            Shape (...).
        """
        check_points("x", x, self.dim)
        check_points("y", y, self.dim)
        if is_concrete(s) and is_concrete(t) and not np.all(np.asarray(s) < np.asarray(t)):
            fail("s", "earlier than `t`", f"s = {s}, t = {t}")
        # Differences of unsigned integers would wrap around.
        x, y = as_floats(x, y)
        kernel = self.reference.log_kernel(s, x, t, y)
        return kernel + self.potential.log_value(y, t) - self.potential.log_value(x, s)

    def path_log_prob(self, ts: Real[ArrayLike, " n"], xs: Shaped[ArrayLike, " *batch n d"]) -> Float[Array, " *batch"]:
        """Log p(xs[1:] at ts[1:] | xs[0] at ts[0]), exact: the ratios of the potential telescope.

        Args:
            ts: strictly increasing times in [0, 1], shape (n,).
            xs: states, shape (..., n, d).

        Returns:
            Shape (...).
        """
        check_times(ts, strict=True)
        check_shape("xs", xs, (*[None] * (np.ndim(xs) - 2), np.shape(ts)[0], self.dim), "One state per time.")
        check_finite("xs", xs)
        ts = jnp.asarray(ts)
        xs = as_floats(xs)[0]
        kernels = self.reference.log_kernel(ts[:-1], xs[..., :-1, :], ts[1:], xs[..., 1:, :])
        ends = self.potential.log_value(xs[..., -1, :], ts[-1]) - self.potential.log_value(xs[..., 0, :], ts[0])
        return jnp.sum(kernels, -1) + ends

    def objective(self, x0: Shaped[ArrayLike, " n d"], x1: Shaped[ArrayLike, " m d"]) -> Float[Array, ""]:
        """Mean log c(x0) - mean log v(x1): the Kullback-Leibler divergence from the true plan, up to a constant.

        Args:
            x0: samples of the source, shape (n, d).
            x1: samples of the target, shape (m, d).

        Returns:
            A scalar in nats; lower is better.
        """
        check_points("x0", x0, self.dim)
        check_points("x1", x1, self.dim)
        check(min(np.size(x0), np.size(x1)) > 0, "x0 and x1", "non-empty", "no points")
        return jnp.mean(self.potential.log_c(x0)) - jnp.mean(self.potential.log_v(x1))

    # --- backward: needs the source ------------------------------------------------------------------------------

    def with_source(self, source: Shaped[ArrayLike, " n d"]) -> "Bridge":
        """The bridge started in the empirical distribution of `source`, so that it can look back in time.

        Args:
            source: samples of the distribution at t = 0, shape (n, d).

        Returns:
            A bridge with marginals, score, backward drift and reverse.
        """
        check_points("source", source, self.dim)
        points = as_floats(source)[0]
        check(points.ndim == 2 and points.shape[0] > 0, "source", "samples of shape (n, d)", points)
        return Bridge(self.potential, self.reference, self._empirical(points), points)

    def reverse(self, source: Shaped[ArrayLike, " n d"] | None = None) -> "Bridge":
        """The process run backward, as a bridge on its own clock: time t here is 1-t there.

        Args:
            source: samples of the distribution at t = 0, shape (n, d); not needed where the bridge knows its source.

        Returns:
            The bridge from the distribution at t = 1 to that at t = 0.
        """
        bridge = self
        if source is not None:
            bridge = self.with_source(source)
        return Bridge(bridge._backward(), self.reference, bridge.potential)

    def marginal_log_prob(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """Log p_t(x) = log phi(x, t) + log hatphi(x, t), normalized.

        Args:
            t: times in [0, 1]; in (0, 1] when the source is a set of samples.
            x: states, shape (..., d).

        Returns:
            Shape (...).
        """
        return self.potential.log_value(x, t) + self._backward().log_value(x, 1.0 - jnp.asarray(t))

    def backward_drift(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The drift epsilon grad log hatphi of the process run backward, at time `t` of the forward clock.

        Args:
            t: times in [0, 1].
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """
        return self._backward().drift(x, 1.0 - jnp.asarray(t))

    def score(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """Grad log p_t(x).

        Args:
            t: times in [0, 1].
            x: states, shape (..., d).

        Returns:
            Shape (..., d).
        """
        return (self.drift(t, x) + self.backward_drift(t, x)) / self.epsilon

    def probability_flow(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The velocity of the ordinary differential equation with the same marginals: drift - epsilon score / 2.

        Args:
            t: times in [0, 1].
            x: states, shape (..., d).

        Returns:
            Shape (..., d); half the difference of the two drifts, which keeps its digits.
        """
        return 0.5 * (self.drift(t, x) - self.backward_drift(t, x))

    # --- in programs -------------------------------------------------------------------------------------------

    def as_distribution(self, source: dist.Distribution, ts: Real[ArrayLike, " n"] | None = None) -> dist.Distribution:
        """The joint numpyro distribution of the path on a grid, by default of the end points (x0, x1).

        Args:
            source: the distribution of X0, event shape (d,).
            ts: strictly increasing times from 0 on, shape (n,); default (0, 1).

        Returns:
            A distribution over arrays of shape (n, d) with exact `log_prob`.
        """
        if ts is None:
            ts = jnp.array([0.0, 1.0])
        return BridgeDistribution(self, source, ts)

    def as_measure(self, source: dist.Distribution, ts: Real[ArrayLike, " n"] | None = None) -> Measure:
        """The joint distribution as a `Measure`.

        Args:
            source: the distribution of X0, event shape (d,).
            ts: strictly increasing times from 0 on, shape (n,); default (0, 1).

        Returns:
            A measure over arrays of shape (n, d).
        """
        return as_measure(self.as_distribution(source, ts))

    def _empirical(self, points: Float[Array, " n d"]) -> MixturePotential:
        """The backward potential of an empirical source: S = 0 on the reverse clock."""
        # hatphi(x, t) = mean_i N(x | x_i, epsilon t I) / phi(x_i, 0): a potential with S = 0 on the reverse clock.
        z = points - self.potential.center
        log_weights = -jnp.log(points.shape[0]) - self.potential.log_value(points, 0.0)
        gauge = jnp.sum(z * z, -1) / (2.0 * self.epsilon) + 0.5 * self.dim * jnp.log(2.0 * jnp.pi * self.epsilon)
        scale = Points(jnp.zeros_like(log_weights))
        return MixturePotential(log_weights - gauge, z, scale, self.epsilon, self.potential.center)

    def _backward(self) -> MixturePotential:
        """The potential of the reverse bridge."""
        if self.backward is None and self.source is not None:
            # Made anew: the potential may have been trained since.
            return self._empirical(self.source)
        if self.backward is None:
            raise ValueError(
                "`source` must be given to look back in time: this bridge does not know its distribution at t = 0. "
                "Use `bridge.with_source(x0)` or `bridge.reverse(x0)` with samples of it."
            )
        return self.backward
