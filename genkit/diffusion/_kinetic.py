"""The schedule of least kinetic energy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, Real

from genkit._core._checks import check, check_count, check_finite, check_positive, is_concrete
from genkit.diffusion._denoisers._empirical import EmpiricalDenoiser
from genkit.diffusion._schedules._base import Schedule, as_level, as_time
from genkit.diffusion._schedules._spline import Spline


# The speed of a path on the angle; below this the data are as good as Gaussian and any path is free.
_SLOWEST = 1e-4

# At how many noise levels the error of the data's denoiser is estimated, and from how many examples.
_LEVELS = 96
_EXAMPLES = 1024


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
        self,
        mmse: Callable[[np.ndarray], ArrayLike],
        scale: Float[ArrayLike, ""] | float = 1.0,
        *,
        num_nodes: int = 1024,
    ):
        check_count("num_nodes", num_nodes, 8)
        check_positive("scale", scale)
        psi = np.linspace(0, 0.5 * np.pi, num_nodes)
        # Gauss-Legendre within each cell; the ends, where the level is 0 or infinite, take the nearest inner speed.
        points, weights = np.polynomial.legendre.leggauss(4)
        inner = psi[:-1, None] + np.diff(psi)[:, None] * (1 + points) / 2
        flat = _speed(mmse, np.concatenate([inner.ravel(), psi[1:-1]]))
        cells = flat[: inner.size].reshape(inner.shape)
        nodes = flat[inner.size :]
        chi = np.concatenate([[0.0], np.cumsum(cells @ weights * np.diff(psi) / 2)])
        slopes = np.concatenate([cells[:1, 0], nodes, cells[-1:, -1]])
        dtype = jnp.result_type(float)
        self.scale = jnp.asarray(scale, dtype)
        self.angle = Spline(jnp.asarray(psi, dtype), jnp.asarray(chi, dtype), jnp.asarray(slopes, dtype))

    @classmethod
    def from_data(
        cls, x: Float[ArrayLike, " n *shape"], *, num_nodes: int = 1024, key: Key[Array, ""] | None = None
    ) -> "KineticOptimal":
        """The best path of a data set, by the exact denoiser of its examples.

        Args:
            x: examples `(n, *shape)`; of more than 1,024 so many are drawn at random.
            num_nodes: nodes of the quadrature.
            key: typed PRNG key of the noise; `None` for a fixed one.

        Returns:
            The schedule.
        """
        x = _chosen(x, key)
        # Built now, also inside a trace, as everything the path is made of.
        with jax.ensure_compile_time_eval():
            denoiser = EmpiricalDenoiser(x)
        return cls.from_denoiser(denoiser, x, num_nodes=num_nodes, key=key)

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
            x: examples `(n, *shape)`; of more than 1,024 so many are drawn at random.
            num_nodes: nodes of the quadrature.
            key: typed PRNG key of the noise; `None` for a fixed one.

        Returns:
            The schedule.
        """
        x = _chosen(x, key)
        scale = float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
        check_positive("scale of x", scale)
        psi = np.linspace(0, 0.5 * np.pi, _LEVELS + 2)[1:-1]
        # Few examples are seen often, each time with other noise. The fixed key is one that no user draws data with.
        x = x[np.arange(_EXAMPLES) % len(x)]
        if key is None:
            key = _fixed_key()

        # The best denoiser's error is orthogonal to every function of the noisy example, so it falls short of the best
        # linear one's, sin(psi)^2, by their mean squared distance. That stays sharp where the errors nearly cancel.
        @jax.jit
        def gains(levels: Array, x: Array, noise: Array) -> Array:
            def one(level: Array) -> Array:
                shrink = scale**2 / (scale**2 + level**2)

                def distance(pair: tuple[Array, Array]) -> Array:
                    y = pair[0] + level * pair[1]
                    return jnp.mean((denoiser(y, level) - shrink * y) ** 2)

                return jnp.mean(jax.lax.map(distance, (x, noise), batch_size=128))

            return jax.lax.map(one, levels)

        # Evaluated now, also inside a trace: the path is made of numbers.
        with jax.ensure_compile_time_eval():
            noise = jr.normal(key, x.shape, x.dtype)
            found = np.asarray(gains(scale * jnp.asarray(np.tan(psi), x.dtype), x, noise), np.float64)
        gain = np.clip(found / scale**2 / np.sin(psi) ** 2, 0, 1)

        def mmse(level: np.ndarray) -> np.ndarray:
            angle = np.arctan(level)
            return (1 - np.interp(angle, psi, gain)) * np.sin(angle) ** 2

        return cls(mmse, scale, num_nodes=num_nodes)

    @property
    def energy(self) -> Float[Array, ""]:
        """Kinetic energy of the path per coordinate, for data of unit second moment: `4 sin(Phi / 2)^2`."""
        return 4 * jnp.sin(self.angle.y[-1] / 2) ** 2

    def alpha(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        radius, psi = self._polar(t)
        # The right angle rounds to either side of itself; there is no data of negative scale at the end.
        return radius * jnp.maximum(jnp.cos(psi), 0)

    def sigma(self, t: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        radius, psi = self._polar(t)
        return self.scale.astype(psi.dtype) * radius * jnp.sin(psi)

    def time(self, noise_level: Real[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        level = as_level(noise_level)
        chi = self.angle(jnp.arctan(level / self.scale.astype(level.dtype)))
        near = jnp.sin(chi)
        far = jnp.sin(self.angle.y[-1].astype(level.dtype) - chi)
        return near / (near + far)

    def _polar(self, t: Real[ArrayLike, " *s"]) -> tuple[Array, Array]:
        """Radius and angle of the straight line at time `t`."""
        t = as_time(t)
        whole = self.angle.y[-1].astype(t.dtype)
        along = (1 - t) + t * jnp.cos(whole)
        across = t * jnp.sin(whole)
        return jnp.hypot(along, across), self.angle.inverse(jnp.arctan2(across, along))


def _chosen(x: Float[ArrayLike, " n *shape"], key: Key[Array, ""] | None) -> Float[np.ndarray, " m *shape"]:
    """At most `_EXAMPLES` of the examples, drawn at random where there are more: data are often sorted."""
    check(is_concrete(x), "x", "concrete, because the path is computed on the host", "a traced value")
    x = np.asarray(x)
    check(x.ndim >= 2 and len(x) >= 2, "x", "at least two examples `(n, *shape)`", f"shape {x.shape}")
    check_finite("x", x)
    # The floating dtype that JAX would give it.
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.result_type(float)
    x = x.astype(dtype)
    if len(x) <= _EXAMPLES:
        return x
    if key is None:
        key = _fixed_key()
    with jax.ensure_compile_time_eval():
        rows = np.asarray(jr.permutation(jr.fold_in(key, 1), len(x))[:_EXAMPLES])
    return x[rows]


def _fixed_key() -> Key[Array, ""]:
    """A key that no user draws data with."""
    with jax.ensure_compile_time_eval():
        return jr.fold_in(jr.key(0), 0x6B6F)


def _speed(mmse: Callable[[np.ndarray], ArrayLike], psi: np.ndarray) -> np.ndarray:
    """The factor `g` at angles strictly inside the quarter circle."""
    error = np.asarray(mmse(np.tan(psi)), np.float64)
    check(error.shape == psi.shape, "mmse", "a function that acts on each level by itself", f"shape {error.shape}")
    check_finite("mmse", error)
    # Estimates and rounding may leave [0, 1] by a little.
    if not ((error >= -1e-9).all() and (error <= 1 + 1e-6).all()):
        raise ValueError(
            f"`mmse` must be between 0 and 1, a fraction of the second moment; got {error.min():g} to {error.max():g}."
        )
    return np.sqrt(np.clip(1 - error / np.sin(psi) ** 2, _SLOWEST**2, 1))
