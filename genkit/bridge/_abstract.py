"""What every bridge can do, and what one with exact densities can do besides."""

import abc

import equinox as eqx
from jaxtyping import Array, ArrayLike, Float, Key, Real, Shaped


class AbstractBridge(eqx.Module):
    """A diffusion dX = drift(t, X) dt + sqrt(epsilon) dB on [0, 1] that carries one distribution to another.

    Its variance `epsilon` at t = 1 is an attribute.
    """

    epsilon: eqx.AbstractVar[Float[Array, ""]]

    def __call__(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The drift: a bridge can be called like the field it is."""
        return self.drift(t, x)

    @property
    def start_samples(self) -> Float[Array, " n d"] | None:
        """Samples of the distribution at t = 0; None where the bridge does not know it."""
        return None

    @abc.abstractmethod
    def drift(self, t: Real[ArrayLike, " ..."], x: Shaped[ArrayLike, " *batch d"]) -> Float[Array, " ..."]:
        """The drift at time `t` and state `x`; leading axes broadcast."""

    @abc.abstractmethod
    def sample(
        self, x0: Shaped[ArrayLike, " *batch d"], ts: Real[ArrayLike, " n"], *, key: Key[Array, ""]
    ) -> Float[Array, " *batch n d"]:
        """Paths on the grid `ts` that start in `x0`."""


class AbstractExactBridge(AbstractBridge):
    """A bridge whose paths have a density that is known."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """The dimension of the space."""

    @abc.abstractmethod
    def path_log_prob(self, ts: Real[ArrayLike, " n"], xs: Shaped[ArrayLike, " *batch n d"]) -> Float[Array, " *batch"]:
        """Log p(xs[1:] at ts[1:] | xs[0] at ts[0])."""
