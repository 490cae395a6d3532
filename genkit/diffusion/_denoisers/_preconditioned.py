"""A network of any parameterization as a denoiser."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, PyTree

from genkit._core._checks import check, check_choice, check_positive, describe, is_concrete
from genkit._core._fields import FROZEN, as_number
from genkit.diffusion._schedules._base import Schedule
from genkit.diffusion._schedules._convert import PREDICTIONS, convert
from genkit.diffusion._schedules._standard import EDM
from genkit.sampling import Denoiser, as_denoiser


class Preconditioned(Denoiser):
    r"""A network that predicts noise, data, velocity, ... made a denoiser in $x = x_0 + \sigma\varepsilon$.

    With `prediction="F"` the input and the output of the network have unit variance at every noise level,

    $$D = c_{skip} x + c_{out}\, \mathrm{net}(c_{in} x, \tfrac14 \log\sigma, c), \qquad
      c_{in} = (\sigma_d^2 + \sigma^2)^{-1/2},\; c_{skip} = \sigma_d^2 c_{in}^2,\; c_{out} = \sigma\sigma_d c_{in}.$$

    With any other prediction the network works in the coordinates of its own schedule: it is called as
    `net(x_t, t, cond)` with $t$ the time of $\sigma$ and $x_t = \alpha_t x$, and its output is converted exactly. At
    $\sigma = 0$ the denoiser returns `x`.

    Args:
        net: callable `(x, t, cond) -> array` of the shape of `x`, for one example; where it has them, its `shape` and
            `num_labels` become those of the denoiser.
        prediction: what the network predicts, one of `"F"`, `"eps"`, `"v"`, `"x0"`, `"velocity"`, `"score"`; see
            `convert` for their definitions.
        sigma_data: standard deviation of the data, positive; used by `"F"` and by the default weight of
            `DenoisingScoreMatching`. Part of the model, never trained.
        schedule: the coordinates of the network; unused by `"F"`. Part of the model, never trained.

    Raises:
        ValueError: for an unknown prediction, a `sigma_data` that is not positive, a schedule that is none.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> net = lambda x, t, cond: jnp.zeros_like(x)
        >>> denoiser = gk.diffusion.Preconditioned(net, sigma_data=0.5)
        >>> denoiser(jnp.array([2.0]), jnp.array(0.5)).round(5).tolist()
        [1.0]

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, section 5
    and table 1.
    """

    net: Callable
    prediction: str = eqx.field(static=True, default="F")
    sigma_data: Float[Array, ""] = eqx.field(converter=as_number, default=1.0, metadata=FROZEN)
    schedule: Schedule = eqx.field(default_factory=EDM, metadata=FROZEN)

    def __check_init__(self):
        check_choice("prediction", self.prediction, PREDICTIONS)
        check_positive("sigma_data", self.sigma_data)
        check(isinstance(self.schedule, Schedule), "schedule", "a `genkit.Schedule`", describe(self.schedule))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the network knows it."""
        return as_denoiser(self.net).shape

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the network is conditioned on labels."""
        return as_denoiser(self.net).num_labels

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """Least and largest noise level of the schedule's times 0 to 1, all that the network has seen.

        `None` for `"F"`, whose network is given the level itself, and for a traced schedule.
        """
        if self.prediction == "F" or not all(map(is_concrete, jax.tree.leaves(self.schedule))):
            return None
        # Evaluated now, also where the denoiser is a constant of a program that is being traced.
        with jax.ensure_compile_time_eval():
            low, high = np.asarray(_ends(self.schedule)).tolist()
        return low, high

    def __call__(
        self, x: Inexact[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """Estimate the clean example; see `Denoiser`."""
        x = as_number(x)
        sigma = jnp.asarray(sigma, x.dtype)
        clean = sigma == 0
        # At sigma = 0 the logarithm and several quotients are infinite: evaluate elsewhere, and return x.
        level = jnp.where(clean, 1, sigma)
        if self.prediction == "F":
            estimate = self._of_unit_variance(x, level, cond)
        else:
            estimate = self._in_time(x, level, cond)
        return jnp.where(clean, x, estimate)

    def _of_unit_variance(self, x: Array, sigma: Array, cond: PyTree) -> Array:
        """The denoiser of a network whose input and output have unit variance."""
        sigma_data = self.sigma_data.astype(x.dtype)
        norm = jnp.sqrt(sigma_data**2 + sigma**2)
        skip = (sigma_data / norm) ** 2
        out = sigma * sigma_data / norm
        return skip * x + out * self.net(x / norm, jnp.log(sigma) / 4, cond)

    def _in_time(self, x: Array, sigma: Array, cond: PyTree) -> Array:
        """The denoiser of a network that works in the coordinates of its schedule."""
        t = self.schedule.time(sigma)
        # alpha(t) from whichever of the two is well resolved: near the end alpha loses its digits in t, sigma does not.
        # sigma_t then follows from the exact noise level, so that the conversion never sees the rounding of t.
        far = sigma > 1
        alpha = jnp.where(far, self.schedule.sigma(t) / jnp.where(far, sigma, 1), self.schedule.alpha(t))
        x_t = alpha * x
        rates = {}
        if self.prediction == "velocity":
            rates = {"alpha_dot": self.schedule.alpha_dot(t), "sigma_dot": self.schedule.sigma_dot(t)}
        return convert(self.net(x_t, t, cond), self.prediction, "x0", x_t, alpha, alpha * sigma, **rates)


@eqx.filter_jit
def _ends(schedule: Schedule) -> Float[Array, " 2"]:
    """Noise levels of both ends of a schedule, in one compiled call."""
    return schedule.noise_level(jnp.array([0.0, 1.0]))
