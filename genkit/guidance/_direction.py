"""Guidance along a direction that is changed before it is applied: adaptive projected guidance and its relatives."""

import abc
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from genkit._core._checks import check, check_finite, check_interval
from genkit._core._fields import as_number
from genkit.guidance._switch import select
from genkit.guidance._types import Combined, Needs
from genkit.guidance._vectors import inner, norm, ratio, shrink
from genkit.guidance._weights import AbstractWeight, Scale, as_weight
from genkit.sampling import Context, Guidance, Prediction, Slot


class AbstractDirectionMap(eqx.Module):
    """A change of the guidance direction, for ONE example; a pipe of these makes a `Direction`."""

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        """Make the carry before the first step; by default there is none.

        Args:
            x: the initial noisy example.
        """
        return None

    @abc.abstractmethod
    def __call__(
        self,
        g: Float[Array, " *shape"],
        base: Float[Array, " *shape"],
        reference: Float[Array, " *shape"],
        carry: PyTree,
    ) -> tuple[Float[Array, " *shape"], PyTree]:
        """Change the direction.

        Args:
            g: the direction so far; before the first map the plain prediction minus the reference.
            base: the plain prediction.
            reference: the prediction to be guided away from.
            carry: the carry of this map.

        Returns:
            The new direction and the new carry.
        """


class Momentum(AbstractDirectionMap):
    r"""Accumulates directions over steps: $m \leftarrow g + \beta m$, a sum and not an average.

    Args:
        beta: $\beta$ in (-1, 1); negative, as recommended, stresses what is new in a step.

    Raises:
        ValueError: if it is out of range.

    Example:
        >>> import genkit as gk
        >>> float(gk.guidance.Momentum(-0.5).beta)
        -0.5

    Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
    Models", ICLR 2025, section 4.
    """

    beta: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self) -> None:
        """Refuse momenta that diverge."""
        check_interval("momentum", self.beta, -1, 1, open_lo=True, open_hi=True)

    def init(self, x: Float[Array, " *shape"]) -> Float[Array, " *shape"]:
        return jnp.zeros_like(x)

    def __call__(
        self,
        g: Float[Array, " *shape"],
        base: Float[Array, " *shape"],
        reference: Float[Array, " *shape"],
        carry: PyTree,
    ) -> tuple[Float[Array, " *shape"], PyTree]:
        # A sum and not an average, as published: with beta < 0 it damps what the steps have in common.
        total = g + self.beta.astype(g.dtype) * carry
        return total, total


class ClipNorm(AbstractDirectionMap):
    """Shortens directions that are longer than a threshold.

    Args:
        threshold: largest norm, positive; `inf` for none.
        rms: whether it is the root mean square of the entries, which does not depend on the size of examples, instead
            of the Euclidean norm.

    Raises:
        ValueError: if it is not positive.

    Example:
        >>> import genkit as gk
        >>> gk.guidance.ClipNorm(0.06, rms=True).rms
        True

    Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
    Models", ICLR 2025, section 4, which uses the Euclidean norm.
    """

    threshold: Float[Array, ""] = eqx.field(converter=as_number)
    rms: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        """Refuse thresholds that are not positive."""
        # Named as the arguments of `apg`, which makes most of these.
        name = "norm_threshold"
        if self.rms:
            name = "norm_rms"
        check_interval(name, self.threshold, 0, open_lo=True)

    def __call__(
        self,
        g: Float[Array, " *shape"],
        base: Float[Array, " *shape"],
        reference: Float[Array, " *shape"],
        carry: PyTree,
    ) -> tuple[Float[Array, " *shape"], PyTree]:
        radius = self.threshold
        if self.rms:
            # A root mean square of r is a Euclidean norm of r times the root of the number of entries.
            radius = radius * g.size**0.5
        return shrink(g, radius), carry


class Project(AbstractDirectionMap):
    r"""Keeps of the part along the plain prediction only a fraction: $g_\perp + \eta g_\parallel$.

    Args:
        eta: fraction $\eta$; 0 removes the part that saturates, 1 changes nothing.

    Raises:
        NonFiniteError: for NaN or infinity.

    Example:
        >>> import genkit as gk
        >>> float(gk.guidance.Project(0.0).eta)
        0.0

    Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
    Models", ICLR 2025, section 4.
    """

    eta: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self) -> None:
        """Refuse NaN."""
        check_finite("eta", self.eta)

    def __call__(
        self,
        g: Float[Array, " *shape"],
        base: Float[Array, " *shape"],
        reference: Float[Array, " *shape"],
        carry: PyTree,
    ) -> tuple[Float[Array, " *shape"], PyTree]:
        # The part along the base is <g, base> / <base, base> times the base; a base of zero has no direction.
        share = ratio(inner(g, base), inner(base, base), 0)
        return g - (1 - self.eta).astype(g.dtype) * share.astype(g.dtype) * base, carry


class ExponentialDamping(AbstractDirectionMap):
    r"""Damps directions that are large beside the reference, $g\, e^{-\alpha \|g\| / \|D_{ref}\|}$.

    Args:
        alpha: $\alpha$, non-negative.

    Raises:
        ValueError: if it is negative.

    Example:
        >>> import genkit as gk
        >>> base = gk.guidance.Slot("uncond", cond="null")
        >>> guidance = gk.guidance.Direction(base, gk.guidance.ExponentialDamping(8.0), 10.0)

    Source: the rule of MAMBO-G, reconstructed from its published implementation; here on predictions of the data.
    """

    alpha: Float[Array, ""] = eqx.field(converter=as_number)

    def __check_init__(self) -> None:
        """Refuse negative damping."""
        check_interval("alpha", self.alpha, 0)

    def __call__(
        self,
        g: Float[Array, " *shape"],
        base: Float[Array, " *shape"],
        reference: Float[Array, " *shape"],
        carry: PyTree,
    ) -> tuple[Float[Array, " *shape"], PyTree]:
        size = ratio(norm(g), norm(reference), jnp.inf)
        # At alpha = 0 nothing is damped, and 0 times infinity would be NaN: beside a reference of zero the largest
        # number stands for infinity.
        size = jnp.minimum(size, jnp.finfo(size.dtype).max)
        return g * jnp.exp(-self.alpha * size).astype(g.dtype), carry


def _as_maps(maps: AbstractDirectionMap | Sequence[AbstractDirectionMap]) -> tuple[AbstractDirectionMap, ...]:
    if isinstance(maps, AbstractDirectionMap):
        return (maps,)
    return tuple(maps)


class Direction(Guidance):
    r"""Guidance along a changed direction, $D = D_{cond} + (w - 1)\, f(D_{cond} - D_{ref})$.

    The base is always the plain prediction, so that scale 1 is off whatever the maps do. Maps with a memory write it
    once per step; steps at scale 1 and corrector rows leave it.

    Args:
        reference: the evaluation to be guided away from: no condition, another condition, another model.
        maps: the maps that make up $f$, applied from left to right; one or a tuple.
        scale: guidance scale $w$: a number, one per step, or a weight.

    Example:
        >>> import genkit as gk
        >>> g = gk.guidance
        >>> guidance = g.Direction(g.Slot("worse", cond=7), (g.ClipNorm(2.0), g.Project(0.0)), 4.0)
    """

    reference: Slot
    maps: tuple[AbstractDirectionMap, ...] = eqx.field(converter=_as_maps)
    scale: AbstractWeight = eqx.field(converter=as_weight)

    def slots(self) -> tuple[Slot, ...]:
        return Slot("cond"), self.reference

    def init(self, x: Float[Array, " *shape"]) -> PyTree[Array]:
        return tuple(each.init(x) for each in self.maps)

    def needs(self, carry: PyTree, ctx: Context) -> Needs:
        return {"cond": True, self.reference.name: self.scale(ctx) != 1}

    def combine(self, preds: Mapping[str, Prediction], ctx: Context, carry: PyTree) -> Combined:
        base = preds["cond"].x0
        present = preds[self.reference.name].present
        # Without a reference there is no direction. The plain prediction stands for it: a direction of zero, which is
        # not used and whose gradient is finite.
        reference = jnp.where(present, preds[self.reference.name].x0, base)
        g = base - reference
        carries = []
        for each, own in zip(self.maps, carry, strict=True):
            g, new = each(g, base, reference, own)
            # Nothing was seen in a step at scale 1: memories stay as they were.
            carries.append(select(present, new, own))
        step = (self.scale(ctx) - 1).astype(base.dtype) * g
        return base + jnp.where(present, step, 0), tuple(carries), {}


def apg(
    scale: Scale,
    eta: Float[ArrayLike, ""] | float = 0.0,
    norm_threshold: Float[ArrayLike, ""] | float | None = None,
    norm_rms: Float[ArrayLike, ""] | float | None = None,
    momentum: Float[ArrayLike, ""] | float = 0.0,
) -> Direction:
    r"""Adaptive projected guidance: classifier-free guidance without the part that saturates.

    With $g = D_{cond} - D_{uncond}$, in data space: $m \leftarrow g + \beta m$; $g \leftarrow m \min(1, r / \|m\|)$;
    $D = D_{cond} + (w - 1) (g_\perp + \eta\, g_\parallel)$, parallel and orthogonal with respect to $D_{cond}$.

    Args:
        scale: guidance scale $w$: 1 is off; a number, one per step, or a weight.
        eta: fraction $\eta$ of the parallel part that is kept; 1, without threshold and momentum, is `cfg`.
        norm_threshold: largest Euclidean norm $r$ of the direction of one example; `None` for none. It grows with the
            square root of the number of entries.
        norm_rms: the same as a root mean square, which does not; at most one of the two.
        momentum: $\beta$ in (-1, 1); the authors recommend -0.75 to -0.25.

    Returns:
        A guidance with two evaluations per prediction. Momentum is written once per step; correctors read it.

    Raises:
        ValueError: if both thresholds are given, or something is out of range.
        NonFiniteError: for NaN.

    Example:
        >>> import genkit as gk
        >>> guidance = gk.guidance.apg(6.0, norm_rms=0.06, momentum=-0.5)

    Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
    Models", ICLR 2025, algorithm 1.
    """
    check(norm_threshold is None or norm_rms is None, "norm_rms", "None where `norm_threshold` is given", norm_rms)
    # The order of algorithm 1: accumulate, clip, project.
    maps: list[AbstractDirectionMap] = [Momentum(momentum)]
    if norm_threshold is not None:
        maps.append(ClipNorm(norm_threshold))
    if norm_rms is not None:
        maps.append(ClipNorm(norm_rms, rms=True))
    maps.append(Project(eta))
    return Direction(Slot("uncond", cond="null"), maps, scale)
