"""The schedule of least kinetic energy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, Real

from genkit._core._checks import check, check_count, check_finite, check_positive

from ._schedules import Schedule, as_time
from ._spline import Spline


# The speed of a path on the angle; below this the data are as good as Gaussian and any path is free.
_SLOWEST = 1e-4

# At how many noise levels the error of the data's denoiser is estimated, and from how many examples.
_LEVELS, _EXAMPLES = 96, 1024


class KineticOptimal(Schedule):
    r"""The Gaussian path of least kinetic energy between given data and noise, in closed polar form.

    Let $\mathrm{mmse}(\psi)$ be the error of the best denoiser at noise level $\rho\tan\psi$, as a fraction of the
    second moment $\rho^2$ per coordinate, and $g^2 = 1 - \mathrm{mmse}/\sin^2\psi$. In polar coordinates of radius $r$
    and angle $\chi(\psi) = \int_0^\psi g$ the energy of the path $\alpha = r\cos\psi$, $\sigma = \rho\, r \sin\psi$
    is that of a point that moves in the plane: the best path is a straight line between two points of the unit circle
    at angle $\Phi = \chi(\pi/2)$, and its energy per coordinate is $4\rho^2\sin^2(\Phi/2)$. `t = 0` is data, `t = 1`
    noise.

    Data spread out in many dimensions have $\Phi = \pi/2$ and the straight path `CondOT`; for Gaussian data
    $\Phi = 0$.

    Args:
        mmse: function of a noise level (scaled by `scale`, so 1 is as much noise as data) that gives the mean squared
            error of the best denoiser per coordinate, as a fraction of the second moment.
        scale: root mean square $\rho$ of a coordinate of the data, positive.
        num_nodes: nodes of the quadrature.

    Raises:
        ValueError: for an error that is not in [0, 1] or a scale that is not positive.

    Example:
        >>> import genkit as gk
        >>> spread = gk.diffusion.KineticOptimal(lambda level: 0.0 * level)
        >>> round(float(spread.alpha(0.25)), 4), round(float(spread.energy), 4)
        (0.75, 2.0)

    Source: Shaul et al., "On Kinetic Optimal Probability Paths for Generative Models", ICML 2023, section 4; the polar
    form is ours.
    """

    scale: Float[Array, ""]
    angle: Spline  # from psi to chi

    def __init__(
        self, mmse: Callable[[np.ndarray], Any], scale: Float[ArrayLike, ""] | float = 1.0, *, num_nodes: int = 1024
    ):
        check_count("num_nodes", num_nodes, 8)
        check_positive("scale", scale)
        psi = np.linspace(0, 0.5 * np.pi, num_nodes)
        # Gauss-Legendre within each cell; the ends, where the level is 0 or infinite, take the nearest inner speed.
        points, weights = np.polynomial.legendre.leggauss(4)
        inner = psi[:-1, None] + np.diff(psi)[:, None] * (1 + points) / 2
        flat = _speed(mmse, np.concatenate([inner.ravel(), psi[1:-1]]))
        cells, nodes = flat[: inner.size].reshape(inner.shape), flat[inner.size :]
        chi = np.concatenate([[0.0], np.cumsum(cells @ weights * np.diff(psi) / 2)])
        slopes = np.concatenate([cells[:1, 0], nodes, cells[-1:, -1]])
        dtype = jnp.result_type(float)
        self.scale = jnp.asarray(scale, dtype)
        self.angle = Spline(jnp.asarray(psi, dtype), jnp.asarray(chi, dtype), jnp.asarray(slopes, dtype))

    @classmethod
    def from_data(
        cls, x: Float[ArrayLike, " n *shape"], *, num_nodes: int = 1024, key: Key[Array, ""] | None = None
    ) -> "KineticOptimal":
        """The best path of a data set, by the exact denoiser of the empirical law.

        Args:
            x: examples `(n, *shape)`; at most the first 1,024 are used.
            num_nodes: nodes of the quadrature.
            key: typed PRNG key of the noise; `None` for a fixed one.

        Returns:
            The schedule.
        """
        from ._analytic_empirical import EmpiricalDenoiser

        x = jnp.asarray(x)[:_EXAMPLES]
        return cls.from_denoiser(EmpiricalDenoiser(x), x, num_nodes=num_nodes, key=key)

    @classmethod
    def from_denoiser(
        cls,
        denoiser: Callable,
        x: Float[ArrayLike, " n *shape"],
        *,
        num_nodes: int = 1024,
        key: Key[Array, ""] | None = None,
    ) -> "KineticOptimal":
        """The best path of the data that a denoiser knows, by how far it is from linear on examples.

        Args:
            denoiser: a denoiser of the data, for one example.
            x: examples `(n, *shape)`; at most the first 1,024 are used.
            num_nodes: nodes of the quadrature.
            key: typed PRNG key of the noise; `None` for a fixed one.

        Returns:
            The schedule.
        """
        x = jnp.asarray(x)[:_EXAMPLES]
        check(x.ndim >= 2 and len(x) >= 2, "x", "at least two examples `(n, *shape)`", f"shape {x.shape}")
        check_finite("x", x)
        scale = float(jnp.sqrt(jnp.mean(x**2)))
        check_positive("scale of x", scale)
        psi = np.linspace(0, 0.5 * np.pi, _LEVELS + 2)[1:-1]
        # Few examples are seen often, each time with other noise. The fixed key is one that no user draws data with.
        x = x[jnp.arange(_EXAMPLES) % len(x)]
        noise = jr.normal(jr.fold_in(jr.key(0), 0x6B6F) if key is None else key, x.shape, x.dtype)

        # The best denoiser's error is orthogonal to every function of the noisy example, so it falls short of the best
        # linear one's, sin(psi)^2, by their mean squared distance. That stays sharp where the errors nearly cancel.
        @jax.jit
        def gains(levels: Array) -> Array:
            def one(level: Array) -> Array:
                shrink = scale**2 / (scale**2 + level**2)

                def distance(pair: tuple[Array, Array]) -> Array:
                    y = pair[0] + level * pair[1]
                    return jnp.mean((denoiser(y, level) - shrink * y) ** 2)

                return jnp.mean(jax.lax.map(distance, (x, noise), batch_size=128))

            return jax.lax.map(one, levels)

        levels = scale * jnp.asarray(np.tan(psi), x.dtype)
        gain = np.clip(np.asarray(gains(levels), np.float64) / scale**2 / np.sin(psi) ** 2, 0, 1)
        mmse = lambda level: (1 - np.interp(np.arctan(level), psi, gain)) * np.sin(np.arctan(level)) ** 2
        return cls(mmse, scale, num_nodes=num_nodes)

    @property
    def energy(self) -> Float[Array, ""]:
        """Kinetic energy of the path per coordinate, for data of unit second moment: `4 sin(Phi / 2)^2`."""
        return 4 * jnp.sin(self.angle.y[-1] / 2) ** 2

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Scale of the data."""
        radius, psi = self._polar(t)
        # The right angle rounds to either side of itself; there is no data of negative scale at the end.
        return radius * jnp.maximum(jnp.cos(psi), 0)

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """Standard deviation of the noise."""
        radius, psi = self._polar(t)
        return self.scale.astype(psi.dtype) * radius * jnp.sin(psi)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The time of a noise level; 1 at infinity."""
        level = as_time(noise_level)
        chi = self.angle(jnp.arctan(level / self.scale.astype(level.dtype)))
        near, far = jnp.sin(chi), jnp.sin(self.angle.y[-1].astype(level.dtype) - chi)
        return near / (near + far)

    def _polar(self, t: Real[ArrayLike, " *s"]) -> tuple[Array, Array]:
        """Radius and angle of the straight line at time `t`."""
        t = as_time(t)
        whole = self.angle.y[-1].astype(t.dtype)
        along, across = (1 - t) + t * jnp.cos(whole), t * jnp.sin(whole)
        return jnp.hypot(along, across), self.angle.inverse(jnp.arctan2(across, along))


def _speed(mmse: Callable[[np.ndarray], Any], psi: np.ndarray) -> np.ndarray:
    """The factor `g` at angles strictly inside the quarter circle."""
    error = np.asarray(mmse(np.tan(psi)), np.float64)
    check(error.shape == psi.shape, "mmse", "a function that acts on each level by itself", f"shape {error.shape}")
    check_finite("mmse", error)
    inside = bool((error >= -1e-9).all() and (error <= 1 + 1e-6).all())
    check(inside, "mmse", "between 0 and 1, a fraction of the second moment", f"{error.min():g} to {error.max():g}")
    return np.sqrt(np.clip(1 - error / np.sin(psi) ** 2, _SLOWEST**2, 1))
