"""Couplings of data and noise for flow matching."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from genkit._core._checks import check, check_finite, check_interval
from genkit._core._fields import as_number


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
        flat, white = x0.reshape(size, -1), noise.reshape(size, -1)
        # |x|^2 + |e|^2 sums to the same for every pairing.
        cost = -2 * flat @ white.T
        for leaf in jax.tree.leaves(cond):
            label = jnp.asarray(leaf).reshape(size, -1)
            apart = label[:, None] - label[None]
            floating = jnp.issubdtype(label.dtype, jnp.floating)
            distance = jnp.sum(apart**2, -1) if floating else jnp.any(apart != 0, -1)
            cost = cost + self.condition_weight.astype(cost.dtype) * distance
        return x0, noise[assignment(jax.lax.stop_gradient(cost))], cond


def assignment(cost: Float[ArrayLike, " n n"]) -> Int[Array, " n"]:
    r"""The permutation that minimizes $\sum_i C_{i \pi(i)}$, exactly, by shortest augmenting paths.

    Args:
        cost: square matrix of finite costs.

    Returns:
        For each row its column `(n,)`.

    Raises:
        ValueError: for a matrix that is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> import genkit as gk
        >>> gk.diffusion.assignment(jnp.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]])).tolist()
        [1, 0, 2]

    Source: Crouse, "On Implementing 2D Rectangular Assignment Algorithms", IEEE TAES 2016, section II.
    """
    cost = as_number(cost)
    check(cost.ndim == 2 and cost.shape[0] == cost.shape[1], "cost", "a square matrix", f"shape {cost.shape}")
    check_finite("cost", cost)
    size = cost.shape[0]
    # Column `size` is a dummy in which the row to be placed waits; rows and columns have dual prices.
    far = jnp.asarray(jnp.inf, cost.dtype)

    def place(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        row_price, column_price, row_of = state
        row_of = row_of.at[size].set(i)

        def unfinished(search: tuple) -> Array:
            return row_of[search[0]] >= 0

        def extend(search: tuple) -> tuple:
            column, shortest, before, done, row_price, column_price = search
            done = done.at[column].set(True)
            row = row_of[column]
            reduced = jnp.append(cost[row] - row_price[row], far) - column_price
            closer = (reduced < shortest) & ~done
            shortest, before = jnp.where(closer, reduced, shortest), jnp.where(closer, column, before)
            open_paths = jnp.where(done, far, shortest).at[size].set(far)
            step = jnp.min(open_paths)
            # Prices move so that the nearest open column becomes tight.
            moved = jnp.where(done, step, 0)
            row_price = row_price.at[jnp.where(done, row_of, size)].add(moved)
            column_price = column_price - moved
            shortest = jnp.where(done, shortest, shortest - step)
            return jnp.argmin(open_paths), shortest, before, done, row_price, column_price

        start = (
            jnp.asarray(size),
            jnp.full(size + 1, far),
            jnp.full(size + 1, size),
            jnp.zeros(size + 1, bool),
            row_price,
            column_price,
        )
        column, _, before, _, row_price, column_price = jax.lax.while_loop(unfinished, extend, start)

        def back(walk: tuple[Array, Array]) -> tuple[Array, Array]:
            column, row_of = walk
            return before[column], row_of.at[column].set(row_of[before[column]])

        _, row_of = jax.lax.while_loop(lambda walk: walk[0] != size, back, (column, row_of))
        return row_price, column_price, row_of

    zero = jnp.zeros(size + 1, cost.dtype)
    _, _, row_of = jax.lax.fori_loop(0, size, place, (zero, zero, jnp.full(size + 1, -1)))
    return jnp.zeros(size, jnp.int32).at[row_of[:size]].set(jnp.arange(size, dtype=jnp.int32))
