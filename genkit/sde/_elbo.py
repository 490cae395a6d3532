"""Evidence bounds of a guide."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Key

from genkit._core._checks import NonFiniteError, check_count, check_key, is_concrete
from genkit.sde._grid import Grid, Noises, make_grid
from genkit.sde._guide import AbstractGuide, Plan
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed
from genkit.sde._simulate import Paths, check_parts, explain_blow_up, make_run, prepare, simulate_run


def log_weights(
    sde: FractionalSDE,
    guide: AbstractGuide,
    observed: Observed,
    *,
    num_particles: int = 1,
    max_step: float | None = None,
    steps_per_interval: int | None = None,
    martingale: bool = True,
    key: Key[Array, ""],
) -> Float[Array, " n"]:
    """Log-weights of independent draws of a guide: each is an unbiased estimate of the evidence, on the log scale.

    Args:
        sde: the model.
        guide: the distribution to draw from.
        observed: the observations; their times are step boundaries, masked ones included.
        num_particles: number of draws.
        max_step: longest step; `None` takes one step per observation.
        steps_per_interval: equal steps in each interval instead (works with traced times).
        martingale: keep the zero-mean martingale of the path's log-density, which cancels the noise of the likelihood
            (no variance left at the exact posterior). Otherwise the divergence in closed form is subtracted; the
            result then has the same mean but is not a weight.
        key: typed PRNG key.

    Returns:
        The log-weights, shape (num_particles,).

    Raises:
        ValueError: for times, steps and counts out of range, a guide made for others, rows that do not fit the
            likelihood.
        NonFiniteError: if a path blows up, or the likelihood is undefined (outside jit), naming step and state.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.brownian(), hurst=0.5, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.3, 0.1]), gs.GaussianNoise(0.1))
        >>> guide = gs.LinearGuide(model, observed)
        >>> gs.log_weights(model, guide, observed, num_particles=3, key=jax.random.key(0)).shape
        (3,)
    """
    check_key(key)
    check_parts(sde, guide, observed)
    check_count("num_particles", num_particles)
    grid = make_grid(sde, observed.ts, max_step, steps_per_interval, "observed.ts")
    keys = jax.vmap(lambda i: jr.fold_in(key, i))(jnp.arange(num_particles))
    rows = tuple(range(len(grid.slots)))
    return prepare_weights(sde, guide, observed, grid, rows, keys, martingale=martingale)[0]


def prepare_weights(
    sde: FractionalSDE,
    guide: AbstractGuide,
    observed: Observed,
    grid: Grid,
    rows: tuple[int, ...],
    keys: Array,
    *,
    martingale: bool = True,
) -> tuple[Array, Paths]:
    """Log-weights and paths for given keys, on a grid whose requested times `rows` are the observations'."""
    noises, plan = prepare(sde, guide, grid)
    plan = plan if len(rows) == len(grid.slots) else None  # prepared for other boundaries
    values, paths = _weigh(sde, guide, observed, grid, noises, plan, rows, keys=keys, martingale=martingale)
    if is_concrete(values) and not bool(jnp.isfinite(values).all() & jnp.isfinite(paths.x).all()):
        # A path may be impossible (-inf), but not undefined.
        broken = jnp.isnan(values) | jnp.isposinf(values) | ~jnp.isfinite(paths.x).all(axis=(1, 2))
        if bool(broken.any()):
            bad = int(jnp.argmax(broken))
            seen = tuple(grid.slots[i] for i in rows)
            first = jax.tree.map(lambda x: x[bad], paths)
            explain_blow_up(sde, grid, noises, guide, plan, seen, x0=None, key=jr.clone(keys)[bad], paths=first)
            _explain_likelihood(observed, first.x[np.asarray(rows)])
    return values, paths


def _explain_likelihood(observed: Observed, x: Array) -> None:
    """Raise with the first observation whose density is undefined at these states, if there is one."""
    rows = np.asarray(observed.log_likelihoods(x))
    bad = np.isnan(rows) | np.isposinf(rows)
    if bad.any():
        i = int(np.argmax(bad))
        raise NonFiniteError(
            f"`likelihood` must have a log-density below infinity (-inf included); got {rows[i]} at observation {i} "
            f"(t = {float(observed.ts[i]):.6g}, y = {np.asarray(observed.y[i])}) for the state {np.asarray(x[i])} of a "
            "finite path. Check its parameters there."
        )


@eqx.filter_jit
def _weigh(
    sde: FractionalSDE,
    guide: AbstractGuide,
    observed: Observed,
    grid: Grid,
    noises: Noises,
    plan: Plan | None,
    rows: tuple[int, ...],
    *,
    keys: Array,
    martingale: bool,
) -> tuple[Array, Paths]:
    run = make_run(sde, grid, noises)
    seen = tuple(grid.slots[i] for i in rows)
    plan = guide.plan(grid, noises, seen) if plan is None else plan

    def one(key: Array) -> tuple[Array, Paths]:
        x, weight, kl = simulate_run(run, guide, plan, None, key)
        return observed.log_likelihood(x[np.asarray(rows)]) + (weight if martingale else -kl), Paths((), x, weight, kl)

    return jax.vmap(one)(keys)


def elbo(
    sde: FractionalSDE,
    guide: AbstractGuide,
    observed: Observed,
    *,
    num_particles: int = 1,
    max_step: float | None = None,
    steps_per_interval: int | None = None,
    martingale: bool = True,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    r"""Evidence lower bound $E_q[\log p(y\mid x)+\log p(\text{path})-\log q(\text{path})]\le\log p(y)$, estimated.

    It covers the initial state and the noise's history, both with factors of their own in the guide. Differentiable
    in the model (the Hurst index included) and the guide.

    Args:
        sde: the model.
        guide: the variational distribution, `LinearGuide` or `NeuralGuide`.
        observed: the observations; their times are step boundaries, masked ones included.
        num_particles: draws averaged.
        max_step: longest step; `None` takes one step per observation.
        steps_per_interval: equal steps in each interval instead (works with traced times).
        martingale: see `log_weights`.
        key: typed PRNG key.

    Returns:
        The estimate, a scalar.

    Raises:
        ValueError: for times, steps and counts out of range, a guide made for others, rows that do not fit the
            likelihood.
        NonFiniteError: if a path blows up, or the likelihood is undefined (outside jit), naming step and state.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.brownian(), hurst=0.5, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.3, 0.1]), gs.GaussianNoise(0.1))
        >>> guide = gs.LinearGuide(model, observed)
        >>> gs.elbo(model, guide, observed, key=jax.random.key(0)).shape
        ()

    Source: Li et al., "Scalable gradients for stochastic differential equations", AISTATS 2020, equation 10; Daems et
    al., ICLR 2024, proposition 4. Discrete time and Gaussian transitions were derived for this library.
    """
    kwargs: dict[str, Any] = {"num_particles": num_particles, "max_step": max_step, "martingale": martingale}
    return jnp.mean(log_weights(sde, guide, observed, steps_per_interval=steps_per_interval, key=key, **kwargs))


def iwelbo(
    sde: FractionalSDE,
    guide: AbstractGuide,
    observed: Observed,
    *,
    num_particles: int = 1,
    max_step: float | None = None,
    steps_per_interval: int | None = None,
    key: Key[Array, ""],
) -> Float[Array, ""]:
    r"""Importance-weighted bound $\log\frac1n\sum_i w_i$ over whole paths, tighter than `elbo` and consistent in n.

    Args:
        sde: the model.
        guide: the variational distribution.
        observed: the observations.
        num_particles: paths n in the average.
        max_step: longest step; `None` takes one step per observation.
        steps_per_interval: equal steps in each interval instead (works with traced times).
        key: typed PRNG key.

    Returns:
        The estimate, a scalar.

    Raises:
        ValueError: for times, steps and counts out of range, a guide made for others, rows that do not fit the
            likelihood.
        NonFiniteError: if a path blows up, or the likelihood is undefined (outside jit), naming step and state.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(gs.OrnsteinUhlenbeck(1.0), gs.Constant(0.5), gn.brownian(), hurst=0.5, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.3, 0.1]), gs.GaussianNoise(0.1))
        >>> guide = gs.LinearGuide(model, observed)
        >>> gs.iwelbo(model, guide, observed, num_particles=3, key=jax.random.key(0)).shape
        ()

    Source: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016, equation 8.
    """
    kwargs: dict[str, Any] = {"num_particles": num_particles, "max_step": max_step}
    values = log_weights(sde, guide, observed, steps_per_interval=steps_per_interval, key=key, **kwargs)
    return logsumexp(values) - jnp.log(num_particles)
