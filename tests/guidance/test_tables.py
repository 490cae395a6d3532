"""The exact tables: Gaussian pairs, the public mixture PUB-4, the leaky bed.

The tables that the tests judge by are logged: run with `-o log_cli=true -o log_cli_level=INFO`.
"""

import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


gd, gg = gk.diffusion, gk.guidance
LOG = logging.getLogger(__name__)
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
    inside = gg.interval(gg.apg(4.0, norm_rms=0.5, momentum=-0.5) + gg.negative(1.5, 2), 0.05, 5.0)
    guidance = gg.rescale(inside, 0.3)
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
    # The table decides evaluation by evaluation.
    "interval": (
        lambda: gg.interval(gg.cfg(3.0), 0.1, 1.0, per="evaluation"),
        (1.291, 0.150, 0.380, 0.173),
        159,
    ),
    # By steps, as in the code of the authors: numbers of an independent program in numpy (20,000 draws).
    "interval by steps": (lambda: gg.interval(gg.cfg(3.0), 0.1, 1.0), (1.283, 0.152, 0.381, 0.173), 159),
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
    LOG.info("%s: mean %.3f, std %.3f, across %.3f", name, x[:, 0].mean(), x[:, 0].std(), x[:, 1].std())
    found = (x[:, 0].mean(), x[:, 0].std(), x[:, 1].std(), np.sqrt((x[:, 2:] ** 2).mean()))
    # Two samples of 40,000: the error of the difference is at most .404 * sqrt(2 / 40000) = .003.
    np.testing.assert_allclose(found, expected, atol=0.005)
    assert draws.nfe.tolist() == [passes] * n


# D4: a random mixture, four classes of three components in eight dimensions, at a scale of 8.

D4 = {  # norm beside the data, components of three that are alive, sliced distance; of another mixture of the same kind
    "cond": (None, (0.97, 3.00, 0.046)),
    "cfg": (lambda: gg.cfg(8.0), (1.447, 2.04, 0.451)),
    "apg": (lambda: gg.apg(8.0), (0.935, 2.53, 0.239)),
    "apg r": (lambda: gg.apg(8.0, norm_threshold=0.5), (0.937, 2.77, 0.166)),
    "apg r b": (lambda: gg.apg(8.0, norm_threshold=0.5, momentum=-0.5), (0.941, 2.84, 0.139)),
    "interval": (lambda: gg.interval(gg.cfg(8.0), 0.2, 1.5), (1.18, 2.81, 0.207)),
    "rescale": (lambda: gg.rescale(gg.cfg(8.0), 0.7), (1.18, 2.64, 0.237)),
    "mambo": (
        lambda: gg.Direction(gg.Slot("uncond", cond="null"), gg.ExponentialDamping(8.0), 8.0),
        (1.00, 2.99, 0.054),
    ),
}


@pytest.mark.slow
def test_random_mixture():
    n, cond = 1200, np.arange(1200) % 4
    means = np.random.default_rng(0).normal(size=(12, 8))
    law = gd.MixtureDenoiser(jnp.ones(12), jnp.asarray(means), jnp.asarray(0.09), labels=np.repeat(np.arange(4), 3))
    table = gd.ddim(gd.karras(32, 0.002, 80.0))
    truth = means[3 * cond + np.arange(n) // 4 % 3] + 0.3 * np.random.default_rng(1).normal(size=(n, 8))
    found = {}
    for name, (guidance, expected) in D4.items():
        made = None if guidance is None else guidance()
        x = np.asarray(gk.sample(table, law, n, key=jr.key(0), cond=jnp.asarray(cond), guidance=made).value)
        nearest = np.linalg.norm(x[:, None] - means, axis=2).argmin(axis=1)
        shares = [[(nearest[cond == c] == 3 * c + k).mean() for k in range(3)] for c in range(4)]
        apart = gk.divergence.sliced_wasserstein(jnp.asarray(x), jnp.asarray(truth, x.dtype), key=jr.key(1))
        norm = np.linalg.norm(x, axis=1).mean() / np.linalg.norm(truth, axis=1).mean()
        found[name] = norm, (np.asarray(shares) > 0.05).sum() / 4, float(apart)
        LOG.info("%-8s %.3f %.2f %.3f of %s", name, *found[name], expected)
        assert norm == pytest.approx(expected[0], abs=0.15), name
    norm, alive, apart = ({name: row[k] for name, row in found.items()} for k in range(3))
    assert norm["apg"] < 1.05 < norm["interval"] < norm["cfg"] and norm["rescale"] < norm["cfg"]
    assert alive["cfg"] < alive["apg"] <= alive["apg r"] <= alive["apg r b"] <= alive["cond"] == 3
    for name in ("apg", "interval", "rescale"):
        assert apart["cond"] < apart[name] < apart["cfg"]
    assert apart["mambo"] < apart["apg r b"], "guidance nearly off"
    assert apart["cfg"] > apart["apg"] > apart["apg r"] > apart["apg r b"]


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
LABELS = np.repeat(np.arange(CLASSES), PER_CLASS)
COND = np.arange(3000) % CLASSES
SCALES = (1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)


class Classifier(eqx.Module):
    """Exact for clean data."""

    means: jax.Array

    def __call__(self, x0):
        squares = jnp.sum((x0 - self.means.astype(x0.dtype)) ** 2, axis=-1)
        return jax.nn.logsumexp((-squares / (2 * STD**2)).reshape(CLASSES, PER_CLASS), axis=1)


class Bed:
    """A leaky model and a leakier one of classes at random places, and judges that know the truth."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.means = rng.normal(size=(CLASSES * PER_CLASS, 6))
        n = len(COND)
        components = COND * PER_CLASS + (np.arange(n) // CLASSES) % PER_CLASS
        self.truth = self.means[components] + STD * rng.normal(size=(n, 6))
        self.classifier = Classifier(jnp.asarray(self.means))
        self.strong, self.weak = self.leaky(0.15, 1.3), self.leaky(0.35, 2.0)

    def leaky(self, share, inflation):
        own = LABELS[None] == np.arange(CLASSES)[:, None]
        weights = np.where(own, (1 - share) / PER_CLASS, share / (PER_CLASS * (CLASSES - 1)))
        return Leaky(jnp.asarray(self.means), jnp.asarray(np.log(weights)), jnp.asarray(STD**2 * inflation))

    def measure(self, name, guidance, num_steps=32, skip="dynamic"):
        """Evaluations per draw, accuracy, and sliced distance to the truth, class by class."""
        sampler = gk.Sampler(gd.ddim(gd.karras(num_steps, 0.002, 80.0)), guidance, skip=skip)
        draws = gk.sample(sampler, self.strong, len(COND), key=jr.key(0), shape=(6,), cond=jnp.asarray(COND))
        accuracy = (np.asarray(jax.vmap(self.classifier)(draws.value)).argmax(axis=1) == COND).mean()
        classes = [(draws.value[c == COND], jnp.asarray(self.truth[c == COND], jnp.float32)) for c in range(CLASSES)]
        distances = [gk.divergence.sliced_wasserstein(x, y, key=jr.key(1)) for x, y in classes]
        row = float(draws.nfe.mean()), float(accuracy), float(np.mean(distances))
        LOG.info("%-24s passes %5.1f  accuracy %.3f  distance %.3f", name, *row)
        return row


@pytest.fixture(scope="module")
def beds():
    """Beds on which nothing was tuned."""
    return [Bed(seed) for seed in (20, 21, 22)]


def tuned_gfcg(classifier):
    """Tuned on beds 10, 11 and 12.

    The temperature makes the classifier, which is exact on clean data and sure of itself on blurred predictions, about
    as sure as the model.
    """
    confused = gg.gfcg(classifier, 20.0, "odds", skip_below=0.1, temperature=15.0)
    return gg.interval(gg.cfg(1.2), 0.1, 3.5) + gg.interval(confused, 0.2, 1.8)


@pytest.fixture(scope="module")
def judged(beds):
    """For each bed the best cfg, by distance, and gfcg."""
    rows = []
    for bed in beds:
        plain = [bed.measure(f"cfg({w})", gg.cfg(w)) for w in SCALES]
        guided = bed.measure("gfcg", tuned_gfcg(bed.classifier), skip="compact")
        rows.append((min(plain, key=lambda row: row[2]), guided))
    return rows


@pytest.mark.slow
def test_gfcg_beats_the_best_cfg_at_no_more_passes(judged):
    # Accuracy on every bed, distance on the whole.
    for best, guided in judged:
        assert guided[0] <= best[0] == 64 and guided[1] > best[1]
    best, guided = np.asarray(judged).mean(axis=0)
    LOG.info("means: best cfg %s, gfcg %s", best.round(3), guided.round(3))
    assert guided[1] > best[1] and guided[2] < best[2]


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="distances .159 .127 .215 beside .201 .165 .207: the last bed is lost")
def test_gfcg_beats_the_best_cfg_on_every_bed(judged):
    for best, guided in judged:
        assert guided[2] < best[2]


@pytest.mark.slow
def test_weak_to_strong_reflection_beside_extrapolation(beds):
    # At equal passes, whatever the outcome: reflecting in every step is guidance of scale 2 to first order, but takes
    # three evaluations where that takes two. Both improve on the model.
    for bed in beds:
        alone = bed.measure("alone, 64 steps", None, 64)
        extrapolated = bed.measure("autoguide(weak, 2)", gg.autoguide(bed.weak, 2.0))
        mirrored = bed.measure("reflect(weak), 22 steps", gg.reflect(bed.weak), 22)
        assert alone[0] == extrapolated[0] == mirrored[0] == 64
        for accuracy, distance in (extrapolated[1:], mirrored[1:]):
            assert accuracy > alone[1] + 0.05 and distance < alone[2]
