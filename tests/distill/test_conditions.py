"""Conditions reach the student's own density, its draws, and every ratio and loss."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import genkit as gk
from genkit.distill._distill import warn_of_faults


pytestmark = pytest.mark.usefixtures("x64")
d = gk.distill
NOISE = dist.LogUniform(0.2, 2.0)
JS = gk.divergence.JensenShannon
LABELS = jnp.arange(2)


def teacher():
    """N(-1, 1/4) under label 0, N(1, 1/4) under label 1."""
    return gk.diffusion.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [1.0]]), 0.25, labels=np.array([0, 1]))


class ByLabel(eqx.Module):
    """A Gaussian for each label, which knows its own distribution."""

    means: jax.Array
    log_std: jax.Array

    def __call__(self, z, cond):
        return self.means[cond] + jnp.exp(self.log_std) * z

    def denoiser(self):
        return gk.diffusion.MixtureDenoiser(jnp.ones(2), self.means, jnp.exp(2 * self.log_std), labels=LABELS)


class Own(gk.Denoiser):
    """The denoiser of a Gaussian for each condition; there is no marginal, so the condition is required."""

    means: jax.Array
    std: jax.Array

    def _given(self, cond):
        return gk.diffusion.GaussianDenoiser(self.means[cond], self.std**2)

    def __call__(self, x, sigma, cond):
        return self._given(cond)(x, sigma)

    def log_density(self, x, sigma, cond):
        return self._given(cond).log_density(x, sigma)


class NoMarginal(ByLabel):
    def denoiser(self):
        return Own(self.means, jnp.exp(self.log_std))


class SaysTooLittle(ByLabel):
    """A student by label whose denoiser is that of a single Gaussian."""

    def denoiser(self):
        return gk.diffusion.GaussianDenoiser(self.means[0], jnp.exp(2 * self.log_std))


class Indifferent(ByLabel):
    """A student that draws the same under every label."""

    def __call__(self, z, cond):
        return self.means[0] + jnp.exp(self.log_std) * z

    def denoiser(self):
        return gk.diffusion.GaussianDenoiser(self.means[0], jnp.exp(2 * self.log_std))


def at_optimum(kind=ByLabel):
    return kind(jnp.array([[-1.0], [1.0]]), jnp.log(jnp.asarray(0.5)))


def away(kind=ByLabel):
    return kind(jnp.array([[-0.5], [0.3]]), jnp.log(jnp.asarray(0.7)))


def losses():
    return {
        "exact": d.FDistill(JS(), d.ExactRatio()),
        "reverse KL": d.FDistill(gk.divergence.ReverseKL(), d.ExactRatio()),
        "scores": d.FDistill(JS(), d.ScoreRatio(20.0, 10), num_bins=0),
        "draws": d.FDistill(JS(), d.EmpiricalRatio(4096, LABELS)),
        "draws for each": d.FDistill(JS(), d.EmpiricalRatio(1024)),
        "vsd": d.vsd(),
        "dmd": d.dmd(),
        "SiD": d.SiD(),
    }


@pytest.fixture(scope="module")
def slopes():
    """Value and gradient in the means of every loss, at the optimum and away from it, in one program."""

    def one(loss, student, teacher):
        objective = d.StudentObjective(loss, NOISE, None, 256, (1,))
        value, aux = objective(d.Distillation(student, teacher), jnp.arange(256) % 2, key=jr.key(3))
        return value, aux.get("divergence", value)

    @eqx.filter_jit
    def run(student, teacher):
        found = {}
        for name, loss in losses().items():
            (_, value), gradient = jax.value_and_grad(lambda s, loss=loss: one(loss, s, teacher), has_aux=True)(student)
            found[name] = (value, gradient.means[:, 0])
        return found

    with jax.enable_x64(True):
        return jax.device_get((run(at_optimum(), teacher()), run(away(), teacher())))


@pytest.mark.parametrize("name", losses())
def test_a_student_at_the_optimum_has_no_slope(slopes, name):
    value, slope = slopes[0][name]
    noise = 0.05 if "draws" in name else 1e-9
    np.testing.assert_allclose(value, 0, atol=noise)
    np.testing.assert_allclose(slope, 0, atol=noise)


@pytest.mark.parametrize("name", losses())
def test_away_from_it_each_mean_is_pulled_to_its_own_label(slopes, name):
    _, slope = slopes[1][name]
    assert slope[0] > 0.01 and slope[1] < -0.01


@pytest.mark.parametrize("name", ["scores", "draws", "draws for each"])
def test_ratios_by_condition_agree_with_the_exact_one(slopes, name):
    noise = 1e-3 if name == "scores" else 0.05
    for got, want in zip(slopes[1][name], slopes[1]["exact"], strict=True):
        np.testing.assert_allclose(got, want, atol=noise)


def train(student, ratio=None, num_steps=60, cond=LABELS, **options):
    return d.distill(teacher(), student, noise_distribution=NOISE, num_steps=num_steps, cond=cond, batch_size=64,
                     key=jr.key(0), **{"divergence": JS(), "ratio": ratio or d.ExactRatio(), **options})  # fmt: skip


@pytest.mark.parametrize("kind", [ByLabel, NoMarginal])
def test_a_student_that_starts_at_the_optimum_stays(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Plain steps: Adam would make large ones of the last bits of a gradient.
        made = train(at_optimum(kind), optimizer=optax.sgd(0.5))
    np.testing.assert_allclose(made.student.means[:, 0], [-1, 1], atol=1e-3)
    np.testing.assert_allclose(made.history["divergence"], 0, atol=1e-5)


def test_draws_under_each_condition_lead_to_the_teacher():
    made = train(away(), d.EmpiricalRatio(512), num_steps=250)
    np.testing.assert_allclose(made.student.means[:, 0], [-1, 1], atol=0.12)


def test_a_denoiser_that_ignores_the_condition_of_its_student_is_refused():
    with pytest.raises(ValueError, match=r"`student.denoiser\(\)` must be a denoiser that takes the condition"):
        train(at_optimum(SaysTooLittle))


def test_a_student_may_draw_the_same_under_every_condition():
    made = train(at_optimum(Indifferent), num_steps=2)
    assert np.isfinite(made.history["divergence"]).all()


def test_a_denoiser_that_needs_a_condition_is_refused_without_one():
    with pytest.raises(ValueError, match=r"student|denoiser"):
        train(at_optimum(NoMarginal), cond=None)


def test_a_negative_divergence_is_a_warning():
    noise = np.random.default_rng(0).normal(size=200)
    with pytest.warns(UserWarning, match=r"the divergence ended at -0.4.* no divergence is negative"):
        warn_of_faults({"divergence": -0.44 + 0.05 * noise})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_faults({"divergence": 0.01 + 0.5 * noise})
        warn_of_faults({"divergence": -1e-7 * np.ones(200)})
