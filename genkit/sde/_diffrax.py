"""The lifted model as diffrax terms."""

from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from genkit._core._checks import check, check_key, is_concrete
from genkit.sde._grid import make_grid, make_table
from genkit.sde._model import FractionalSDE
from genkit.sde._step import make_driver


def as_terms(sde: FractionalSDE, *, tolerance: float | None = None, key: Key[Array, ""]) -> tuple[Any, tuple]:
    """The lifted model as `diffrax` terms on [0, horizon], driven by a virtual Brownian tree.

    The state is `(x, v)`, shapes (d,) and (d, K). Use a Stratonovich solver (`diffrax.Heun` or `EulerHeun`; not
    `ReversibleHeun`, which is hardly stable) with steps well below `horizon / lift.hi`: diffrax steps the fast
    processes explicitly. `simulate` has neither limit; this is for diffrax's other solvers and for comparison.

    Args:
        sde: the model, with a constant Hurst index.
        tolerance: of the Brownian tree; default a 10,000th of the horizon.
        key: typed PRNG key, for the history, the initial state and the path.

    Returns:
        The `diffrax.MultiTerm` and an initial state drawn from the model.

    Raises:
        ValueError: if the Hurst index varies.

    Example:
        >>> import diffrax, jax, genkit.noise as gn, genkit.sde as gs
        >>> drift, lift = gs.OrnsteinUhlenbeck(1.0), gn.ma_fbm(2, 0.1, 10.0)
        >>> model = gs.FractionalSDE(drift, gs.Constant(0.5), lift, hurst=0.7, horizon=1.0)
        >>> terms, start = gs.as_terms(model, key=jax.random.key(0))
        >>> with jax.debug_key_reuse(False):  # diffrax's Brownian tree looks like re-use
        ...     ys = diffrax.diffeqsolve(terms, diffrax.Heun(), 0.0, 1.0, 0.02, start).ys
        >>> ys[0].shape
        (1, 1)
    """
    import diffrax

    check_key(key)
    check(not sde.varying, "hurst", "constant in time for as_terms", "a function of time")
    key_past, key_x0, key_path = jr.split(key, 3)
    grid = make_grid(sde, sde.horizon[None])
    driver = make_driver(sde, grid, make_table(sde, grid))
    d, k = driver.gain.shape
    rates = jnp.asarray(sde.lift.gamma, sde.dtype) / sde.horizon
    # W runs on the unit clock: dW = dB / sqrt(horizon)
    clock = 1 / jnp.sqrt(sde.horizon)

    def drift(t: Any, y: tuple, args: Any) -> tuple:
        x, v = y
        pull = -rates * v
        return sde.drift(t, x) + sde.diffusion(t, x) * jnp.sum(pull, axis=-1), pull

    def diffusion(t: Any, y: tuple, args: Any) -> tuple:
        x, _ = y
        total = jnp.sum(driver.gain, axis=-1) + driver.direct
        loads = jnp.eye(d, dtype=sde.dtype)[:, None, :] * driver.gain[:, :, None]
        return jnp.diag(jnp.broadcast_to(sde.diffusion(t, x), (d,)) * total * clock), loads * clock

    class _Twice(diffrax.AbstractPath):
        """One Brownian path, handed to both parts of the state."""

        path: Any

        @property
        def t0(self) -> Any:
            return self.path.t0

        @property
        def t1(self) -> Any:
            return self.path.t1

        def evaluate(self, t0: Any, t1: Any = None, left: bool = True, **kwargs: Any) -> tuple:
            dw = self.path.evaluate(t0, t1, left, **kwargs)
            return dw, dw

    fine = float(sde.horizon) * 1e-4 if is_concrete(sde.horizon) else sde.horizon * 1e-4
    tree = diffrax.VirtualBrownianTree(0.0, sde.horizon, tolerance or fine, (d,), key_path)
    past = jr.normal(key_past, (d, driver.start.shape[-1]), sde.dtype)
    x0 = jnp.ravel(sde.x0.sample(key_x0)).astype(sde.dtype) if sde.has_law else sde.start()[0]
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, _Twice(tree)))
    return terms, (jnp.broadcast_to(x0, (d,)), jnp.einsum("dmr,dr->dm", driver.start, past).reshape(d, k))
