"""The adaptive probability flow as a sampler."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Inexact, Int, Key, PyTree

from genkit._core._checks import check_count, check_positive, is_concrete
from genkit._core._fields import as_number
from genkit.diffusion._flow import angle_chart, check_ends, check_plain, solve, velocity
from genkit.sampling import AbstractSampler, Draws, start


# Draws that are solved together. More would use an accelerator better, fewer waste less on padding and waiting.
_BLOCK = 16


class ProbabilityFlowSampler(AbstractSampler):
    """Draws by solving the probability flow to a tolerance, each with steps of its own; see `probability_flow`."""

    sigma_min: Float[Array, ""]
    sigma_max: Float[Array, ""]
    rtol: Float[Array, ""]
    atol: Float[Array, ""]
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        sigma_min: Float[ArrayLike, ""] | float,
        sigma_max: Float[ArrayLike, ""] | float,
        rtol: Float[ArrayLike, ""] | float,
        atol: Float[ArrayLike, ""] | float,
        max_steps: int,
    ):
        check_ends(sigma_min, sigma_max)
        check_positive("rtol", rtol)
        check_positive("atol", atol)
        check_count("max_steps", max_steps)
        self.sigma_min = as_number(sigma_min)
        self.sigma_max = as_number(sigma_max)
        self.rtol = as_number(rtol)
        self.atol = as_number(atol)
        self.max_steps = max_steps

    @property
    def levels(self) -> Float[np.ndarray, " 2"] | None:
        if not (is_concrete(self.sigma_min) and is_concrete(self.sigma_max)):
            return None
        return np.asarray((self.sigma_min, self.sigma_max), np.float64)

    def draw(
        self,
        model: Callable,
        keys: Key[Array, " n"],
        *,
        cond: PyTree,
        x_init: Inexact[Array, " n *shape"] | None,
        shape: tuple[int, ...],
    ) -> Draws:
        check_plain(model)
        x_init, _ = start(keys, self.sigma_max, x_init, shape)
        chart = angle_chart(model, self.sigma_min, self.sigma_max, None, x_init.dtype)
        ends = (chart.angle(chart.sigma_max), chart.angle(chart.sigma_min))

        def one(x: Array, cond: PyTree) -> tuple[Array, Array, Array]:
            plain = velocity(model, chart, cond)

            def field(theta: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
                # Nothing is integrated beside the state.
                return plain(theta, state[0]), jnp.zeros(())

            z = (x / chart.scale(chart.sigma_max), jnp.zeros(()))
            found = solve(field, z, ends, rtol=self.rtol, atol=self.atol, max_steps=self.max_steps)
            return jnp.where(found.ok, found.z * chart.scale(chart.sigma_min), jnp.nan), found.nfe, found.ok

        value, nfe, ok = _in_blocks(one, (x_init, cond), len(keys))
        return Draws(value, _executed(nfe, len(keys)), nfe.ravel()[: len(keys)], {"ok": ok})


def _in_blocks(
    solve_one: Callable[[Array, PyTree], tuple[Array, Array, Array]], starts: tuple[Array, PyTree], count: int
) -> tuple[Float[Array, " n *shape"], Int[Array, "blocks block"], Bool[Array, " n"]]:
    """Solve draws in blocks of one fixed size, so that none depends on how many there are.

    Accepting or rejecting a step amplifies the last digit of a prediction to the size of the tolerance, and the last
    digit depends on the number of rows that are evaluated together. In blocks every batch runs the same program.

    Args:
        solve_one: from state and condition to the result, its evaluations, and true if the solver got to the end.
        starts: states and conditions, with a leading axis `n`.
        count: number `n` of draws.

    Returns:
        Results and success of each draw, and the evaluations of each member of each block, padding included.
    """
    blocks = -(-count // _BLOCK)
    # Padding repeats draws, so that it never takes more steps than they do.
    rows = jnp.arange(blocks * _BLOCK) % count
    padded = jax.tree.map(lambda leaf: leaf[rows].reshape(blocks, _BLOCK, *leaf.shape[1:]), starts)
    value, nfe, ok = jax.lax.map(lambda block: jax.vmap(solve_one)(*block), padded)
    return value.reshape(-1, *value.shape[2:])[:count], nfe, ok.reshape(-1)[:count]


def _executed(nfe: Int[Array, "blocks block"], count: int) -> Int[Array, " n"]:
    """Rows evaluated for each draw; those of the padding are shared by the draws of the last block."""
    # A block runs until its slowest member is done.
    rows = jnp.broadcast_to(nfe.max(1, keepdims=True), nfe.shape).ravel()
    padding = rows.size - count
    members = _BLOCK - padding
    extra = jnp.full(members, padding * rows[-1] // members).at[0].add(padding * rows[-1] % members)
    return rows[:count].at[count - members :].add(extra)


def probability_flow(
    sigma_min: Float[ArrayLike, ""] | float,
    sigma_max: Float[ArrayLike, ""] | float,
    rtol: Float[ArrayLike, ""] | float = 1e-5,
    atol: Float[ArrayLike, ""] | float = 1e-5,
    max_steps: int = 1024,
) -> ProbabilityFlowSampler:
    r"""The probability flow solved adaptively by a fifth-order Runge-Kutta pair, in the angle $\arctan\sigma$.

    Args:
        sigma_min: noise level at which the draws end, positive: they are data with that much noise.
        sigma_max: noise level at which they start.
        rtol: relative tolerance.
        atol: absolute tolerance, for states scaled to unit variance.
        max_steps: steps after which the solver gives up on a draw.

    Returns:
        A sampler for `genkit.sample`; `Draws.info["ok"]` says which draws got to the end.

    Raises:
        ValueError: for noise levels out of order or tolerances that are not positive.

    Example:
        >>> import jax
        >>> import genkit as gk
        >>> denoiser = gk.diffusion.GaussianDenoiser(jax.numpy.zeros(2), jax.numpy.eye(2))
        >>> gk.sample(gk.diffusion.probability_flow(0.01, 50.0), denoiser, 3, key=jax.random.key(0)).value.shape
        (3, 2)

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
    equation 13.
    """
    return ProbabilityFlowSampler(sigma_min, sigma_max, rtol, atol, max_steps)
