r"""Weights on $|D - x_0|^2$: what turns denoising into any other prediction loss."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from genkit._core._checks import check_positive
from genkit._core._fields import as_number


class EDMWeight(eqx.Module):
    r"""The weight $(\sigma^2 + \sigma_d^2) / (\sigma\sigma_d)^2$, under which the loss is that of the `F` prediction.

    Args:
        sigma_data: standard deviation of the data, positive.

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.EDMWeight(0.5)(0.5))
        8.0

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
    """

    sigma_data: Float[Array, ""] = eqx.field(converter=as_number, default=1.0)

    def __check_init__(self):
        check_positive("sigma_data", self.sigma_data)

    def __call__(self, sigma: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight at a noise level."""
        # As a sum, whose terms stay finite longer than the published quotient of squares of squares.
        return 1 / jnp.square(sigma) + 1 / jnp.square(self.sigma_data)


class MinSNRWeight(eqx.Module):
    r"""The weight $\min(1/\sigma^2, \gamma)$: noise prediction, its emphasis on small noise cut off.

    Args:
        gamma: largest weight, positive; 5 in the paper.

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.MinSNRWeight()(0.1))
        5.0

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023, section 3.4.
    """

    gamma: Float[Array, ""] = eqx.field(converter=as_number, default=5.0)

    def __check_init__(self):
        check_positive("gamma", self.gamma)

    def __call__(self, sigma: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight at a noise level."""
        return jnp.minimum(1 / jnp.square(sigma), self.gamma)


class EpsWeight(eqx.Module):
    r"""The weight $1/\sigma^2$, under which the loss is that of noise prediction, $|\hat\varepsilon - \varepsilon|^2$.

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.EpsWeight()(0.5))
        4.0

    Source: Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 14.
    """

    def __call__(self, sigma: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight at a noise level."""
        return 1 / jnp.square(sigma)


class VWeight(eqx.Module):
    r"""The weight $1 + 1/\sigma^2$, under which the loss is that of `v` prediction on a variance-preserving path.

    Example:
        >>> import genkit as gk
        >>> float(gk.diffusion.VWeight()(0.5))
        5.0

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, section 4.
    """

    def __call__(self, sigma: Float[ArrayLike, " *s"]) -> Float[Array, " *s"]:
        """The weight at a noise level."""
        return 1 + 1 / jnp.square(sigma)
