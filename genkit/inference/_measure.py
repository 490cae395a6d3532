"""Measures: things one can draw from and weigh, exactly or through an unbiased estimate of a density."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check_key, describe


class Measure(eqx.Module):
    r"""Something that can be sampled and weighed, for ONE example.

    The contract allows densities that are only estimated: with $w$ standing for the returned `log_density`,

    $$E[e^{-w} \mid \text{value}] = 1 / p(\text{value}) \quad\text{from }\texttt{sample}, \qquad
      E[e^{w}] = p(\text{value}) \quad\text{from }\texttt{log\_density}.$$

    Measures with an exact density satisfy both trivially and accept `key=None`.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> import genkit as gk
        >>> measure = gk.inference.as_measure(dist.Normal(0.0, 1.0))
        >>> value, log_density = measure.sample(key=jax.random.key(0))
        >>> bool(log_density == measure.log_density(value))
        True

    Source: Lew et al., "Probabilistic Programming with Stochastic Probabilities", PLDI 2023, definition 3.1.
    """

    @abc.abstractmethod
    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        """Draw a value together with its (possibly estimated) log-density.

        Args:
            key: typed PRNG key.

        Returns:
            The value, and a scalar `w` with `E[exp(-w) | value] = 1 / p(value)`.
        """

    @abc.abstractmethod
    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The (possibly estimated) log-density of `value`.

        Args:
            value: a value of the same structure as those `sample` returns.
            key: typed PRNG key; may be `None` where the density is exact.

        Returns:
            A scalar `w` with `E[exp(w)] = p(value)`.
        """


class DistributionMeasure(Measure):
    """A numpyro distribution as a `Measure`; its batch dimensions count as event dimensions.

    Args:
        distribution: a numpyro distribution; an array of independent ones is one joint distribution.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> pair = gk.inference.DistributionMeasure(dist.Normal(jnp.zeros(2), 1.0))
        >>> round(float(pair.log_density(jnp.zeros(2))), 4)
        -1.8379
    """

    distribution: dist.Distribution

    def sample(self, *, key: Key[Array, ""]) -> tuple[PyTree, Float[Array, ""]]:
        check_key(key)
        value = self.distribution.sample(key)
        return value, self.log_density(value)

    def log_density(self, value: PyTree, *, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        del key
        return jnp.sum(self.distribution.log_prob(value))


def as_measure(thing: object) -> Measure:
    """A `Measure` as it is; a numpyro distribution wrapped into one.

    Args:
        thing: a `Measure` or a `numpyro.distributions.Distribution`.

    Returns:
        A `Measure`.

    Raises:
        TypeError: if `thing` is neither.

    Example:
        >>> import numpyro.distributions as dist
        >>> import genkit as gk
        >>> type(gk.inference.as_measure(dist.Normal(0.0, 1.0))).__name__
        'DistributionMeasure'
    """
    if isinstance(thing, Measure):
        return thing
    if isinstance(thing, dist.Distribution):
        return DistributionMeasure(thing)
    hint = ""
    if callable(thing):
        hint = " A model or guide becomes one with `gk.vi.program(fn)(*args)`."
    raise TypeError(f"`measure` must be a genkit Measure or a numpyro distribution; got {describe(thing)}.{hint}")
