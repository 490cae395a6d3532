"""Couplings of data and noise for flow matching."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from genkit._core._checks import check_interval
from genkit._core._fields import as_number
from genkit.diffusion._objectives._assignment import assignment


class IndependentCoupling(eqx.Module):
    """Leaves data and noise as they were drawn, independent: the same as `coupling=None`, by name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> x0, noise = jnp.zeros((3, 2)), jnp.ones((3, 2))
        >>> pair = gk.diffusion.IndependentCoupling()(x0, noise, None, key=jax.random.key(0))
        >>> bool((pair[1] == noise).all())
        True
    """

    def __call__(
        self, x0: Float[Array, " b *shape"], noise: Float[Array, " b *shape"], cond: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, " b *shape"], Float[Array, " b *shape"], PyTree]:
        """The same batch."""
        del key
        return x0, noise, cond


class MinibatchOT(eqx.Module):
    r"""Pairs the data of a batch with its noise by the exact optimal transport between the two.

    The noise is permuted to minimize $\sum_i |x_i - \varepsilon_{\pi(i)}|^2$; data and conditions stay together and in
    place. The noise that a condition gets is then no longer normal given the condition, which biases conditional
    models: with a positive `condition_weight` $\beta$ noise keeps the condition it was drawn beside, and the cost is
    $|x_i - \varepsilon_j|^2 + \beta\, [c_i \ne c_j]$ for labels, $\beta\, |c_i - c_j|^2$ for floating conditions. For
    large $\beta$ pairs are made within a class alone.

    Args:
        condition_weight: the weight $\beta$, non-negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> x0, noise = jnp.array([[1.0], [-1.0]]), jnp.array([[-2.0], [3.0]])
        >>> gk.diffusion.MinibatchOT()(x0, noise, None, key=jax.random.key(0))[1].tolist()
        [[3.0], [-2.0]]

    Source: Tong et al., "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport",
    TMLR 2024, section 3.2; Cheng and Schwing, "The Curse of Conditions", 2025 (conditions).
    """

    condition_weight: Float[Array, ""] = eqx.field(converter=as_number, default=0.0)

    def __check_init__(self):
        check_interval("condition_weight", self.condition_weight, 0)

    def __call__(
        self, x0: Float[Array, " b *shape"], noise: Float[Array, " b *shape"], cond: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, " b *shape"], Float[Array, " b *shape"], PyTree]:
        """The batch with its noise permuted."""
        del key
        size = x0.shape[0]
        flat = x0.reshape(size, -1)
        white = noise.reshape(size, -1)
        # |x|^2 + |e|^2 sums to the same for every pairing, so that the product alone decides.
        cost = -2 * flat @ white.T
        for leaf in jax.tree.leaves(cond):
            label = jnp.asarray(leaf).reshape(size, -1)
            apart = label[:, None] - label[None]
            if jnp.issubdtype(label.dtype, jnp.floating):
                distance = jnp.sum(apart**2, -1)
            else:
                distance = jnp.any(apart != 0, -1)
            cost = cost + self.condition_weight.astype(cost.dtype) * distance
        # The permutation has no derivative; the cost is cut off so that none is sought.
        return x0, noise[assignment(jax.lax.stop_gradient(cost))], cond
