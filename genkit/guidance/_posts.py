"""Operations on the guided prediction: rescaling, dynamic thresholding, a cap on its norm."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from genkit._core._checks import check_interval, check_positive
from genkit._core._fields import as_number
from genkit.guidance._linear import Linear
from genkit.guidance._vectors import norm, ratio, shrink
from genkit.sampling import Context, Guidance, PredictionTransform, Slot, Transformed


class Rescale(PredictionTransform):
    """Brings the standard deviation of the guided prediction back to that of the plain one; see `rescale`."""

    phi: Float[Array, ""] = eqx.field(converter=as_number)
    needs_plain: bool = eqx.field(default=True, init=False, static=True)

    def __check_init__(self) -> None:
        """Refuse fractions out of range."""
        check_interval("phi", self.phi, 0, 1)

    def __call__(
        self, x0: Float[Array, " *shape"], plain: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, " *shape"]:
        # Both standard deviations lack the factor 1 / sqrt(size), which cancels; a constant example is left alone.
        own = norm(x0 - jnp.mean(x0))
        wanted = norm(plain - jnp.mean(plain))
        factor = ratio(wanted, own, 1).astype(x0.dtype)
        # Equation 16, phi times the rescaled prediction and 1 - phi times the guided one, in one product.
        return x0 * (1 + self.phi.astype(x0.dtype) * (factor - 1))


class DynamicThreshold(PredictionTransform):
    """Clips the prediction to a quantile of its magnitudes and scales it back; see `dynamic_threshold`."""

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
        limit = self.limit.astype(x0.dtype)
        # Never below the limit: a prediction within the range of the data stays as it is.
        edge = jnp.maximum(limit, jnp.quantile(jnp.abs(x0), self.quantile.astype(x0.dtype)))
        return jnp.clip(x0, -edge, edge) * (limit / edge)


class NormCap(PredictionTransform):
    r"""Shortens predictions that are longer than the plain one: $D \min(1, \|D_{cond}\| / \|D\|)$.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.cfg(6.0) >> gk.guidance.NormCap()

    Source: the rule of ComfyUI's CFGNorm, over all axes of an example.
    """

    needs_plain: bool = eqx.field(default=True, init=False, static=True)

    def __call__(
        self, x0: Float[Array, " *shape"], plain: Float[Array, " *shape"], ctx: Context
    ) -> Float[Array, " *shape"]:
        return shrink(x0, norm(plain))


def rescale(guidance: Guidance | None = None, phi: Float[ArrayLike, ""] | float = 0.7) -> Transformed:
    r"""Bring the standard deviation of the guided prediction back: $\phi D \frac{std(D_{cond})}{std(D)} + (1 - \phi) D$.

    Acts on predictions of the data; the published rule acts on the output of the network, whatever that is.

    Args:
        guidance: any guidance; its first slot is the plain prediction. `None` is the plain prediction itself, which
            rescaling leaves as it is.
        phi: fraction $\phi$ from 0 (off) to 1; 0.7 is customary.

    Returns:
        A guidance.

    Raises:
        TypeError: if `guidance` is something else.
        ValueError: if `phi` is out of range.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.rescale(gk.guidance.cfg(6.0) + gk.guidance.negative(2.0, 3), 0.7)

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024, equations 15 and 16.
    """  # noqa: E501
    return Transformed(_or_plain(guidance), Rescale(phi))


def dynamic_threshold(
    guidance: Guidance | None = None,
    quantile: Float[ArrayLike, ""] | float = 0.995,
    *,
    limit: Float[ArrayLike, ""] | float = 1.0,
) -> Transformed:
    r"""Clip the guided prediction to $[-s, s]$ and divide by $s$, where $s = \max(1, quantile_p |D|)$.

    Args:
        guidance: any guidance; `None` clips the plain prediction.
        quantile: quantile $p$ of the magnitudes of an example, from 0 to 1; 0.995 is customary.
        limit: half the width of the range of the data, in place of 1.

    Returns:
        A guidance.

    Raises:
        TypeError: if `guidance` is something else.
        ValueError: if a number is out of range.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.dynamic_threshold(gk.guidance.cfg(6.0), 0.995)
        >>> [slot.name for slot in gk.guidance.dynamic_threshold(quantile=0.9).slots()]
        ['cond']

    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", NeurIPS
    2022, section 2.3.
    """
    return Transformed(_or_plain(guidance), DynamicThreshold(quantile, limit))


def _or_plain(guidance: Guidance | None) -> Guidance:
    """The guidance, or the plain prediction as one."""
    if guidance is None:
        return Linear((Slot("cond"),), ())
    return guidance
