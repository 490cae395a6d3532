"""The two-time-scale cycle: critics on fresh draws of the student, then one step of the student."""

import functools
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpyro.distributions as dist
import optax
from jaxtyping import Array, ArrayLike, Float, Key, PyTree, Shaped

from genkit._core._checks import check, check_count
from genkit._core._fields import FROZEN, as_number, maybe_number
from genkit._core._stratified import draw_evenly
from genkit.diffusion import EDMWeight
from genkit.distill._losses import AbstractLoss, density_of, frozen
from genkit.distill._model import Distillation
from genkit.distill._ratios import DiscriminatorRatio, NoisyBatch, spread
from genkit.distill._students import TakesSteps
from genkit.nn import MLP
from genkit.sampling import as_denoiser
from genkit.training import Objective, Phase


@functools.lru_cache(maxsize=32)
def cosine_adam(rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam under a cosine; the same object for the same numbers, so that nothing compiles again."""
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


@functools.lru_cache(maxsize=1)
def critic_adam() -> optax.GradientTransformation:
    """The default optimizer of critics: faster than the student, and never at rest."""
    return optax.adam(2e-3)


# A logit beyond this carries no ratio any more.
SATURATED = 10.0


def with_arrays(distribution: dist.Distribution) -> dist.Distribution:
    """A numpyro distribution with its parameters as arrays, so that another value never recompiles."""
    if not isinstance(distribution, dist.Distribution):
        return distribution
    return jax.tree.map(as_number, distribution)


def check_levels(distribution: dist.Distribution) -> None:
    """Refuse anything but a scalar numpyro distribution."""
    is_distribution = isinstance(distribution, dist.Distribution)
    is_scalar = is_distribution and distribution.batch_shape == () and distribution.event_shape == ()
    check(is_scalar, "noise_distribution", "a scalar numpyro distribution of the noise level", distribution)


def draw_levels(distribution: dist.Distribution, num: int, *, key: Key[Array, ""]) -> Array:
    """Noise levels that together cover their distribution; a point mass needs no draw."""
    if isinstance(distribution, dist.Delta):
        return jnp.broadcast_to(jnp.asarray(distribution.v), (num,))
    return draw_evenly(distribution, num, key=key)


def generate(student: Callable[..., Array], z: Array, cond: PyTree, *, key: Key[Array, ""]) -> Array:
    """A batch of the student; of several steps, one at random is trained (backward simulation)."""
    if not isinstance(student, TakesSteps):
        return jax.vmap(lambda one, c: student(one, c))(z, cond)
    steps = jr.randint(key, (z.shape[0],), 0, student.num_evaluations)
    return jax.vmap(student.rollout)(z, cond, steps)


def _check_conditions(cond: PyTree, batch_size: int) -> None:
    """Refuse conditions that are not one for each draw."""
    for leaf in jax.tree.leaves(cond):
        size = jnp.shape(leaf)[:1]
        check(size == (batch_size,), "batch", lambda: f"`batch_size` = {batch_size} conditions", str(size))


class StudentObjective(Objective):
    """The student's side: draws under noise, judged by a loss. The batch holds the conditions, or is `None`.

    Args:
        loss: the loss.
        noise_distribution: scalar numpyro distribution of the noise level.
        weight: function of the noise level; `None` is 1.
        batch_size: draws per update.
        latent_shape: shape of the student's latent.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> model = gk.distill.Distillation(gk.distill.OneStep(teacher, 3.0), teacher)
        >>> objective = gk.distill.StudentObjective(gk.distill.SDS(), dist.Uniform(0.5, 2.0), None, 8, (2,))
        >>> objective(model, None, key=jax.random.key(0))[0].shape
        ()
    """

    loss: AbstractLoss
    noise_distribution: dist.Distribution = eqx.field(converter=with_arrays)
    weight: Callable[[Array], Array] | None = None
    batch_size: int = eqx.field(static=True, default=256)
    latent_shape: tuple[int, ...] = eqx.field(static=True, default=())

    def __check_init__(self):
        check_levels(self.noise_distribution)
        check_count("batch_size", self.batch_size)

    def __call__(
        self, model: Distillation, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Estimate the loss; see `gk.Objective`."""
        _check_conditions(batch, self.batch_size)
        key_z, key_step, key_level, key_noise, key_loss = jr.split(key, 5)
        z = jr.normal(key_z, (self.batch_size, *self.latent_shape))
        x = generate(model.student, z, batch, key=key_step)
        # Levels in the dtype of the student: float64 levels would widen every evaluation.
        sigma = draw_levels(self.noise_distribution, self.batch_size, key=key_level).astype(x.dtype)
        noise = jr.normal(key_noise, x.shape, x.dtype)
        weight = jnp.ones_like(sigma)
        if self.weight is not None:
            weight = jax.vmap(self.weight)(sigma)
        density = density_of(self.noise_distribution, sigma)
        noisy = NoisyBatch(x, x + spread(sigma, x) * noise, sigma, noise, batch, weight, density)
        return self.loss(model, noisy, key=key_loss)


class CriticObjective(Objective):
    """The critics' side: denoising score matching of the student's draws, and the discriminator's logistic loss.

    Args:
        noise_distribution: scalar numpyro distribution of the noise level.
        batch_size: draws per update.
        latent_shape: shape of the student's latent.
        smoothness: weight of the discriminator's change under a perturbation of a tenth of the noise; `None` for none.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> import genkit as gk
        >>> teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
        >>> model = gk.distill.Distillation(gk.distill.OneStep(teacher, 3.0), teacher, fake=teacher)
        >>> objective = gk.distill.CriticObjective(dist.Uniform(0.5, 2.0), 8, (2,))
        >>> sorted(objective(model, None, key=jax.random.key(0))[1])
        ['fake_mse']
    """

    noise_distribution: dist.Distribution = eqx.field(converter=with_arrays)
    batch_size: int = eqx.field(static=True, default=256)
    latent_shape: tuple[int, ...] = eqx.field(static=True, default=())
    smoothness: Float[Array, ""] | None = eqx.field(converter=maybe_number, default=None)

    def __check_init__(self):
        check_levels(self.noise_distribution)
        check_count("batch_size", self.batch_size)

    def __call__(
        self, model: Distillation, batch: PyTree, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Estimate the critics' loss; see `gk.Objective`."""
        _check_conditions(batch, self.batch_size)
        key_z, key_step, key_level, key_noise, key_game = jr.split(key, 5)
        z = jr.normal(key_z, (self.batch_size, *self.latent_shape))
        # Critics follow the student; they never move it.
        x = frozen(generate(model.student, z, batch, key=key_step))
        sigma = draw_levels(self.noise_distribution, self.batch_size, key=key_level).astype(x.dtype)
        x_t = x + spread(sigma, x) * jr.normal(key_noise, x.shape, x.dtype)
        total = jnp.zeros((), x.dtype)
        aux = {}
        fake = model.fake
        if fake is not None:
            # The weight of the teacher's own training, so that all levels count alike.
            weight = EDMWeight(frozen(as_denoiser(fake).sigma_data))
            residual = jax.vmap(lambda y, s, c: fake(y, s, c))(x_t, sigma, batch) - x
            squares = jnp.sum(residual.reshape(residual.shape[0], -1) ** 2, axis=1)
            total = jnp.mean(jax.vmap(weight)(sigma) * squares)
            aux["fake_mse"] = jnp.mean(residual**2)
        if model.discriminator is not None:
            value, found = self._logistic(model, x_t, sigma, batch, key_game)
            total = total + value
            aux |= found
        return total, aux

    def _logistic(
        self, model: Distillation, x_t: Array, sigma: Array, cond: PyTree, key: Key[Array, ""]
    ) -> tuple[Array, dict[str, Array]]:
        """The discriminator's loss on noisy positives and negatives."""
        net = cast("Callable[..., Array]", model.discriminator)
        key_positive, key_noise, key_shift = jr.split(key, 3)
        real, real_cond = model.draw_positives(cond, self.batch_size, key=key_positive)
        check(real.shape == x_t.shape, "positives", f"of shape {x_t.shape}", f"shape {real.shape}")
        real = real.astype(x_t.dtype)
        # The levels of the negatives serve the positives too: both are judged at the same ones.
        real = real + spread(sigma, real) * jr.normal(key_noise, real.shape, real.dtype)
        logit = jax.vmap(lambda y, s, c: net(y, s, c))
        on_real = logit(real, sigma, real_cond)
        on_fake = logit(x_t, sigma, cond)
        value = jnp.mean(jax.nn.softplus(-on_real)) + jnp.mean(jax.nn.softplus(on_fake))
        both = jnp.concatenate([on_real, on_fake])
        # Watched, because a saturated discriminator trains on happily while its ratios mean nothing.
        saturation = jnp.mean((jnp.abs(both) > SATURATED).astype(both.dtype))
        aux = {"discriminator_loss": value, "saturation": saturation}
        if self.smoothness is not None:
            shifted = real + 0.1 * spread(sigma, real) * jr.normal(key_shift, real.shape, real.dtype)
            change = jnp.mean((logit(shifted, sigma, real_cond) - on_real) ** 2)
            value = value + self.smoothness.astype(value.dtype) * change
        return value, aux


class Discriminator(eqx.Module):
    r"""A small discriminator `(x, sigma, cond) -> log p/q`: a residual perceptron on the input scaled to unit variance.

    With `features` it also sees the noise $(x - D)/\sigma$ that a given denoiser finds, which tells at low noise how
    far off the data an example is. The teacher is the natural one: a small discriminator without it hardly tells a good
    student from its teacher, and where it cannot, every divergence acts as the reverse KL.

    Args:
        shape: shape of one example.
        width: size of the hidden state.
        depth: number of residual blocks.
        num_labels: number of classes, or `None`.
        sigma_data: standard deviation of the data.
        features: a denoiser, never trained, or `None`.
        key: typed PRNG key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import genkit as gk
        >>> float(gk.distill.Discriminator((2,), key=jax.random.key(0))(jnp.ones(2), 0.5))
        0.0
    """

    net: MLP
    sigma_data: Float[Array, ""] = eqx.field(metadata=FROZEN)
    features: Callable[..., Array] | None = eqx.field(metadata=FROZEN)

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        width: int = 64,
        depth: int = 2,
        num_labels: int | None = None,
        sigma_data: float = 1.0,
        features: Callable[..., Array] | None = None,
        key: Key[Array, ""],
    ):
        seen = tuple(shape)
        if features is not None:
            seen = (2, *shape)
        self.net = MLP(seen, width=width, depth=depth, num_labels=num_labels, key=key)
        self.sigma_data = as_number(sigma_data)
        self.features = features

    def __call__(
        self, x: Shaped[ArrayLike, " *shape"], sigma: Float[ArrayLike, ""], cond: PyTree = None
    ) -> Float[Array, ""]:
        """The logit of one example."""
        x = as_number(x)
        sigma = jnp.asarray(sigma, x.dtype)
        seen = x * jax.lax.rsqrt(sigma**2 + self.sigma_data.astype(x.dtype) ** 2)
        if self.features is not None:
            seen = jnp.stack([seen, (x - self.features(x, sigma, cond)) / sigma])
        return jnp.sum(self.net(seen, jnp.log(sigma) / 4, cond)) / jnp.sqrt(jnp.asarray(x.size, x.dtype))


def _student(model: Distillation) -> PyTree:
    return model.student


def _fake(model: Distillation) -> PyTree:
    return model.fake


def _discriminator(model: Distillation) -> PyTree:
    return model.discriminator


def _both(model: Distillation) -> PyTree:
    return model.fake, model.discriminator


def cycle(
    loss: AbstractLoss,
    *,
    noise_distribution: dist.Distribution,
    latent_shape: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    fake_optimizer: optax.GradientTransformation | None = None,
    weight: Callable[[Array], Array] | None = None,
    batch_size: int = 256,
    fake_steps: int = 5,
    critics: tuple[bool, bool] | None = None,
) -> tuple[Phase, ...]:
    """The phases of one cycle of distillation, for `gk.Recipe`: critics `fake_steps` times, then the student.

    Args:
        loss: the loss of the student.
        noise_distribution: scalar numpyro distribution of the noise level.
        latent_shape: shape of the student's latent.
        optimizer: optimizer of the student.
        fake_optimizer: optimizer of the critics; default Adam at 2e-3.
        weight: function of the noise level on the loss; `None` is 1.
        batch_size: draws per update.
        fake_steps: updates of the critics per cycle.
        critics: whether a fake denoiser and a discriminator are trained; default what the loss needs.

    Returns:
        The phases, for a model that is a `Distillation` and data that give conditions (`Conditions`).

    Example:
        >>> import optax, numpyro.distributions as dist
        >>> import genkit as gk
        >>> levels = dist.LogUniform(0.1, 10.0)
        >>> phases = gk.distill.cycle(gk.distill.vsd(), noise_distribution=levels, latent_shape=(2,),
        ...                           optimizer=optax.adam(1e-3))
        >>> [(phase.name, phase.repeats) for phase in phases]
        [('critic', 5), ('student', 1)]
    """
    fake, discriminator = critics or loss.needs()
    student = StudentObjective(loss, noise_distribution, weight, batch_size, tuple(latent_shape))
    student_phase = Phase(student, optimizer, where=_student, name="student")
    if fake and discriminator:
        where = _both
    elif fake:
        where = _fake
    elif discriminator:
        where = _discriminator
    else:
        return (student_phase,)
    smoothness = None
    for ratio in loss.ratios():
        if isinstance(ratio, DiscriminatorRatio):
            smoothness = ratio.smoothness
            break
    critic = CriticObjective(noise_distribution, batch_size, tuple(latent_shape), smoothness)
    critic_phase = Phase(critic, fake_optimizer or critic_adam(), where=where, repeats=fake_steps, name="critic")
    return critic_phase, student_phase
