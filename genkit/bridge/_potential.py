"""The mixture potential: one closed-form function from which plan, drift, paths and likelihoods derive."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Int, Key, Real, Shaped

from genkit._core._checks import check_finite, check_interval, check_shape
from genkit._core._fields import FROZEN, as_number
from genkit.bridge._inputs import as_floats
from genkit.bridge._scales import AbstractScale, Time, take


class MixturePotential(eqx.Module):
    r"""A Schrödinger potential that is a Gaussian mixture at t = 1, known in closed form at every t.

    With $s_t = (1-t) I + t S_k$, $P_k = s_t^{-1}$ and $z = x - c$ (`center`),

    $$\log\varphi(x,t) = \operatorname{lse}_k\Big[\log a_k + \tfrac12 \log|P_k|
      + \frac{z'(S_k-I)P_k z + 2 z'P_k r_k - t\, r_k'P_k r_k}{2\epsilon}\Big],$$

    which solves $\partial_t\varphi + \frac{\epsilon}{2}\Delta\varphi = 0$. Its terms are finite up to and including
    t = 1 because the quadratic common to all of them has been taken out by hand, so nothing divides by 1-t. At t = 1,
    $\varphi(y, 1) \propto v(y)\, e^{|y-c|^2/2\epsilon}$ with $v(y) = \sum_k a_k N(y \mid c + r_k, \epsilon S_k)$.

    All methods take leading batch axes on `x` and `t`.

    Args:
        log_weights: log a_k, shape (K,); a common shift changes only the normalization of the potential.
        shifts: r_k, shape (K, d).
        scale: the family S_k.
        epsilon: variance of the reference at t = 1, a positive scalar.
        center: the origin c of the coordinates, shape (d,); data far from the origin keep their digits in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from genkit.bridge import Iso, MixturePotential
        >>> potential = MixturePotential(jnp.zeros(1), jnp.ones((1, 2)), Iso(jnp.zeros(1)), 0.5, jnp.zeros(2))
        >>> print(potential.drift(jnp.zeros(2), 1.0))  # S = I: a pure shift
        [1. 1.]

    Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024, equations 9 to 13; the form above,
    without 1/(1-t), is derived from them.
    """

    log_weights: Float[Array, " k"] = eqx.field(converter=as_number)
    shifts: Float[Array, " k d"] = eqx.field(converter=as_number)
    scale: AbstractScale
    epsilon: Float[Array, ""] = eqx.field(metadata=FROZEN, converter=as_number)
    center: Float[Array, " d"] = eqx.field(metadata=FROZEN, converter=as_number)

    def __check_init__(self):
        # Transformations of JAX rebuild modules with other things than arrays in place of their leaves.
        if isinstance(self.epsilon, (jax.Array, np.ndarray)):
            check_interval("epsilon", self.epsilon, 0.0, open_lo=True)

    @property
    def num_components(self) -> int:
        """The number K of components."""
        return self.shifts.shape[-2]

    @property
    def dim(self) -> int:
        """The dimension d of the space."""
        return self.shifts.shape[-1]

    def terms(self, x: Float[Array, " d"], t: Time) -> Float[Array, " k"]:
        """The summands of `log_value` before the log-sum-exp, for one point.

        Args:
            x: a point, shape (d,).
            t: time in [0, 1].

        Returns:
            Shape (K,).
        """
        logdet = self.scale.logdet_resolvent(t, self.dim)
        quadratic = self.scale.exponent(t, x - self.center, self.shifts)
        return self.log_weights + 0.5 * logdet + quadratic / (2.0 * self.epsilon)

    def log_value(self, x: Shaped[ArrayLike, " *batch d"], t: Real[ArrayLike, " ..."]) -> Float[Array, " ..."]:
        """Log phi(x, t).

        Args:
            x: points, shape (..., d).
            t: times in [0, 1], broadcast against the leading axes of `x`.

        Returns:
            Shape (...).
        """
        x = self._checked(x, t)
        return jnp.vectorize(self._log_value, signature="(d),()->()")(x, t)

    def _log_value(self, x: Float[Array, " d"], t: Time) -> Float[Array, ""]:
        return jax.nn.logsumexp(self.terms(x, t))

    def weights(self, x: Shaped[ArrayLike, " *batch d"], t: Real[ArrayLike, " ..."]) -> Float[Array, " ..."]:
        """The posterior weights of the components given the path is at `x` at time `t`.

        Args:
            x: points, shape (..., d).
            t: times in [0, 1], broadcast against the leading axes of `x`.

        Returns:
            Shape (..., K), summing to one.
        """
        x = self._checked(x, t)
        return jnp.vectorize(self._weights, signature="(d),()->(k)")(x, t)

    def _weights(self, x: Float[Array, " d"], t: Time) -> Float[Array, " k"]:
        return jax.nn.softmax(self.terms(x, t))

    def drift(self, x: Shaped[ArrayLike, " *batch d"], t: Real[ArrayLike, " ..."]) -> Float[Array, " ..."]:
        """Epsilon grad log phi(x, t) = sum_k w_k(x, t) P_k(t) [r_k + (S_k - I) x].

        Args:
            x: points, shape (..., d).
            t: times in [0, 1], broadcast against the leading axes of `x`.

        Returns:
            Shape (..., d).
        """
        x = self._checked(x, t)
        return jnp.vectorize(self._drift, signature="(d),()->(d)")(x, t)

    def _checked(self, x: Shaped[ArrayLike, " *batch d"], t: Real[ArrayLike, " ..."]) -> Float[Array, " *batch d"]:
        """The points as floats; refuse those of another space, and known times outside [0, 1]."""
        check_shape("x", x, (*[None] * (jnp.ndim(x) - 1), self.dim), "The last axis is the space of the bridge.")
        check_interval("t", t, 0.0, 1.0)
        check_finite("x", x)
        return as_floats(x)[0]

    def _drift(self, x: Float[Array, " d"], t: Time) -> Float[Array, " d"]:
        return self._weights(x, t) @ self.scale.pull(t, x - self.center, self.shifts)

    def endpoint(self, x: Float[Array, " d"], t: Time) -> tuple[Float[Array, " k"], Float[Array, " k d"]]:
        """The distribution of the end point X1 given X_t = x: logits of its components and their means, for one point.

        The covariances are epsilon (1-t) S_k P_k(t).

        Args:
            x: a point, shape (d,).
            t: time in [0, 1].

        Returns:
            Logits (K,) and means (K, d).
        """
        z = jnp.broadcast_to(x - self.center, self.shifts.shape)
        means = self.scale.resolvent(t, self.scale.apply(z) + (1.0 - t) * self.shifts)
        return self.terms(x, t), means + self.center

    def sample_endpoint(self, x: Float[Array, " d"], t: Time, *, key: Key[Array, ""]) -> Float[Array, " d"]:
        """Draw X1 given X_t = x exactly, for one point.

        Args:
            x: a point, shape (d,).
            t: time in [0, 1].
            key: typed PRNG key.

        Returns:
            A point, shape (d,).
        """
        key_component, key_inner, key_outer = jr.split(key, 3)
        index = jr.categorical(key_component, self.terms(x, t))
        z = (x - self.center)[None]
        left = 1.0 - jnp.asarray(t, z.dtype)
        first = jr.normal(key_inner, (1, self.scale.noise_size(self.dim)), z.dtype)
        second = jr.normal(key_outer, z.shape, z.dtype)

        def draw(index: Int[Array, ""]) -> Float[Array, " d"]:
            scale = take(self.scale, index)
            mean = scale.resolvent(t, scale.apply(z) + left * self.shifts[index][None])
            # Covariance S P without a root of it: with A ~ N(0, S) and B ~ N(0, I),
            # sqrt(1-t) P A + sqrt(t) S P B has covariance S P ((1-t) P + t S P) = S P.
            inner = scale.resolvent(t, scale.color(first))
            outer = scale.resolvent(t, scale.apply(second))
            noise = jnp.sqrt(left) * inner + jnp.sqrt(1.0 - left) * outer
            return (mean + jnp.sqrt(self.epsilon * left) * noise)[0]

        if not self.scale.matrices:
            return draw(index) + self.center

        def keep(out: Float[Array, " d"], k: Int[Array, ""]) -> tuple[Float[Array, " d"], None]:
            return jnp.where(index == k, draw(k), out), None

        # Under `vmap` the loop variable is shared by all samples: matrix products with each component in turn,
        # where a gather would copy one matrix per sample.
        out, _ = jax.lax.scan(keep, jnp.zeros_like(x), jnp.arange(self.num_components))
        return out + self.center

    def log_c(self, x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " *batch"]:
        """Log c(x), the normalizer of the plan: log int exp(<x, y> / epsilon) v(y) dy.

        Args:
            x: points, shape (..., d).

        Returns:
            Shape (...).
        """
        x = as_floats(x)[0]
        return self.log_value(x, 0.0) + self._tilt(x)

    def log_v(self, y: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " *batch"]:
        """Log v(y), the adjusted potential of the plan pi(y | x) = v(y) exp(<x, y> / epsilon) / c(x).

        Args:
            y: points, shape (..., d).

        Returns:
            Shape (...).
        """
        y = as_floats(y)[0]
        return self.log_value(y, 1.0) - self._tilt(y) - 0.5 * self.dim * jnp.log(2.0 * jnp.pi * self.epsilon)

    def _tilt(self, x: Float[Array, " *batch d"]) -> Float[Array, " *batch"]:
        """|x|^2 / 2 epsilon, the gap between the potential and the two factors of the plan."""
        return jnp.sum(x * x, -1) / (2.0 * self.epsilon)

    def coupling(self, x0: Shaped[ArrayLike, " *batch d"]) -> dist.MixtureSameFamily:
        """The distribution of X1 given X0 = x0 as a numpyro mixture.

        Args:
            x0: starting points, shape (..., d).

        Returns:
            A mixture with batch shape (...) and event shape (d,).
        """
        logits, means = jnp.vectorize(lambda x: self.endpoint(x, 0.0), signature="(d)->(k),(k,d)")(as_floats(x0)[0])
        components = self.scale.distribution(means, self.epsilon)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)

    def shifted(self, log_constant: Float[ArrayLike, ""]) -> "MixturePotential":
        """The potential times exp(log_constant).

        Args:
            log_constant: a scalar.

        Returns:
            A potential with the same drift and plan.
        """
        return eqx.tree_at(lambda p: p.log_weights, self, self.log_weights + jnp.asarray(log_constant))
