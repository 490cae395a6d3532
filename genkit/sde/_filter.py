"""Linear-Gaussian algebra: linearized steps, and the backward square-root information filter.

Everything known about the future is kept as whitened rows: given the state z, `b - U z` is a standard normal vector.
An observation adds rows; a step z' = A z + m + M eps is eliminated by whitening `U M eps + noise`, whose covariance
I + B B' (B = U M) is never near singular. Rows are compressed by QR.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from genkit._core._checks import check
from genkit.sde._compress import compress
from genkit.sde._model import FractionalSDE
from genkit.sde._observed import Observed, gaussian_parts, normal_parts
from genkit.sde._step import Driver, Step, change, shape_noise


class Maps(NamedTuple):
    """Affine steps z' = z + D z + m + M eps; z = (x, v) flattened, leading axis N.

    D instead of I + D, because beside the identity a short step's digits would be lost.
    """

    slope: Array  # (N, n, n)
    offset: Array  # (N, n)
    noise: Array  # (N, n, p)


class Rows(NamedTuple):
    """Whitened observations of the state: `target - matrix z` is standard normal (or zero when missing)."""

    matrix: Array  # (..., q, n)
    target: Array  # (..., q)


class Gaussian(NamedTuple):
    """Distribution of standard-normal coordinates given the rest: mean `shift - gain z`, root of the covariance."""

    shift: Array
    gain: Array
    root: Array
    log_det: Array  # of the root


def flat_state(x: Array, v: Array) -> Array:
    """(x, v) as one vector."""
    return jnp.concatenate([x, v.ravel()])


def flat_step(sde: FractionalSDE, driver: Driver, step: Step, z: Array, eps: Array) -> Array:
    """One step on the flattened state and normals."""
    return z + flat_change(sde, driver, step, z, eps)


def flat_change(sde: FractionalSDE, driver: Driver, step: Step, z: Array, eps: Array) -> Array:
    """What one step adds to the flattened state."""
    d = sde.dim
    v = z[d:].reshape(driver.gain.shape)
    noise = shape_noise(driver, step, eps.reshape(d, -1))
    return flat_state(*change(sde, driver, step, z[:d], v, noise))


def linearize(sde: FractionalSDE, driver: Driver, steps: Step, z: Array, eps: Array) -> Maps:
    """The numerical steps, linearized around states z (N, n) and normals eps (N, p); exact for affine drift."""

    def one(step: Step, z: Array, eps: Array) -> Maps:
        function = lambda z, eps: flat_change(sde, driver, step, z, eps)
        slope, m = jax.jacfwd(function, argnums=(0, 1))(z, eps)
        return Maps(slope, function(z, eps) - slope @ z - m @ eps, m)

    return jax.vmap(one)(steps, z, eps)


def start_map(sde: FractionalSDE, driver: Driver) -> tuple[Array, Array]:
    """z0 = offset + noise @ (normals of the history, normals of x0)."""
    d, m, r = driver.start.shape
    mean, sd = sde.start()
    past = jnp.zeros((d, m, d, r), sde.dtype).at[jnp.arange(d), :, jnp.arange(d), :].set(driver.start)
    top = jnp.concatenate([jnp.zeros((d, d * r), sde.dtype), jnp.diag(sd)], axis=1)
    bottom = jnp.concatenate([past.reshape(d * m, d * r), jnp.zeros((d * m, d), sde.dtype)], axis=1)
    return flat_state(mean, jnp.zeros((d, m), sde.dtype)), jnp.concatenate([top, bottom])


def observation_rows(sde: FractionalSDE, observed: Observed, x: Array, size: int) -> tuple[Rows, Array]:
    """Whitened rows at each observation, linearized at states x (n, d), and the constant of their log-density."""

    def one(x: Array, y: Array, keep: Array) -> tuple[Rows, Array]:
        root, matrix, offset = normal_parts(observed.likelihood, x)
        rows = root @ matrix
        check(y.size == root.shape[-1], "y", f"of {root.shape[-1]} entries a row, as the likelihood", f"{y.size}")
        target = root @ (jnp.ravel(y) - offset)
        padded = jnp.concatenate([rows, jnp.zeros((rows.shape[0], size - x.shape[0]), rows.dtype)], axis=1)
        constant = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(root)))) - target.size / 2 * jnp.log(2 * jnp.pi)
        return Rows(jnp.where(keep, padded, 0.0), jnp.where(keep, target, 0.0)), jnp.where(keep, constant, 0.0)

    rows, constants = jax.vmap(one)(x, observed.filled().astype(sde.dtype), jnp.asarray(observed.mask))
    return rows, jnp.sum(constants)


def require_gaussian(sde: FractionalSDE, observed: Observed, who: str) -> None:
    """Refuse a likelihood that is not normal."""
    ok = gaussian_parts(observed.likelihood, jnp.zeros(sde.dim, sde.dtype)) is not None
    check(ok, "likelihood", f"normal given the state for {who}", "another law", "Use `NeuralGuide` with `elbo`.")


def place_rows(rows: Rows, slots: ArrayLike, num_steps: int) -> tuple[Rows, Rows]:
    """Rows at the ends of steps, zero where nothing is observed, and those at time 0."""
    q, n = rows.matrix.shape[1:]
    index = jnp.asarray(slots)
    blank = Rows(jnp.zeros((num_steps + 1, q, n), rows.matrix.dtype), jnp.zeros((num_steps + 1, q), rows.target.dtype))
    placed = Rows(blank.matrix.at[index].set(rows.matrix), blank.target.at[index].set(rows.target))
    return jax.tree.map(lambda x: x[1:], placed), jax.tree.map(lambda x: x[0], placed)


def _absorb(known: Rows, new: Rows) -> Rows:
    """Add rows and compress to n + 1 of them."""
    both = jnp.concatenate([known.matrix, new.matrix]), jnp.concatenate([known.target, new.target])
    compressed = compress(jnp.concatenate([both[0], both[1][:, None]], axis=1))
    return Rows(compressed[:, :-1], compressed[:, -1])


def _eliminate(known: Rows, slope: Array | None, offset: Array, noise: Array) -> tuple[Rows, Array, Gaussian]:
    """Integrate out the normals of z' = z + D z + m + M eps; also their distribution given z and the future."""
    cross = known.matrix @ noise
    target = known.target - known.matrix @ offset
    size = cross.shape[0]
    outer = jnp.linalg.cholesky(jnp.eye(size, dtype=cross.dtype) + cross @ cross.T)
    solve = lambda rhs: jax.scipy.linalg.solve_triangular(outer, rhs, lower=True)
    moved = jnp.zeros((size, 0), cross.dtype) if slope is None else known.matrix + known.matrix @ slope
    log_det = -jnp.sum(jnp.log(jnp.diagonal(outer)))
    # The normals' posterior precision is I + B'B. Forming it would lose the identity beside precise observations in
    # float32, so its root comes from a QR of (B, I).
    identity = jnp.eye(cross.shape[1], dtype=cross.dtype)
    basis, inner = jnp.linalg.qr(jnp.concatenate([cross, identity]))
    backsolve = lambda rhs: jax.scipy.linalg.solve_triangular(inner, rhs)
    both = backsolve(basis[:size].T @ jnp.concatenate([moved, target[:, None]], axis=1))
    diagonal = jnp.diagonal(inner)
    root = backsolve(identity) * jnp.sign(diagonal)
    law = Gaussian(both[:, -1], both[:, :-1], root, -jnp.sum(jnp.log(jnp.abs(diagonal))))
    return Rows(solve(moved), solve(target)), log_det, law


class Backward(NamedTuple):
    """Outcome of the backward pass: evidence (up to the observations' constant), distributions of the normals."""

    log_evidence: Array
    start: Gaussian
    steps: Gaussian  # leading axis N


def backward(maps: Maps, rows: Rows, first: Rows, offset: Array, noise: Array) -> Backward:
    """From the last step to the start; `rows` are seen at the ends of steps, `first` at time 0."""
    n = offset.shape[0]
    known = Rows(jnp.zeros((n + 1, n), offset.dtype), jnp.zeros(n + 1, offset.dtype))

    def body(carry: tuple[Rows, Array], xs: tuple[Maps, Rows]) -> tuple[tuple[Rows, Array], Gaussian]:
        known, total = carry
        step, new = xs
        known, log_det, law = _eliminate(_absorb(known, new), step.slope, step.offset, step.noise)
        return (known, total + log_det), law

    zero = jnp.zeros((), offset.dtype)
    (known, total), steps = jax.lax.scan(body, (known, zero), (maps, rows), reverse=True)
    known, log_det, start = _eliminate(_absorb(known, first), None, offset, noise)
    return Backward(total + log_det - jnp.sum(known.target**2) / 2, start, steps)
