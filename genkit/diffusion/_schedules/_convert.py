"""Exact conversions between the quantities a network may predict."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Inexact

from genkit._core._checks import check_choice


PREDICTIONS = ("F", "eps", "v", "x0", "velocity", "score")


def convert(
    value: Inexact[ArrayLike, " *shape"],
    source: str,
    target: str,
    x: Inexact[ArrayLike, " *shape"],
    alpha: Float[ArrayLike, " *s"],
    sigma: Float[ArrayLike, " *s"],
    *,
    alpha_dot: Float[ArrayLike, " *s"] | None = None,
    sigma_dot: Float[ArrayLike, " *s"] | None = None,
    sigma_data: Float[ArrayLike, ""] = 1.0,
) -> Inexact[Array, " *shape"]:
    r"""Turn a prediction at $x = \alpha x_0 + \sigma \varepsilon$ into another one that says the same.

    With $D = E[x_0 \mid x]$ and $\varepsilon = (x - \alpha D)/\sigma$ the names stand for

    | name | quantity |
    |---|---|
    | `x0` | $D$ |
    | `eps` | $\varepsilon$ |
    | `score` | $-\varepsilon/\sigma$ |
    | `v` | $\alpha\varepsilon - \sigma D$ |
    | `velocity` | $\dot\alpha D + \dot\sigma\varepsilon$ |
    | `F` | $(D - c_{skip} x)/c_{out}$, $c_{skip} = \alpha\sigma_d^2/c^2$, $c_{out} = \sigma\sigma_d/c$, $c^2 = \alpha^2\sigma_d^2 + \sigma^2$ |

    Every one is linear in $(D, \varepsilon)$, and so is `x`: two linear forms determine the third, with a determinant in
    closed form. The result is exact and has finite gradients wherever it is determined, `alpha = 0` and `sigma = 0`
    included (there `x` alone gives `eps` or `x0`), and `NaN` where it is not, as `x0` from `eps` at `alpha = 0`.

    Args:
        value: the prediction that is known.
        source: its name.
        target: name of the prediction that is wanted.
        x: the noisy example, in the coordinates of `alpha` and `sigma`.
        alpha: scale of the data; must broadcast against `x`.
        sigma: standard deviation of the noise, non-negative; must broadcast against `x`.
        alpha_dot: rate of change of `alpha`, needed where `velocity` is named.
        sigma_dot: rate of change of `sigma`, needed where `velocity` is named.
        sigma_data: standard deviation of the data, used where `F` is named.

    Returns:
        The prediction named by `target`, of the shape of `value`.

    Raises:
        ValueError: for an unknown name, shapes that differ, or `velocity` without both rates.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> x0, eps = jnp.array([1.0]), jnp.array([-2.0])
        >>> x = 0.6 * x0 + 0.8 * eps
        >>> v = gk.diffusion.convert(x0, "x0", "v", x, 0.6, 0.8)
        >>> gk.diffusion.convert(v, "v", "eps", x, 0.6, 0.8).round(5).tolist()
        [-2.0]

    Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022, appendix D
    (`v`); Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, equation 7.
    """  # noqa: E501
    check_choice("source", source, PREDICTIONS)
    check_choice("target", target, PREDICTIONS)
    value = jnp.asarray(value)
    x = jnp.asarray(x)
    alpha = jnp.asarray(alpha)
    sigma = jnp.asarray(sigma)
    if value.shape != x.shape:
        raise ValueError(f"`value` must be of the shape of `x`, {x.shape}; got shape {value.shape}.")
    if not (_broadcasts_into(alpha.shape, x.shape) and _broadcasts_into(sigma.shape, x.shape)):
        raise ValueError(
            f"`alpha` and `sigma` must be broadcastable to the shape of `x`, {x.shape}; "
            f"got {alpha.shape}, {sigma.shape}."
        )
    if "velocity" in (source, target):
        missing = [name for name, rate in (("alpha_dot", alpha_dot), ("sigma_dot", sigma_dot)) if rate is None]
        if missing:
            names = " and ".join(missing)
            raise ValueError(f"`{names}` must be given where `velocity` is named; got None. See `Schedule.alpha_dot`.")
    if source == target:
        return value
    # The score is the noise divided by -sigma: exchange the noise, and divide last, where sigma is not zero.
    if source == "score":
        value = -sigma * value
        source = "eps"
    inner = target
    if target == "score":
        inner = "eps"
    if source != inner:
        rates = (alpha_dot, sigma_dot)
        known = _form(source, alpha, sigma, rates, sigma_data)
        wanted = _form(inner, alpha, sigma, rates, sigma_data)
        value = _exchange(value, x, alpha, sigma, known, wanted)
    if target != "score":
        return value
    return jnp.where(sigma == 0, jnp.nan, -_quotient(value, sigma))


class _Form(NamedTuple):
    """A linear form `data * D + noise * eps`, and its determinant `alpha * noise - sigma * data` against `x`."""

    data: Array | float
    noise: Array | float
    determinant: Array


def _form(name: str, alpha: Array, sigma: Array, rates: tuple, sigma_data: ArrayLike) -> _Form:
    """Linear form of a prediction."""
    # Each determinant is simplified by hand, so that it does not cancel.
    if name == "x0":
        return _Form(1.0, 0.0, -sigma)
    if name == "eps":
        return _Form(0.0, 1.0, alpha)
    if name == "v":
        return _Form(-sigma, alpha, alpha**2 + sigma**2)
    if name == "velocity":
        alpha_dot, sigma_dot = rates
        return _Form(alpha_dot, sigma_dot, alpha * sigma_dot - sigma * alpha_dot)
    norm = jnp.sqrt((alpha * sigma_data) ** 2 + sigma**2)
    return _Form(sigma / (sigma_data * norm), -alpha * sigma_data / norm, -norm / sigma_data)


def _exchange(value: Array, x: Array, alpha: Array, sigma: Array, source: _Form, target: _Form) -> Array:
    """Target form from `x` and the source form, or from `x` alone where that is enough."""
    # Cramer's rule: two linear forms in (D, eps), x among them, determine the third.
    of_x = _quotient(target.data * source.noise - target.noise * source.data, source.determinant)
    of_value = _quotient(target.determinant, source.determinant)
    solved = jnp.where(source.determinant == 0, jnp.nan, of_x * x + of_value * value)
    # Where its own determinant vanishes, the target is a multiple of x, whatever the source says.
    share = jnp.where(sigma == 0, _quotient(target.data, alpha), _quotient(target.noise, sigma))
    return jnp.where(target.determinant == 0, share * x, solved)


def _quotient(numerator: ArrayLike, denominator: Array) -> Array:
    """A quotient with finite value and gradients also where the denominator vanishes (the caller replaces it there)."""
    return jnp.asarray(numerator) / jnp.where(denominator == 0, 1, denominator)


def _broadcasts_into(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """True if arrays of `shape` broadcast against `target` without enlarging it."""
    padded = (1,) * (len(target) - len(shape)) + shape
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(padded, target, strict=True))
