"""Distributions on the unconstrained space, from which automatic guides are made."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key


class AbstractBase(eqx.Module):
    """A distribution on R^d with a differentiable sampler."""

    @abc.abstractmethod
    def sample(self, key: Key[Array, ""]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Draw a point and its log-density.

        Args:
            key: typed PRNG key.

        Returns:
            The point and its log-density.
        """

    @abc.abstractmethod
    def log_density(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """The log-density of a point.

        Args:
            x: the point.

        Returns:
            The log-density.
        """

    @abc.abstractmethod
    def transport(self, z: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """The distribution as the image of a standard normal.

        Args:
            z: a point; standard normal points are mapped to draws.

        Returns:
            Its image and the log-determinant of the map there.
        """


def _log_normal(z: Float[Array, " d"]) -> Float[Array, ""]:
    return -0.5 * jnp.sum(z**2) - 0.5 * z.size * math.log(2 * math.pi)


def _push(
    base: AbstractBase, key: Key[Array, ""], like: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """Draw by transport."""
    z = jr.normal(key, like.shape, like.dtype)
    x, log_det = base.transport(z)
    return x, _log_normal(z) - log_det


class DiagonalNormal(AbstractBase):
    """Independent normals.

    Args:
        loc: means.
        log_scale: logs of the standard deviations.
    """

    loc: Float[Array, " d"]
    log_scale: Float[Array, " d"]

    def sample(self, key: Key[Array, ""]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        return _push(self, key, self.loc)

    def transport(self, z: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Scale and shift."""
        return self.loc + jnp.exp(self.log_scale) * z, jnp.sum(self.log_scale)

    def log_density(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        return _log_normal((x - self.loc) * jnp.exp(-self.log_scale)) - jnp.sum(self.log_scale)


class FullNormal(AbstractBase):
    """A normal with full covariance, `L = exp(diag(log_scale)) (I + strict_lower(lower))`.

    Args:
        loc: means.
        log_scale: logs of the diagonal of the Cholesky factor.
        lower: its strictly lower part, relative to the diagonal; the rest is ignored.
    """

    loc: Float[Array, " d"]
    log_scale: Float[Array, " d"]
    lower: Float[Array, " d d"]

    def _factor(self) -> Float[Array, "d d"]:
        unit = jnp.tril(self.lower, -1) + jnp.eye(self.loc.size, dtype=self.loc.dtype)
        return jnp.exp(self.log_scale)[:, None] * unit

    def sample(self, key: Key[Array, ""]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        return _push(self, key, self.loc)

    def transport(self, z: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Multiply by the Cholesky factor and shift."""
        return self.loc + self._factor() @ z, jnp.sum(self.log_scale)

    def log_density(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        z = jax.scipy.linalg.solve_triangular(self._factor(), x - self.loc, lower=True)
        return _log_normal(z) - jnp.sum(self.log_scale)


class LowRankNormal(AbstractBase):
    """A normal with covariance `diag(exp(2 log_scale)) + F F^T`.

    Args:
        loc: means.
        log_scale: logs of the diagonal part.
        factor: the low-rank part.
    """

    loc: Float[Array, " d"]
    log_scale: Float[Array, " d"]
    factor: Float[Array, " d r"]

    def sample(self, key: Key[Array, ""]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        key_diag, key_factor = jr.split(key)
        own = jnp.exp(self.log_scale) * jr.normal(key_diag, self.loc.shape, self.loc.dtype)
        shared = self.factor @ jr.normal(key_factor, self.factor.shape[1:], self.loc.dtype)
        x = self.loc + own + shared
        return x, self.log_density(x)

    def transport(self, z: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Multiply by the Cholesky factor of the covariance, at a cost of d^3, and shift."""
        cov = jnp.diag(jnp.exp(2 * self.log_scale)) + self.factor @ self.factor.T
        factor = jnp.linalg.cholesky(cov)
        return self.loc + factor @ z, jnp.sum(jnp.log(jnp.diagonal(factor)))

    def log_density(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """The log-density of a point, by the matrix determinant and Woodbury identities."""
        distribution = dist.LowRankMultivariateNormal(self.loc, self.factor, jnp.exp(2 * self.log_scale))
        return distribution.log_prob(x)


class Coupling(eqx.Module):
    """One affine coupling layer: half of the coordinates are moved and scaled by a network of the other half.

    Args:
        net: the network.
        flip: whether the second half conditions the first.
        dim: number of coordinates.
    """

    net: eqx.nn.MLP
    flip: bool = eqx.field(static=True)
    dim: int = eqx.field(static=True)

    def _parts(self, x: Float[Array, " d"]) -> tuple[Array, Array]:
        half = self.dim // 2
        if self.flip:
            return x[half:], x[:half]
        return x[:half], x[half:]

    def _join(self, kept: Array, moved: Array) -> Float[Array, " d"]:
        return jnp.concatenate([moved, kept] if self.flip else [kept, moved])

    def _affine(self, kept: Array) -> tuple[Array, Array]:
        shift, raw = jnp.split(self.net(kept), 2)
        # Log-scales within (-2, 2): a young network could otherwise send early steps to infinity.
        return shift, 2.0 * jnp.tanh(raw / 2.0)

    def forward(self, x: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map a point and give the log-determinant.

        Args:
            x: the point.

        Returns:
            Its image and the log-determinant there.
        """
        kept, moved = self._parts(x)
        shift, log_scale = self._affine(kept)
        return self._join(kept, moved * jnp.exp(log_scale) + shift), jnp.sum(log_scale)

    def inverse(self, y: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Map back and give the log-determinant of the forward map.

        Args:
            y: the image.

        Returns:
            The point and the log-determinant of `forward` there.
        """
        kept, moved = self._parts(y)
        shift, log_scale = self._affine(kept)
        return self._join(kept, (moved - shift) * jnp.exp(-log_scale)), jnp.sum(log_scale)


class CouplingFlow(AbstractBase):
    """A diagonal normal pushed through affine coupling layers.

    Args:
        base: the normal, applied last so that location and scale stay free.
        layers: coupling layers.

    Source: Dinh, Sohl-Dickstein & Bengio, "Density estimation using Real NVP", ICLR 2017, equations 7-8.
    """

    base: DiagonalNormal
    layers: tuple[Coupling, ...]

    def sample(self, key: Key[Array, ""]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        return _push(self, key, self.base.loc)

    def transport(self, z: Float[Array, " d"]) -> tuple[Float[Array, " d"], Float[Array, ""]]:
        """Run the layers, then scale and shift."""
        total = jnp.sum(self.base.log_scale)
        for layer in self.layers:
            z, log_det = layer.forward(z)
            total = total + log_det
        return self.base.loc + jnp.exp(self.base.log_scale) * z, total

    def log_density(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        z = (x - self.base.loc) * jnp.exp(-self.base.log_scale)
        log_density = -jnp.sum(self.base.log_scale)
        for layer in reversed(self.layers):
            z, log_det = layer.inverse(z)
            log_density = log_density - log_det
        return log_density + _log_normal(z)
