"""Embeddings of the inputs beside the state: the noise level (or time) and the condition."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key

from genkit._core._checks import check, check_count, describe


# Periods of the time features: from the whole range of log(sigma)/4 or of t in [0, 1] down to a sixteenth of a unit.
_LOWEST_FREQUENCY = 0.125
_HIGHEST_FREQUENCY = 16.0


class ConditionEmbedding(eqx.Module):
    """The noise level (or time) and the condition as one vector, which modulates every block of a network.

    The condition is a label, or a vector; `None`, the label -1 and a vector with a NaN all mean "no condition" and
    share one learned embedding.

    Args:
        size: length of the embedding, even.
        num_labels: number of classes, for labels as conditions.
        cond_size: length of the condition, for vectors as conditions (1 also takes scalars).
        key: typed PRNG key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> embed = gk.nn.ConditionEmbedding(8, num_labels=3, key=jax.random.key(0))
        >>> bool((embed(jnp.array(0.5), None) == embed(jnp.array(0.5), jnp.array(-1))).all())
        True
    """

    time_in: eqx.nn.Linear
    time_out: eqx.nn.Linear
    null: Float[Array, " size"] | None
    table: Float[Array, " num_labels size"] | None
    project: eqx.nn.Linear | None
    num_labels: int | None = eqx.field(static=True)
    cond_size: int | None = eqx.field(static=True)

    def __init__(self, size: int, *, num_labels: int | None = None, cond_size: int | None = None, key: Key[Array, ""]):
        check_count("size", size, 2)
        check(size % 2 == 0, "size", "even", size)
        check(num_labels is None or cond_size is None, "num_labels` and `cond_size", "given one at most", "both")
        for name, count in (("num_labels", num_labels), ("cond_size", cond_size)):
            if count is not None:
                check_count(name, count)
        key_in, key_out, key_null, key_cond = jr.split(key, 4)
        self.time_in = eqx.nn.Linear(size, size, key=key_in)
        self.time_out = eqx.nn.Linear(size, size, key=key_out)
        self.null = None
        self.table = None
        self.project = None
        if num_labels is not None or cond_size is not None:
            self.null = jr.normal(key_null, (size,))
        if num_labels is not None:
            self.table = jr.normal(key_cond, (num_labels, size))
        if cond_size is not None:
            self.project = eqx.nn.Linear(cond_size, size, key=key_cond)
        self.num_labels = num_labels
        self.cond_size = cond_size

    def __call__(self, t: Float[Array, ""], cond: ArrayLike | None = None) -> Float[Array, " size"]:
        """Embed a time and a condition.

        Args:
            t: time, or a function of the noise level of the order of one.
            cond: condition, or `None`.

        Returns:
            The embedding.

        Raises:
            ValueError: for a condition that the embedding does not take.
        """
        frequencies = np.geomspace(_LOWEST_FREQUENCY, _HIGHEST_FREQUENCY, self.time_in.weight.shape[1] // 2)
        phase = 2 * np.pi * t * jnp.asarray(frequencies, t.dtype)
        features = jnp.concatenate([jnp.cos(phase), jnp.sin(phase)])
        embedding = self.time_out(jax.nn.silu(self.time_in(features)))
        if self.null is None:
            check(cond is None, "cond", "None, because this network is unconditional", cond)
            return jax.nn.silu(embedding)
        return jax.nn.silu(embedding + self._embed_condition(cond))

    def _embed_condition(self, cond: ArrayLike | None) -> Float[Array, " size"]:
        """The embedding of a condition, or of its absence."""
        assert self.null is not None
        if cond is None:
            return self.null
        cond = jnp.asarray(cond)
        if self.table is not None:
            label = cond.shape == () and jnp.issubdtype(cond.dtype, jnp.signedinteger)
            check(label, "cond", "one integer label", describe(cond))
            # The index is kept in range: a negative one would count from the end, and its gradient would too.
            return jnp.where(cond < 0, self.null, self.table[jnp.maximum(cond, 0)])
        fits = cond.size == self.cond_size and jnp.issubdtype(cond.dtype, jnp.floating)
        check(fits, "cond", f"a floating vector of length {self.cond_size}", describe(cond))
        assert self.project is not None
        absent = jnp.isnan(cond).any()
        # NaN is replaced before the product: the gradient of a masked NaN is NaN.
        return jnp.where(absent, self.null, self.project(jnp.where(absent, 0, cond).ravel()))
