"""Losses, ratios, guided teachers and monitors against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest
from distill.helpers import mixture, student

import genkit as gk
from genkit.distill._model import log_density


pytestmark = pytest.mark.usefixtures("x64")
LABELS = np.array([0, 1])


class Biased(eqx.Module):
    """A denoiser that is wrong by a constant."""

    base: eqx.Module
    shift: jax.Array

    def __call__(self, x, sigma, cond=None):
        return self.base(x, sigma) + self.shift


def gauss(n):
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return z, w / w.sum()


def quadrature(model, sigma):
    """A batch on the nodes of a product rule, and the weights that make means of it expectations."""
    (z, wz), (e, we) = gauss(30), gauss(30)
    z, e = (jnp.asarray(v.ravel()) for v in np.meshgrid(z, e, indexing="ij"))
    weight = jnp.asarray(np.outer(wz, we).ravel() * z.size)
    x = jax.vmap(model.student)(z[:, None])
    level = jnp.full(z.shape, sigma)
    return gk.distill.NoisyBatch(x, x + sigma * e[:, None], level, e[:, None], None, weight)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_sid_is_the_gradient_of_the_fisher_divergence(alpha):
    teacher = gk.diffusion.GaussianDenoiser(jnp.array([0.7]), 0.8)

    @jax.jit
    @jax.grad
    def slope(own):
        model = gk.distill.Distillation(own, teacher)
        return gk.distill.SiD(alpha)(model, quadrature(model, 0.6), key=jr.key(0))[0]

    @jax.jit
    @jax.grad
    def fisher(own, held):
        # E_q |D_p - D_q|^2, with the law of x_t held fixed or not
        model = gk.distill.Distillation(own if alpha == 0.5 else held, teacher)
        batch = quadrature(model, 0.6)
        gap = jax.vmap(lambda x: teacher(x, 0.6) - own.denoiser()(x, 0.6))(batch.x_t)
        return jnp.mean(batch.weight * gap[:, 0] ** 2)

    own = student(-0.2, 1.3)
    for got, wanted in zip(jax.tree.leaves(slope(own)), jax.tree.leaves(fisher(own, own)), strict=True):
        np.testing.assert_allclose(got, wanted / 2, rtol=1e-8)


def test_score_ratio_needs_no_density():
    p, q = mixture("A"), gk.diffusion.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [0.5]]), jnp.array([0.5, 2.0]))
    ratio, probes = gk.distill.ScoreRatio(60.0, 24), gk.distill.ScoreRatio(60.0, 24, num_probes=1)

    @jax.jit
    def both(x):
        exact = p.log_density(x, 0.7) - q.log_density(x, 0.7)
        return exact, ratio.log_ratio(p, q, x, 0.7), probes.log_ratio(p, q, x, 0.7, key=jr.key(0))

    for x in (-2.5, 0.0, 1.0, 3.0):
        exact, found, probed = both(jnp.array([x]))
        np.testing.assert_allclose(found, exact, atol=2e-3)
        np.testing.assert_allclose(probed, found, atol=1e-9)  # in one dimension one random sign is exact


def test_guided_teacher_is_the_law_of_its_ratio():
    law = mixture("A", labels=LABELS)
    guided = gk.guidance.Guided(law, gk.guidance.cfg(1.7))

    @jax.jit
    def facts(x):
        score = jax.grad(lambda y: log_density(guided, y, jnp.asarray(0.5), 1))(x)
        by_hand = law(x, 0.5) + 1.7 * (law(x, 0.5, 1) - law(x, 0.5))
        return guided(x, 0.5, 1), by_hand, x + 0.25 * score

    for x in (-1.0, 0.5, 2.0):
        prediction, by_hand, tweedie = facts(jnp.array([x]))
        np.testing.assert_allclose(prediction, by_hand, rtol=1e-12)
        np.testing.assert_allclose(prediction, tweedie, rtol=1e-9)


@pytest.mark.slow
def test_guided_distillation_finds_the_guided_law():
    # Two Gaussians of one variance: guidance by w shifts the mean and keeps the variance, in closed form, clean.
    law = gk.diffusion.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [1.0]]), 0.5, labels=LABELS)
    guidance = gk.guidance.cfg(2.0)
    made = gk.distill.distill(
        law, student(0.0, 1.0), divergence=gk.divergence.ForwardKL(), ratio=gk.distill.ExactRatio(), cond=1,
        noise_distribution=dist.Delta(0.0), guidance=guidance, num_steps=400, batch_size=512, ema=0.98, key=jr.key(0),
    )  # fmt: skip
    x = np.linspace(-8, 8, 4001)
    log_p = jax.vmap(lambda y: log_density(gk.guidance.Guided(law, guidance), y[None], jnp.asarray(0.0), 1))(x)
    p = np.exp(np.asarray(log_p - log_p.max()))
    p /= p.sum()
    mean = (p * x).sum()
    std = np.sqrt((p * (x - mean) ** 2).sum())
    np.testing.assert_allclose([made.ema.mean[0], jnp.exp(made.ema.log_std[0])], [mean, std], atol=0.03)


def evaluate(losses, model, n=64):
    """For each loss by name: value, gradient in the student and by-products on a random batch, in one program."""

    def one(loss, own):
        now = eqx.tree_at(lambda m: m.student, model, own)
        objective = gk.distill.StudentObjective(loss, dist.Uniform(0.3, 2.0), None, n, (1,))
        return objective(now, None, key=jr.key(3))

    @jax.jit
    def run(own):
        return {name: jax.value_and_grad(lambda o, k=k: one(k, o), has_aux=True)(own) for name, k in losses.items()}

    found = run(model.student)
    return {name: (v, aux, np.array([g.mean[0], g.log_std[0]])) for name, ((v, aux), g) in found.items()}


def test_ratios_agree_and_the_lag_is_seen():
    own, teacher = student(0.2, 1.4), mixture("B")
    exact, js = own.denoiser(), gk.divergence.JensenShannon()
    losses = {
        "exact": gk.distill.FDistill(js, gk.distill.ExactRatio(), num_bins=0),
        "scores": gk.distill.FDistill(js, gk.distill.ScoreRatio(40.0, 10), num_bins=0),
        "draws": gk.distill.FDistill(js, gk.distill.EmpiricalRatio(2048)),
    }
    found = evaluate(losses, gk.distill.Distillation(own, teacher, fake=exact), n=2048)
    value, aux, slope = found["exact"]
    for name in ("scores", "draws"):
        near, _, same = found[name]
        np.testing.assert_allclose(same, slope, atol=0.03 if name == "draws" else 1e-3, err_msg=name)
        np.testing.assert_allclose(near, value, atol=0.02 if name == "draws" else 1e-3)
    assert abs(found["scores"][1]["lag"]) < 0.3
    assert 0.5 < aux["ess"] <= 1 and abs(aux["mean_ratio"] - 1) < 0.1
    late = gk.distill.Distillation(own, teacher, fake=Biased(exact, jnp.asarray(-0.6)))
    assert evaluate({"vsd": gk.distill.vsd()}, late, n=2048)["vsd"][1]["lag"] > 0.4


def test_losses_where_student_and_teacher_agree():
    teacher = gk.diffusion.GaussianDenoiser(jnp.zeros(1), 1.0)
    model = gk.distill.Distillation(student(0.0, 1.0), teacher, discriminator=lambda x, s, c: jnp.sum(0 * x))
    still = {
        "Pearson": gk.distill.FDistill(gk.divergence.PearsonChi2(), gk.distill.ExactRatio()),
        "vsd": gk.distill.vsd(),
        "dmd": gk.distill.dmd(),
        "SiD": gk.distill.SiD(),
        "adversarial": gk.distill.Adversarial(),
        "SDS": gk.distill.SDS(),
    }
    found = evaluate(still, model)
    # A point mass is pulled to the mode: score distillation does not vanish at the law.
    assert found.pop("SDS")[2][1] > 0.01
    for name, (_, _, slope) in found.items():
        np.testing.assert_allclose(slope, 0, atol=1e-12, err_msg=name)


def test_vsd_is_the_reverse_kl_and_sums_add_up():
    exact = gk.distill.FDistill(gk.divergence.ReverseKL(), gk.distill.ExactRatio())
    losses = {"exact": exact, "vsd": gk.distill.vsd(), "sum": exact + 2.0 * gk.distill.vsd()}
    found = evaluate(losses, gk.distill.Distillation(student(0.2, 1.4), mixture("B")))
    np.testing.assert_allclose(found["vsd"][2], found["exact"][2], rtol=1e-9)
    np.testing.assert_allclose(found["sum"][2], 3 * found["exact"][2], rtol=1e-9)


def test_dsd_weighs_its_two_directions():
    teacher = mixture("A", labels=LABELS)
    model = gk.distill.Distillation(student(0.3, 1.0), teacher)

    @jax.jit
    def slope(loss):
        def value(own):
            now = eqx.tree_at(lambda m: m.student, model, own)
            objective = gk.distill.StudentObjective(loss, dist.Uniform(0.3, 2.0), None, 64, (1,))
            return objective(now, jnp.ones(64, jnp.int32), key=jr.key(3))[0]

        return jax.grad(value)(model.student).mean[0]

    parts = slope(gk.distill.DSD(1.0, 0.0)), slope(gk.distill.DSD(0.0, 1.0))
    np.testing.assert_allclose(slope(gk.distill.DSD(2.0, 3.0)), 2 * parts[0] + 3 * parts[1], rtol=1e-9)
    assert parts[0] < 0  # towards the labeled component at 2


def test_far_apart_ratios_overflow_into_the_bound():
    model = gk.distill.Distillation(student(400.0, 1.0), gk.diffusion.GaussianDenoiser(jnp.zeros(1), 1.0))
    loss = gk.distill.FDistill(gk.divergence.PearsonChi2(), gk.distill.ExactRatio())
    value, aux, slope = evaluate({"far": loss}, model)["far"]
    assert np.isfinite(slope).all() and np.isfinite(value) and aux["clipped"] == 1.0


@pytest.mark.slow
def test_monitors():
    p, q = mixture("B"), gk.diffusion.GaussianDenoiser(jnp.array([0.1]), 2.0)
    x = q.sample(8_000, key=jr.key(0))
    u = jax.jit(jax.vmap(lambda y: p.log_density(y, 1e-3) - q.log_density(y, 1e-3)))(x)
    ratio = lambda y, sigma, cond=None: p.log_density(y, sigma) - q.log_density(y, sigma)
    for divergence in (gk.divergence.ReverseKL(), gk.divergence.JensenShannon()):
        values = divergence.phi(u)
        wanted, band = float(values.mean()), 5.5 * float(values.std()) / np.sqrt(len(u))
        found = gk.distill.divergence_from_scores(
            p,
            q,
            x,
            sigma_min=1e-3,
            sigma_max=100.0,
            divergence=divergence,
            log_ratio=ratio,
            key=jr.key(1),
            num_nodes=40,
        )
        np.testing.assert_allclose(found, wanted, atol=2 * band)
    found = gk.distill.mode_coverage(jnp.array([[0.0], [0.1], [4.0], [9.0]]), jnp.array([[0.0], [4.0]]), radius=0.5)
    np.testing.assert_allclose(found["mass"], [0.5, 0.5])
    assert int(found["covered"]) == 2 and float(found["precision"]) == 0.75


def test_students_and_samplers():
    law = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
    few = gk.distill.FewStep(law, [8.0, 1.0, 0.3])
    z = jr.normal(jr.key(0), (3, 2))
    np.testing.assert_allclose(few.rollout(z, None, jnp.asarray(2)), few(z), rtol=1e-12)
    first = few.rollout(z, None, jnp.asarray(0))
    np.testing.assert_allclose(first, law(8.0 * z[0], jnp.asarray(8.0)), rtol=1e-12)
    # Only the last step has a gradient: the slope in z[0] is cut.
    slope = jax.grad(lambda z: jnp.sum(few.rollout(z, None, jnp.asarray(2))))(z)
    np.testing.assert_allclose(slope, 0)
    model = gk.distill.Distillation(few, law)
    draws = gk.sample(gk.distill.StudentSampler(), model, 4, key=jr.key(1))
    assert draws.value.shape == (4, 2) and draws.nfe.tolist() == [3] * 4
    # The denoiser of N(0, 1) halves twice: 8 z / 65, then (that + z') / 2.
    many = gk.sample(gk.distill.Renoise([8.0, 1.0]), law, 4000, key=jr.key(2))
    band = 5.5 * np.sqrt(2 / 8000)
    wanted = ((8 / 65) ** 2 + 1) / 4
    np.testing.assert_allclose(np.var(many.value) / wanted, 1, atol=band)
