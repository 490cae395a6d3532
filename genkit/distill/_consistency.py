"""Consistency models: one network that takes any noisy example to the start of its trajectory."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Inexact, Key, PyTree, Shaped

from genkit._core._checks import check, check_choice, check_count, check_interval, check_positive, fail
from genkit._core._fields import FROZEN, as_number
from genkit._core._known import float_dtype
from genkit.distill._distill import Conditions, Distilled
from genkit.distill._losses import frozen
from genkit.distill._objectives import cosine_adam
from genkit.distill._ratios import spread
from genkit.distill._teachers import Drawable, under_guidance
from genkit.sampling import Denoiser, Guidance, as_denoiser
from genkit.training import Objective, Phase, Recipe, fit, model_updates


class ConsistencyModel(Denoiser):
    r"""A network with the boundary $F(x, \sigma_{min}) = x$ built in, $F = c_{skip} x + c_{out}\,\mathrm{net}$.

    $c_{skip} = \sigma_d^2/((\sigma - \sigma_{min})^2 + \sigma_d^2)$,
    $c_{out} = (\sigma - \sigma_{min})\sigma_d/\sqrt{\sigma^2 + \sigma_d^2}$; the network sees
    $x/\sqrt{\sigma^2 + \sigma_d^2}$ and $\frac14\log\sigma$.

    Args:
        net: network `(x, t, cond) -> array` of the shape of `x`.
        sigma_data: standard deviation of the data, positive.
        sigma_min: the smallest noise level, not negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> model = gk.distill.ConsistencyModel(gk.nn.MLP((2,), width=8, depth=1, key=jax.random.key(0)), 0.5, 0.01)
        >>> model(jnp.ones(2), 0.01).tolist()
        [1.0, 1.0]

    Source: Song et al., "Consistency Models", ICML 2023, equation 5 and appendix C.
    """

    net: Callable[..., Array]
    sigma_data: Float[Array, ""] = eqx.field(converter=as_number, default=1.0, metadata=FROZEN)
    sigma_min: Float[Array, ""] = eqx.field(converter=as_number, default=0.0, metadata=FROZEN)

    def __check_init__(self):
        check_positive("sigma_data", self.sigma_data)
        check_interval("sigma_min", self.sigma_min, 0)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the network knows it."""
        # Networks say their shape and labels by the names that denoisers do.
        return as_denoiser(self.net).shape

    @property
    def num_labels(self) -> int | None:
        """Number of classes, where the network is conditioned on labels."""
        return as_denoiser(self.net).num_labels

    def __call__(
        self, x: Shaped[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Inexact[Array, " *shape"]:
        """The start of the trajectory through `x` at noise level `sigma`."""
        x = as_number(x)
        spread_of_data = self.sigma_data.astype(x.dtype)
        least = self.sigma_min.astype(x.dtype)
        sigma = jnp.maximum(jnp.asarray(sigma, x.dtype), least)
        # The network counts for nothing there.
        level = jnp.where(sigma == 0, 1, sigma)
        scale = jax.lax.rsqrt(sigma**2 + spread_of_data**2)
        skip = spread_of_data**2 / ((sigma - least) ** 2 + spread_of_data**2)
        out = (sigma - least) * spread_of_data * scale
        return skip * x + out * self.net(scale * x, jnp.log(level) / 4, cond)


class Pair(eqx.Module):
    """A student with the copy that makes its targets.

    Args:
        student: the consistency function that is trained.
        target: its moving average, never trained; `None` where the student itself makes the targets.
        teacher: the denoiser, never trained; `None` in consistency training.

    Example:
        >>> import genkit as gk
        >>> gk.distill.Pair(lambda x, sigma, cond: x).target is None
        True
    """

    student: Callable[..., Array]
    target: Callable[..., Array] | None = eqx.field(default=None, metadata=FROZEN)
    teacher: Callable[..., Array] | None = eqx.field(default=None, metadata=FROZEN)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one example, where the student knows it."""
        return as_denoiser(self.student).shape

    def __call__(self, x: Array, sigma: Float[ArrayLike, ""], cond: PyTree = None) -> Array:
        """The student."""
        return self.student(x, sigma, cond)


class ConsistencyObjective(Objective):
    r"""Neighbors on one trajectory must have one start: $E\,[\lambda\, d(F(x_{i}, \sigma_i), \bar F(x_{i+1}, \sigma_{i+1}))]$.

    With a teacher (distillation) the neighbor is one Heun step of its probability flow away; without one (training) it
    shares data and noise, $x_{i+1} = x_0 + \sigma_{i+1}\varepsilon$.

    Args:
        grid: noise levels, descending.
        metric: `"huber"`, $\sqrt{|d|^2 + c^2} - c$ with $c = 0.00054\sqrt{\dim}$, or `"l2"`.
        decay: of the moving average that makes the targets; `None` for the student itself.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> objective = gk.distill.ConsistencyObjective(jnp.array([2.0, 1.0, 0.0]), "l2")
        >>> model = gk.distill.Pair(gk.distill.ConsistencyModel(lambda x, t, cond: 0 * x))
        >>> objective(model, (jnp.zeros((4, 2)), None), key=jax.random.key(0))[0].shape
        ()

    Source: Song et al., "Consistency Models", ICML 2023, equations 7 and 10; Song and Dhariwal, "Improved Techniques for
    Training Consistency Models", ICLR 2024, section 3 (metric and weight).
    """  # noqa: E501

    grid: Float[Array, " k"] = eqx.field(converter=as_number)
    metric: str = eqx.field(static=True, default="huber")
    decay: Float[Array, ""] | None = None

    def __check_init__(self):
        check_choice("metric", self.metric, ("huber", "l2"))

    def _neighbor(self, teacher: Callable[..., Array], x: Array, high: Array, low: Array, cond: PyTree) -> Array:
        """One Heun step of the probability flow for one example; Euler to noise level 0."""
        slope = (x - teacher(x, high, cond)) / high
        euler = x + (low - high) * slope
        # Both branches of a `where` are differentiated: the one not taken must not divide by zero.
        level = jnp.where(low > 0, low, 1)
        heun = x + (low - high) * 0.5 * (slope + (euler - teacher(euler, level, cond)) / level)
        return jnp.where(low > 0, heun, euler)

    def __call__(self, model: Pair, batch: PyTree, *, key: Key[Array, ""]) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Estimate the loss on a batch of examples and conditions; see `gk.Objective`."""
        key_level, key_noise = jr.split(key)
        x0, cond = _split(batch)
        grid = self.grid.astype(x0.dtype)
        size = x0.shape[0]
        check(size > 0, "batch", "at least one example", x0, "An empty batch has no loss.")
        pairs = grid.shape[0] - 1
        key_shift, key_order = jr.split(key_level)
        # Even over the pairs.
        place = (jr.uniform(key_shift) + jnp.arange(size) / size) % 1
        index = jnp.minimum((jr.permutation(key_order, place) * pairs).astype(jnp.int32), pairs - 1)
        high = grid[index]
        low = grid[index + 1]
        # Both neighbors share it: in consistency training this is what puts them on one trajectory.
        noise = jr.normal(key_noise, x0.shape, x0.dtype)
        x_high = x0 + spread(high, x0) * noise
        if model.teacher is None:
            x_low = x0 + spread(low, x0) * noise
        else:
            teacher = frozen(model.teacher)
            x_low = jax.vmap(lambda x, h, l, c: self._neighbor(teacher, x, h, l, c))(x_high, high, low, cond)
        maker = model.target
        if maker is None:
            maker = model.student
        wanted = jax.lax.stop_gradient(_on_batch(frozen(maker), x_low, low, cond))
        got = _on_batch(model.student, x_high, high, cond)
        squares = jnp.sum((got - wanted).reshape(size, -1) ** 2, axis=1)
        distance = squares
        if self.metric == "huber":
            # Smooth at zero, where the gradient of a norm is not defined.
            least = 0.00054 * np.sqrt(x0[0].size)
            distance = jnp.sqrt(squares + least**2) - least
        # Per length of the step, so that refining the grid does not change the weight of a level.
        value = jnp.mean(distance / (high - low))
        aux: dict[str, Any] = {"residual": jnp.mean(squares)}
        if model.target is not None:
            fresh = self._averaged(model.target, frozen(model.student), x0.dtype)
            aux["updates"] = model_updates(model, lambda m: m.target, fresh)
        return value, aux

    def _averaged(self, target: PyTree, student: PyTree, dtype: jnp.dtype) -> PyTree:
        """The moving average of the student after one more step."""
        keep = jnp.zeros((), dtype)
        if self.decay is not None:
            keep = self.decay.astype(dtype)

        def mix(old: PyTree, new: PyTree) -> PyTree:
            if not eqx.is_inexact_array(old):
                return old
            share = keep.astype(old.dtype)
            return share * old + (1 - share) * new

        return jax.tree.map(mix, target, student)


def _split(batch: PyTree) -> tuple[Array, PyTree]:
    """Examples, as floats, and conditions of a batch."""
    x = batch
    cond = None
    if isinstance(batch, tuple):
        x, cond = batch
    return jnp.asarray(x, float_dtype(x)), cond


def _on_batch(net: Callable[..., Array], x: Array, sigma: Array, cond: PyTree) -> Array:
    return jax.vmap(lambda y, t, c: net(y, t, c))(x, sigma, cond)


class TeacherData(eqx.Module):
    """Batches drawn from an analytic teacher, with their conditions.

    Args:
        teacher: a denoiser with `sample`.
        conditions: batches of conditions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> data = gk.distill.TeacherData(gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0), gk.distill.Conditions(None, 4))
        >>> data(jax.random.key(0))[0].shape
        (4, 2)
    """  # noqa: E501

    teacher: Drawable
    conditions: Conditions

    def __call__(self, key: Key[Array, ""]) -> tuple[Array, PyTree]:
        """Draw a batch of examples and conditions."""
        key_cond, key_x = jr.split(key)
        cond = self.conditions(key_cond)
        return self.teacher.sample(self.conditions.batch_size, cond=cond, key=key_x), cond


def _student(model: Pair) -> PyTree:
    return model.student


def consistency(
    teacher: Callable[..., Array] | None,
    student: Callable[..., Array],
    *,
    grid: Sequence[float] | np.ndarray | Array,
    num_steps: int,
    key: Key[Array, ""],
    data: Callable[..., PyTree] | None = None,
    guidance: Guidance | None = None,
    cond: PyTree = None,
    metric: str = "huber",
    target_decay: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 256,
    ema: float | None = None,
) -> Distilled:
    """Consistency distillation of a denoiser, or consistency training without one.

    Args:
        teacher: the denoiser whose probability flow is followed; `None` trains from `data` alone.
        student: a denoiser-like `(x, sigma, cond=None) -> x` that returns `x` at the last level of the grid, such as
            `ConsistencyModel`.
        grid: noise levels, descending, the last one 0 or small: `gk.diffusion.karras(18, 0.002, 80.0)`.
        num_steps: updates.
        key: typed PRNG key.
        data: a callable `data(key) -> x` or `(x, cond)`; default draws of an analytic teacher.
        guidance: guidance of the teacher.
        cond: conditions of the teacher's draws, as in `distill`; not with `data`.
        metric: `"huber"` or `"l2"`.
        target_decay: decay of the moving average that makes the targets; `None` for the student itself.
        optimizer: default Adam with a cosine from 1e-3.
        batch_size: examples per update, for the teacher's draws.
        ema: decay of a moving average of the student, or `None`.

    Returns:
        A `Distilled`; its student is the consistency function, and the history has `loss` and `residual`.

    Raises:
        ValueError: for a grid that does not descend, a student that is not the identity at its end, or a teacher that
            cannot be drawn from where no data are given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> student = gk.distill.ConsistencyModel(gk.nn.MLP((2,), width=8, depth=1, key=jax.random.key(0)))
        >>> made = gk.distill.consistency(teacher, student, grid=gk.diffusion.karras(5, 0.1, 10.0), num_steps=2,
        ...                               batch_size=8, key=jax.random.key(1))
        >>> made.history["loss"].shape
        (2,)
    """
    grid = np.asarray(grid, np.float64)
    descends = grid.ndim == 1 and grid.size >= 2 and bool(np.all(np.diff(grid) < 0)) and grid[-1] >= 0
    check(descends, "grid", "noise levels that descend, at least two, none negative", grid)
    check_count("num_steps", num_steps)
    if data is None:
        if not isinstance(teacher, Drawable):
            hint = "Pass `gk.data.Batches(x, n)`."
            fail("data", "given, because the teacher has no `sample`", "None", hint)
        data = TeacherData(teacher, Conditions(cond, batch_size))
    if teacher is not None:
        teacher = under_guidance(teacher, guidance)
    target = None
    decay = None
    if target_decay is not None:
        target = student
        decay = as_number(target_decay)
    _check_boundary(student, data, float(grid[-1]))
    model = Pair(student, target, teacher)
    objective = ConsistencyObjective(jnp.asarray(grid), metric, decay)
    phase = Phase(objective, optimizer or cosine_adam(1e-3, num_steps), where=_student)
    log_every = min(num_steps, 500)
    recipe = Recipe(lambda key: model, data, phase, num_steps, ema=ema, log_every=log_every, name="consistency")
    return Distilled.of_training(fit(recipe, key=key))


def _check_boundary(student: Callable[..., Array], data: Callable[..., PyTree], least: float) -> None:
    """Refuse a student whose output is of another shape, or not its input at the smallest noise level."""

    def first(student: Callable[..., Array], data: Callable[..., PyTree]) -> tuple[Array, Array]:
        x, cond = _split(data(jr.key(0)))
        cond = jax.tree.map(lambda leaf: leaf[0], cond)
        return x[0], student(x[0], jnp.asarray(least, x.dtype), cond)

    x, y = eqx.filter_jit(first)(student, data)
    if y.shape != x.shape:
        fail("student", f"a function that keeps the shape {x.shape} of the data", f"shape {y.shape}")
    error = float(jnp.max(jnp.abs(y - x)))
    if not error <= 1e-3 * (1 + float(jnp.max(jnp.abs(x)))):
        hint = "Wrap the network in ConsistencyModel(net, sigma_data, sigma_min=grid[-1])."
        fail("student", f"the identity at noise level {least:g}", f"an output off by {error:.3g}", hint)
