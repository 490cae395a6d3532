"""The exact tables: Gaussian pairs, the public mixture PUB-4, the leaky bed, digits as a kernel mixture."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


gd, gg = gk.diffusion, gk.guidance
HEUN = gd.heun(gd.karras(64, 0.002, 80.0))


# D2: Gaussian pairs, N(m, s_c^2) under the condition and N(0, s_u^2) without; everything linear, two draws suffice.

PAIRS = [
    ((1.0, 0.5, 1.0), 1.5, 1.23139, 0.35532),
    ((1.0, 0.5, 1.0), 2.0, 1.37323, 0.25183),
    ((1.0, 0.5, 1.0), 3.0, 1.49480, 0.12696),
    ((1.0, 0.5, 1.0), 5.0, 1.49953, 0.03298),
    ((1.5, 0.6, 2.0), 2.0, 1.75814, 0.18244),
    ((1.5, 0.6, 2.0), 3.0, 1.76775, 0.05618),
]


class Pair(gk.Denoiser):
    numbers: jax.Array

    def __call__(self, x, sigma, cond=None):
        mean, cond_std, uncond_std = self.numbers
        null = jnp.asarray(cond is None) | (jnp.asarray(-1 if cond is None else cond) < 0)
        mean, variance = jnp.where(null, 0.0, mean), jnp.where(null, uncond_std, cond_std) ** 2
        return mean + (x - mean) * variance / (variance + sigma**2)


@pytest.mark.parametrize(("numbers", "scale", "mean", "std"), PAIRS)
def test_gaussian_pairs(numbers, scale, mean, std, x64):
    start = jnp.array([[0.0], [80.0]])
    pair = Pair(jnp.asarray(numbers))
    zero, slope = gk.sample(HEUN, pair, 2, key=jr.key(0), cond=0, x_init=start, guidance=gg.cfg(scale)).value[:, 0]
    assert float(zero) == pytest.approx(mean, abs=1e-5)
    assert float(slope - zero) == pytest.approx(std, abs=1e-5)


def test_projection_in_one_dimension_is_no_guidance(x64):
    start = jnp.array([[0.0], [80.0]])
    pair = Pair(jnp.asarray([1.0, 0.5, 1.0]))
    run = lambda g: gk.sample(HEUN, pair, 2, key=jr.key(0), cond=0, x_init=start, guidance=g).value
    np.testing.assert_allclose(run(gg.apg(6.0)), run(gg.cfg(1.0)), rtol=1e-10)


# The same law under EDM, VP and flow matching: the same guided draws.


class Raw(eqx.Module):
    """What an exact network of each parameterization returns for the mixture."""

    law: gd.MixtureDenoiser
    schedule: gk.Schedule
    prediction: str = eqx.field(static=True)

    def __call__(self, x_t, t, cond):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = self.law(x_t / alpha, sigma / alpha, cond)
        rates = {}
        if self.prediction == "velocity":
            rates = {"alpha_dot": self.schedule.alpha_dot(t), "sigma_dot": self.schedule.sigma_dot(t)}
        return gd.convert(x0, "x0", self.prediction, x_t, alpha, sigma, **rates)


@pytest.mark.slow
def test_parameterizations_agree(x64):
    means = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    law = gd.MixtureDenoiser(jnp.ones(6), means, jnp.asarray(0.09), labels=np.repeat(np.arange(3), 2))
    guidance = gg.interval(gg.apg(4.0, norm_rms=0.5, momentum=-0.5) + gg.negative(1.5, 2), 0.05, 5.0) >> gg.Rescale(0.3)
    table = gd.heun(gd.karras(6, 0.05, 8.0))
    start = 8.0 * jr.normal(jr.key(0), (4, 3))
    run = lambda model: gk.sample(
        table, model, 4, cond=jnp.arange(4) % 3, x_init=start, guidance=guidance, key=jr.key(1)
    )
    expected = run(law).value
    for prediction, schedule in (("eps", gd.VP(0.1, 20.0)), ("velocity", gd.CondOT()), ("v", gd.Cosine())):
        model = gd.Preconditioned(Raw(law, schedule, prediction), prediction, schedule=schedule)
        np.testing.assert_allclose(run(model).value, expected, rtol=1e-8, atol=1e-9)


# D3: PUB-4, four classes of two components in four dimensions.

PUB_4 = {
    "cond": (lambda: gg.cfg(1.0), (1.188, 0.201, 0.404, 0.201), 127),
    "cfg 2": (lambda: gg.cfg(2.0), (1.346, 0.159, 0.378, 0.182), 254),
    "cfg 3": (lambda: gg.cfg(3.0), (1.440, 0.147, 0.362, 0.186), 254),
    "cfg 6": (lambda: gg.cfg(6.0), (1.625, 0.135, 0.325, 0.214), 254),
    "apg 3": (lambda: gg.apg(3.0), (1.190, 0.203, 0.302, 0.183), 254),
    "apg 6": (lambda: gg.apg(6.0), (1.177, 0.211, 0.204, 0.252), 254),
    "apg 6, r = .3": (lambda: gg.apg(6.0, norm_threshold=0.3), (1.191, 0.203, 0.291, 0.178), 254),
    # The row of the table, 1.291 .150 .380 .173, decides evaluation by evaluation; here a step decides for both of its
    # own, as in the code of the authors. These numbers are from an independent program in numpy (20,000 draws).
    "interval": (lambda: gg.interval(gg.cfg(3.0), 0.1, 1.0), (1.283, 0.152, 0.381, 0.173), 159),
}


def pub_4():
    eye = np.eye(4)
    means = np.stack([1.2 * eye[k] + s * 0.35 * eye[(k + 1) % 4] for k in range(4) for s in (1, -1)])
    return gd.MixtureDenoiser(jnp.ones(8), jnp.asarray(means), jnp.asarray(0.04), labels=np.repeat(np.arange(4), 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", PUB_4)
def test_public_mixture(name):
    guidance, expected, passes = PUB_4[name]
    n = 40_000
    table = gd.heun(gd.karras(64, 0.002, 20.0))
    # Classes differ by a permutation of the axes: all draws are of the first.
    draws = gk.sample(table, pub_4(), n, cond=0, guidance=guidance(), key=jr.key(0), batch_size=10_000)
    x = np.asarray(draws.value, np.float64)
    found = (x[:, 0].mean(), x[:, 0].std(), x[:, 1].std(), np.sqrt((x[:, 2:] ** 2).mean()))
    # Two samples of 40,000: the error of the difference is at most .404 * sqrt(2 / 40000) = .003.
    np.testing.assert_allclose(found, expected, atol=0.005)
    assert draws.nfe.tolist() == [passes] * n


# D5: the leaky bed, where guidance helps.


class Leaky(gk.Denoiser):
    """A mixture per class: its own components, and a share of all others, all inflated."""

    means: jax.Array
    log_weights: jax.Array
    variance: jax.Array

    def __call__(self, x, sigma, cond=None):
        everything = jax.nn.logsumexp(self.log_weights, axis=0)
        label = jnp.asarray(-1 if cond is None else cond)
        prior = jnp.where(label < 0, everything, self.log_weights[jnp.maximum(label, 0)])
        total = self.variance + sigma**2
        shares = jax.nn.softmax(prior - jnp.sum((x - self.means) ** 2, axis=-1) / (2 * total))
        return shares @ (self.means + self.variance / total * (x - self.means))


CLASSES, PER_CLASS, STD = 6, 2, 0.18
MEANS = 0.7 * np.random.default_rng(0).normal(size=(CLASSES * PER_CLASS, 6))
LABELS = np.repeat(np.arange(CLASSES), PER_CLASS)


def leaky(share, inflation):
    own = LABELS[None] == np.arange(CLASSES)[:, None]
    weights = np.where(own, (1 - share) / PER_CLASS, share / (PER_CLASS * (CLASSES - 1)))
    return Leaky(jnp.asarray(MEANS), jnp.asarray(np.log(weights)), jnp.asarray(STD**2 * inflation))


def exact_classifier(x0):
    squares = jnp.sum((x0 - jnp.asarray(MEANS, x0.dtype)) ** 2, axis=-1)
    return jax.nn.logsumexp((-squares / (2 * STD**2)).reshape(CLASSES, PER_CLASS), axis=1)


@pytest.fixture(scope="module")
def bed():
    """Draws under a guidance: evaluations per draw, accuracy, and sliced distance to the truth, class by class."""
    n = 3000
    cond = np.arange(n) % CLASSES
    rng = np.random.default_rng(1)
    truth = MEANS[cond * PER_CLASS + (np.arange(n) // CLASSES) % PER_CLASS] + STD * rng.normal(size=(n, 6))
    table, strong = gd.ddim(gd.karras(32, 0.002, 80.0)), leaky(0.15, 1.3)

    def measure(guidance):
        sampler = gk.Sampler(table, guidance, plan="compact")
        draws = gk.sample(sampler, strong, n, key=jr.key(0), shape=(6,), cond=jnp.asarray(cond))
        accuracy = (np.asarray(jax.vmap(exact_classifier)(draws.value)).argmax(axis=1) == cond).mean()
        classes = [(draws.value[cond == c], jnp.asarray(truth[cond == c], jnp.float32)) for c in range(CLASSES)]
        distances = [gk.divergence.sliced_wasserstein(x, y, key=jr.key(1)) for x, y in classes]
        return float(draws.nfe.mean()), float(accuracy), float(np.mean(distances))

    return measure


@pytest.mark.slow
def test_gfcg_beats_cfg_of_equal_accuracy_at_half_the_passes(bed):
    # The classifier is exact on clean data; on the blurred predictions of high noise it is overconfident. The best cfg
    # by distance alone is as close as this, within the noise of the bed, but less accurate.
    passes, accuracy, distance = bed(gg.interval(gg.gfcg(exact_classifier, 5.0, skip_below=0.3), 0.0, 2.0))
    mild, strong = bed(gg.cfg(1.5)), bed(gg.cfg(2.0))
    assert passes <= 0.65 * strong[0] and accuracy > mild[1]
    assert accuracy > strong[1] - 0.01 and distance < strong[2]


@pytest.mark.slow
def test_weak_to_strong_reflection_beside_extrapolation(bed):
    # Compared whatever the outcome. Reflecting in every step is guidance of scale 2 to first order, which takes a third
    # fewer evaluations. Both improve on the model.
    weak = leaky(0.35, 2.0)
    plain, auto, mirrored = bed(None), bed(gg.autoguide(weak, 2.0)), bed(gg.reflect(weak))
    assert mirrored[1] > plain[1] + 0.05 and mirrored[2] < plain[2]
    assert auto[1] > plain[1] + 0.05 and auto[2] < plain[2]
    assert auto[0] == 64 < mirrored[0] == 94
