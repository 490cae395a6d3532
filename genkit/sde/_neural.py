"""A guide that learns: the exact affine control where there is one, plus networks that start at zero."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from genkit._core._checks import check_count, check_key
from genkit._core._fields import FROZEN
from genkit.sde._filter import Gaussian, flat_state
from genkit.sde._grid import Grid, Noises
from genkit.sde._guide import AbstractGuide, LinearGuide, Plan
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed, gaussian_parts
from genkit.sde._step import Driver, Step


class Encoder(eqx.Module):
    """A context per observation, summing up it and all later ones: a recurrent network run backwards in time.

    Args:
        embed: features of one observation `y[i]`.
        cell: the recurrent cell, fed features, whether observed, and the gap to the next time.
    """

    embed: Callable
    cell: eqx.nn.GRUCell

    def __call__(self, observed: Observed, horizon: Array) -> Float[Array, " n context"]:
        """The contexts, one row per observation time."""
        features = jax.vmap(lambda y: jnp.ravel(self.embed(y)))(observed.filled())
        keep = jnp.asarray(observed.mask, features.dtype)[:, None]
        ts = jnp.asarray(observed.ts, features.dtype)
        gaps = jnp.diff(ts, append=ts[-1:])[:, None] / horizon
        inputs = jnp.concatenate([features * keep, keep, gaps], axis=1)

        def body(state: Array, row: Array) -> tuple[Array, Array]:
            state = self.cell(row, state)
            return state, state

        zero = jnp.zeros(self.cell.hidden_size, features.dtype)
        return jax.lax.scan(body, zero, inputs, reverse=True)[1]


class _NeuralStep(NamedTuple):
    """One step's share of a plan."""

    linear: Gaussian | None
    context: Array  # of the next observation; 0 after the last
    clock: Array  # (3,) time, time to the next observation, whether there is one


class NeuralGuide(AbstractGuide):
    r"""A neural control of every step, on top of the exact control of the linearized model.

    Per coordinate, networks fed $(x, v, t, \text{context})$ return a control $u$ of the Brownian motion and a widening
    $\tau$: in the whitened normals of the step, whose direction of the Brownian increment is $g$,
    $$\varepsilon=\mu+u\,g+S\,[I+(e^{\tau}-1)\hat g\hat g^\top]\,w,\qquad w\sim N(0,I),$$
    with $(\mu,S)$ those of `LinearGuide` (0 and I without). One control per coordinate acts on all of its lifted
    processes alike, so refining the steps keeps the divergence finite. The last layers start at zero: before any
    training the guide is the linear one. History and initial state have learned factors of their own.

    Args:
        sde: the model.
        observed: the observations, also the default for the context.
        width: width of the networks and of the context.
        depth: hidden layers of the control.
        linear: start from `LinearGuide`; `None` does so when the likelihood is normal. The linear part is frozen.
        embed: features of one observation for the context; `None` takes the raw numbers. Trained if it is a module.
        max_step: longest step of the grid the linear part is prepared on.
        steps_per_interval: equal steps per interval instead.
        num_iterations: linearizations of the linear part.
        key: typed PRNG key.

    Raises:
        ValueError: for widths, depths and times out of range.

    Example:
        >>> import jax, jax.numpy as jnp, genkit.noise as gn, genkit.sde as gs
        >>> model = gs.FractionalSDE(lambda t, x: x - x**3, gs.Constant(0.5), gn.ma_fbm(), hurst=0.7, horizon=1.0)
        >>> observed = gs.Observed(jnp.array([0.5, 1.0]), jnp.array([0.3, 0.1]), gs.GaussianNoise(0.1))
        >>> guide = gs.NeuralGuide(model, observed, width=8, key=jax.random.key(0))
        >>> gs.elbo(model, guide, observed, key=jax.random.key(1)).shape
        ()

    Source: Daems et al., ICLR 2024, section 3.3 (one control per Brownian motion); the linear part, the widening and
    the factor of the history were added for this library.
    """

    linear: LinearGuide | None = eqx.field(metadata=FROZEN)
    observed: Observed = eqx.field(metadata=FROZEN)
    horizon: Any = eqx.field(metadata=FROZEN)
    encoder: Encoder
    control: eqx.nn.MLP
    origin: eqx.nn.MLP

    def __init__(
        self,
        sde: FractionalSDE,
        observed: Observed,
        *,
        width: int = 64,
        depth: int = 2,
        linear: bool | None = None,
        embed: Callable | None = None,
        max_step: float | None = None,
        steps_per_interval: int | None = None,
        num_iterations: int = 1,
        key: Key[Array, ""],
    ):
        check_key(key)
        check_count("width", width)
        check_count("depth", depth)
        key_cell, key_control, key_origin = jr.split(key, 3)
        d, r, k = sde.dim, sde.lift.history_rank, sde.lift.num_terms
        normal = gaussian_parts(observed.likelihood, jnp.zeros(d, sde.dtype)) is not None
        steps: dict[str, Any] = {"max_step": max_step, "steps_per_interval": steps_per_interval}
        steps["num_iterations"] = num_iterations
        self.linear = LinearGuide(sde, observed, **steps) if (normal if linear is None else linear) else None
        self.observed, self.horizon = observed, sde.horizon
        embed = _identity if embed is None else embed
        size = eqx.filter_eval_shape(embed, observed.y[0]).size
        self.encoder = Encoder(embed, eqx.nn.GRUCell(size + 2, width, dtype=sde.dtype, key=key_cell))
        inputs = d + d * (k + r if sde.varying else k) + width + 3
        self.control = _zero_last(_mlp(inputs, 2 * d, width, depth, sde.dtype, key_control))
        # Per coordinate, for its r normals of the history and that of its start: a mean and a triangular root.
        self.origin = _zero_last(_mlp(width, d * (r + 1) * (r + 4) // 2, width, 1, sde.dtype, key_origin))

    def condition(self, observed: Observed) -> "NeuralGuide":
        """The same networks on other observations (amortised inference); the linear part is left out.

        Args:
            observed: the observations, rows of the same shape.

        Returns:
            A `NeuralGuide`.
        """
        leaves = lambda guide: (guide.linear, guide.observed)
        return eqx.tree_at(leaves, self, (None, observed), is_leaf=lambda x: x is None)

    def times(self) -> Any:
        """The observation times."""
        return self.observed.ts

    def prepared_for(self, grid: Grid, noises: Noises) -> Plan | None:
        """Nothing: contexts depend on parameters."""
        return None

    def plan(self, grid: Grid, noises: Noises, seen: tuple[int, ...]) -> Plan:
        """Contexts of all steps, beside the linear plan."""
        linear = None
        if self.linear is not None:
            ready = self.linear.prepared_for(grid, noises) if len(seen) == len(grid.slots) else None
            linear = jax.lax.stop_gradient(self.linear.plan(grid, noises, seen) if ready is None else ready)
        dtype = self.control.layers[0].weight.dtype
        horizon = jax.lax.stop_gradient(jnp.asarray(self.horizon, dtype))
        observed = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, self.observed)
        contexts = self.encoder(eqx.tree_at(lambda o: o.likelihood, observed, self.observed.likelihood), horizon)
        # Padded with "no observation follows"; step k sees the first observation after its start.
        ahead = jnp.searchsorted(jnp.asarray(seen), jnp.arange(grid.num_steps), side="right")
        padded = jnp.concatenate([contexts, jnp.zeros_like(contexts[:1])])
        ts = jnp.asarray(observed.ts, dtype)
        there = ahead < ts.shape[0]
        t = jnp.asarray(grid.t, dtype)
        wait = jnp.where(there, ts[jnp.minimum(ahead, ts.shape[0] - 1)] - t, 0.0)
        clock = jnp.stack([t / horizon, wait / horizon, there.astype(dtype)], axis=1)
        steps = _NeuralStep(None if linear is None else linear.steps, padded[ahead], clock)
        return Plan((None if linear is None else linear.start, contexts[0]), steps)

    def start(self, plan: Plan, white: Float[Array, " p"]) -> tuple[Array, Array, Array]:
        """The learned factor of history and initial state."""
        linear, context = plan.start
        d = int(self.control.out_size) // 2
        mean, root, log_det = _start_law(self.origin(context), d)
        if linear is None:
            eps, squares = mean + _from_blocks(jnp.einsum("dij,dj->di", root, _to_blocks(white, d))), jnp.sum(root**2)
        else:
            mean = linear.shift + mean
            eps = mean + linear.root @ _from_blocks(jnp.einsum("dij,dj->di", root, _to_blocks(white, d)))
            columns = jax.vmap(lambda row: _to_blocks(row, d))(linear.root)
            squares = jnp.sum(jnp.einsum("pdi,dij->pdj", columns, root) ** 2)
            log_det = linear.log_det + log_det
        log_ratio = (jnp.sum(white**2) - jnp.sum(eps**2)) / 2 + log_det
        return eps, log_ratio, (jnp.sum(mean**2) + squares - white.size) / 2 - log_det

    def draw(
        self, sde: FractionalSDE, driver: Driver, plan: _NeuralStep, step: Step, x: Array, v: Array, white: Array
    ) -> tuple[Array, Array, Array]:
        """One step's normals: linear part, control along the Brownian increment, widening of it."""
        d = x.shape[0]
        inputs = jnp.concatenate([x, (v / _spread(sde, driver)).ravel(), plan.context, plan.clock])
        # After the last observation there is nothing to steer for.
        control, widening = jnp.split(plan.clock[-1] * self.control(inputs), 2)
        index = 0 if driver.table.u.shape[0] == 1 else step.kind
        u, along = driver.table.u[index], driver.table.brownian[index]
        along = jnp.concatenate([along, jnp.zeros(driver.num_normals - along.shape[0], along.dtype)])
        widening = widening * jnp.sqrt(u)
        norm = jnp.sqrt(jnp.where(u > 0, u, 1.0))  # |along|^2 = Var of the increment = u
        unit = along / norm
        w = white.reshape(d, -1)
        wide = w + jnp.expm1(widening)[:, None] * (w @ unit)[:, None] * unit
        push = (control[:, None] * along).ravel()
        extra = jnp.expm1(2 * widening)
        if plan.linear is None:
            mean, eps = push, push + wide.ravel()
            squares, log_det = white.size + jnp.sum(extra), jnp.sum(widening)
        else:
            law = plan.linear
            mean = law.shift - law.gain @ flat_state(x, v) + push
            eps = mean + law.root @ wide.ravel()
            columns = law.root.reshape(-1, d, w.shape[1]) @ unit
            squares = jnp.sum(law.root**2) + jnp.sum(extra * jnp.sum(columns**2, axis=0))
            log_det = law.log_det + jnp.sum(widening)
        log_ratio = (jnp.sum(white**2) - jnp.sum(eps**2)) / 2 + log_det
        return eps, log_ratio, (jnp.sum(mean**2) + squares - white.size) / 2 - log_det


def _to_blocks(normals: Array, d: int) -> Array:
    """Normals of the histories (d * r,) and of the starts (d,), per coordinate: (d, r + 1)."""
    cut = normals.shape[0] - d
    return jnp.concatenate([normals[:cut].reshape(d, cut // d), normals[cut:, None]], axis=1)


def _from_blocks(blocks: Array) -> Array:
    """The inverse of `_to_blocks`."""
    return jnp.concatenate([blocks[:, :-1].ravel(), blocks[:, -1]])


def _start_law(outputs: Array, d: int) -> tuple[Array, Array, Array]:
    """Mean, lower triangular roots per coordinate (d, n, n) and their log-determinant from a network's outputs.

    Observations tie the normals of a history together, which no diagonal root can follow.
    """
    rows = outputs.reshape(d, -1)
    n = int((8 * rows.shape[1] + 9) ** 0.5 - 3) // 2  # rows hold n + n (n + 1) / 2 numbers
    mean, spread, below = rows[:, :n], rows[:, n : 2 * n], rows[:, 2 * n :]
    corner = np.tril_indices(n, -1)
    root = jnp.zeros((d, n, n), rows.dtype).at[:, *corner].set(below)
    root = root + jax.vmap(jnp.diag)(jnp.exp(spread))
    return _from_blocks(mean), root, jnp.sum(spread)


def _spread(sde: FractionalSDE, driver: Driver) -> Array:
    """Typical size of each lifted process, so that slow ones do not drown the fast; floored where a weight vanishes."""
    rates = jnp.asarray(sde.lift.gamma, sde.dtype)
    rates = jnp.concatenate([rates, jnp.full(driver.gain.shape[1] - rates.shape[0], 0.5, sde.dtype)])
    past = jnp.sum(driver.start**2, axis=-1) * (1.0 if sde.varying else 0.1)
    size = jnp.sqrt(driver.gain**2 * -jnp.expm1(-2 * rates) / (2 * rates) + past)
    if size.shape[1] == 0:
        return size
    return jax.lax.stop_gradient(size + 1e-3 * jnp.max(size))


def _identity(y: Array) -> Array:
    return y


def _mlp(inputs: int, outputs: int, width: int, depth: int, dtype: Any, key: Array) -> eqx.nn.MLP:
    return eqx.nn.MLP(inputs, outputs, width, depth, activation=jax.lax.tanh, dtype=dtype, key=key)


def _zero_last(mlp: eqx.nn.MLP) -> eqx.nn.MLP:
    last = lambda m: (m.layers[-1].weight, m.layers[-1].bias)
    return eqx.tree_at(last, mlp, tuple(jnp.zeros_like(p) for p in last(mlp)))
