"""Operations on the guided prediction: rescaling, dynamic thresholding, a cap on its norm."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from genkit._core._checks import check_interval, check_positive
from genkit._core._fields import as_number
from genkit.guidance._vectors import norm, shrink
from genkit.sampling import Context, Guidance, PredictionTransform, Transformed


class Rescale(PredictionTransform):
    r"""Brings the standard deviation of the guided prediction back to that of the plain one; see `rescale`.

    Args:
        phi: fraction $\phi$ from 0 (off) to 1.

    Raises:
        ValueError: if it is out of range.

    Example:
        >>> import genkit as gk
        >>> guidance = (gk.guidance.cfg(6.0) + gk.guidance.negative(2.0, 3)) >> gk.guidance.Rescale(0.7)
    """

    phi: Float[Array, ""] = eqx.field(converter=as_number)
    needs_plain: bool = eqx.field(default=True, init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse fractions out of range."""
        check_interval("phi", self.phi, 0, 1)

    def __call__(
        self, x0: Float[Array, " *shape"], plain: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, " *shape"]:
        """Rescale."""
        own, wanted = norm(x0 - jnp.mean(x0)), norm(plain - jnp.mean(plain))
        ratio = jnp.where(own > 0, wanted / jnp.where(own > 0, own, 1), 1).astype(x0.dtype)
        return x0 * (1 + self.phi.astype(x0.dtype) * (ratio - 1))


class DynamicThreshold(PredictionTransform):
    r"""Clips the prediction to a quantile of its magnitudes and scales it back; see `dynamic_threshold`.

    Args:
        quantile: quantile $p$ from 0 to 1.
        limit: half the width of the range of the data, positive.

    Raises:
        ValueError: if something is out of range.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfg(6.0) >> gk.guidance.DynamicThreshold(0.995)
    """

    quantile: Float[Array, ""] = eqx.field(converter=as_number)
    limit: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)
    needs_plain: bool = eqx.field(default=False, init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse numbers out of range."""
        check_interval("quantile", self.quantile, 0, 1)
        check_positive("limit", self.limit)

    def __call__(
        self, x0: Float[Array, " *shape"], plain: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, " *shape"]:
        """Clip and scale."""
        limit = self.limit.astype(x0.dtype)
        edge = jnp.maximum(limit, jnp.quantile(jnp.abs(x0), self.quantile.astype(x0.dtype)))
        return jnp.clip(x0, -edge, edge) * (limit / edge)


class NormCap(PredictionTransform):
    r"""Never longer than the plain prediction: $D \min(1, \|D_{cond}\| / \|D\|)$.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfg(6.0) >> gk.guidance.NormCap()

    Source: the rule of ComfyUI's CFGNorm, over all axes of an example.
    """

    needs_plain: bool = eqx.field(default=True, init=False, static=True)

    def __call__(
        self, x0: Float[Array, " *shape"], plain: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, " *shape"]:
        """Cap."""
        return shrink(x0, norm(plain))


def rescale(guidance: Guidance, phi: Float[ArrayLike, ""] | float) -> Transformed:
    r"""Bring the standard deviation of the guided prediction back: $\phi D \frac{std(D_{cond})}{std(D)} + (1 - \phi) D$.

    Acts on predictions of the data; the published rule acts on the output of the network, whatever that is.

    Args:
        guidance: any guidance; its first slot is the plain prediction.
        phi: fraction $\phi$ from 0 (off) to 1; 0.7 is customary.

    Returns:
        A guidance; the same as `guidance >> Rescale(phi)`.

    Raises:
        TypeError: if `guidance` is none.
        ValueError: if `phi` is out of range.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.rescale(gk.guidance.cfg(6.0), 0.7)

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024, equations 15 and 16.
    """  # noqa: E501
    return Transformed(guidance, Rescale(phi))


def dynamic_threshold(
    guidance: Guidance, quantile: Float[ArrayLike, ""] | float, *, limit: Float[ArrayLike, ""] | float = 1.0
) -> Transformed:
    r"""Clip the guided prediction to $[-s, s]$ and divide by $s$, where $s = \max(1, quantile_p |D|)$.

    Args:
        guidance: any guidance.
        quantile: quantile $p$ of the magnitudes of an example, from 0 to 1; 0.995 is customary.
        limit: half the width of the range of the data, in place of 1.

    Returns:
        A guidance; the same as `guidance >> DynamicThreshold(quantile, limit)`.

    Raises:
        TypeError: if `guidance` is none.
        ValueError: if a number is out of range.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.dynamic_threshold(gk.guidance.cfg(6.0), 0.995)

    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", NeurIPS
    2022, section 2.3.
    """
    return Transformed(guidance, DynamicThreshold(quantile, limit))
