"""A bridge as a numpyro distribution over paths on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, Key, Real
from numpyro.distributions import constraints

from genkit._core._checks import fail, is_concrete
from genkit.bridge._abstract import AbstractExactBridge
from genkit.bridge._inputs import check_times


class BridgeDistribution(dist.Distribution):
    """The distribution of a bridge path on a grid, started from `source`; by default of its end points.

    Args:
        bridge: the bridge.
        source: numpyro distribution of the state at time 0, with empty batch shape and event shape (d,).
        ts: strictly increasing times, the first of them 0, shape (n,).
        validate_args: numpyro's switch for checking values against the support.

    Raises:
        ValueError: if source and bridge differ in dimension, or the times do not start at 0.

    Example:
        >>> import jax, jax.numpy as jnp, genkit as gk
        >>> from numpyro.distributions import Normal
        >>> bridge = gk.bridge.gaussian(jnp.zeros(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), 0.5)
        >>> source = Normal(jnp.zeros(2), 1.0).to_event(1)
        >>> paths = gk.bridge.BridgeDistribution(bridge, source, jnp.array([0.0, 0.5, 1.0]))
        >>> paths.log_prob(paths.sample(jax.random.key(0), (4,))).shape
        (4,)
    """

    pytree_data_fields = ("bridge", "source", "ts")

    def __init__(
        self,
        bridge: AbstractExactBridge,
        source: dist.Distribution,
        ts: Real[ArrayLike, " n"],
        *,
        validate_args: bool | None = None,
    ):
        if source.event_shape != (bridge.dim,) or source.batch_shape != ():
            expected = f"a distribution with batch shape () and event shape ({bridge.dim},)"
            got = f"batch shape {source.batch_shape} and event shape {source.event_shape}"
            fail("source", expected, got, "Use `.to_event(1)`.")
        check_times(ts, strict=True)
        if is_concrete(ts) and np.asarray(ts)[0] != 0.0:
            fail("ts", "a grid that starts at 0, where `source` holds", f"{ts}")
        self.bridge = bridge
        self.source = source
        # After the checks, which read known times; a traced grid passes them.
        self.ts = jnp.asarray(ts)
        super().__init__((), (self.ts.shape[0], bridge.dim), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 2)

    def sample(self, key: Key[Array, ""], sample_shape: tuple[int, ...] = ()) -> Float[Array, " ..."]:
        """Draw paths; shape `(*sample_shape, n, d)`."""
        key_source, key_path = jax.random.split(key)
        x0 = self.source.sample(key_source, sample_shape)
        rest = self.bridge.sample(x0, self.ts[1:], key=key_path)
        return jnp.concatenate([x0[..., None, :], rest], -2)

    def log_prob(self, value: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The exact log-density of paths; shape of `value` without its last two axes."""
        return self.source.log_prob(value[..., 0, :]) + self.bridge.path_log_prob(self.ts, value)
