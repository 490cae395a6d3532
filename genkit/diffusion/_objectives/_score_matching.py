"""Score matching without noise."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check_choice, check_count
from genkit.diffusion._objectives._batch import check_output, split_batch
from genkit.training import Objective


class ImplicitScoreMatching(Objective):
    r"""Implicit score matching: $E[\tfrac12 |s(x)|^2 + \nabla\cdot s(x)]$, without noise and without a density.

    The model is a score `x -> s` of one example; the minimizer over all functions is $\nabla\log p$, where the value is
    $-\tfrac12 E|\nabla\log p|^2$. The divergence is exact, one derivative for each coordinate.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> batch = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> value, _ = gk.diffusion.ImplicitScoreMatching()(jax.tree_util.Partial(lambda x: -x), batch, key=jax.random.key(1))
        >>> round(float(value), 1)
        -0.5

    Source: Hyvarinen, "Estimation of Non-Normalized Statistical Models by Score Matching", JMLR 2005, theorem 1.
    """  # noqa: E501

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: score `x -> s` of one example.
            batch: examples `(b, *shape)`.
            key: typed PRNG key, unused.

        Returns:
            The loss, and `{"divergence": mean divergence}`.
        """
        del key
        x, _ = split_batch(batch)

        def one(x: Array) -> tuple[Array, Array]:
            # Linearized once: value and all derivatives share one pass through the network.
            score, push = jax.linearize(model, x)
            check_output(score[None], x[None])
            units = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
            return 0.5 * jnp.sum(score**2), jnp.sum(jax.vmap(push)(units) * units)

        half, divergence = jax.vmap(one)(x)
        return jnp.mean(half + divergence), {"divergence": jnp.mean(divergence)}


class SlicedScoreMatching(Objective):
    r"""Sliced score matching: the divergence of `ImplicitScoreMatching` estimated along random directions.

    $$E_x E_v\left[\tfrac12 |s|^2 + v^\top \nabla s\, v\right] \ \text{(reduced variance)}\quad\text{or}\quad
      E_x E_v\left[\tfrac12 (v^\top s)^2 + v^\top \nabla s\, v\right].$$

    Args:
        num_slices: directions per example.
        reduced: take $|s|^2$ itself instead of its slices: less variance, and any distribution of directions will do.
        directions: `"rademacher"` or `"gaussian"`.

    Example:
        >>> import genkit as gk
        >>> gk.diffusion.SlicedScoreMatching(4).num_slices
        4

    Source: Song et al., "Sliced Score Matching: A Scalable Approach to Density and Score Estimation", UAI 2019,
    equations 7 and 8.
    """

    num_slices: int = eqx.field(static=True, default=1)
    reduced: bool = eqx.field(static=True, default=True)
    directions: str = eqx.field(static=True, default="rademacher")

    def __check_init__(self):
        check_count("num_slices", self.num_slices)
        check_choice("directions", self.directions, ("rademacher", "gaussian"))

    def __call__(
        self, model: Callable, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Estimate the loss on a batch.

        Args:
            model: score `x -> s` of one example.
            batch: examples `(b, *shape)`.
            key: typed PRNG key of the directions.

        Returns:
            The loss, and `{"divergence": mean estimate of the divergence}`.
        """
        x, _ = split_batch(batch)
        shape = (len(x), self.num_slices, *x.shape[1:])
        if self.directions == "rademacher":
            slices = jr.rademacher(key, shape, x.dtype)
        else:
            slices = jr.normal(key, shape, x.dtype)

        def one(x: Array, slices: Array) -> tuple[Array, Array]:
            score, push = jax.linearize(model, x)
            check_output(score[None], x[None])
            bend = jax.vmap(lambda v: jnp.sum(v * push(v)))(slices)
            # The square itself has no sampling error; its slices are the published form.
            if self.reduced:
                square = jnp.sum(score**2)
            else:
                square = jnp.mean(jax.vmap(lambda v: jnp.sum(v * score) ** 2)(slices))
            return 0.5 * square, jnp.mean(bend)

        half, divergence = jax.vmap(one)(x, slices)
        return jnp.mean(half + divergence), {"divergence": jnp.mean(divergence)}
