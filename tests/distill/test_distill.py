"""The verb: what it trains, what it reports, what it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from distill.helpers import student

import genkit as gk


NOISE = dist.LogUniform(0.2, 5.0)
gd = gk.divergence


class Net(eqx.Module):
    """A generator without a law in closed form."""

    mlp: eqx.nn.MLP

    def __init__(self, size, *, width=32, key):
        self.mlp = eqx.nn.MLP(2, size, width, 2, jax.nn.silu, key=key)

    def __call__(self, z, cond=None):
        return self.mlp(z)


def fake(size=2, labels=None, width=16):
    net = gk.nn.MLP((size,), width=width, depth=1, num_labels=labels, key=jr.key(9))
    return gk.diffusion.Preconditioned(net, sigma_data=2.0)


ANGLE = 2 * np.pi * np.arange(8) / 8
CENTERS = 4 * np.stack([np.cos(ANGLE), np.sin(ANGLE)], 1).astype(np.float32)


def ring_law(labels=None):
    return gk.diffusion.MixtureDenoiser(jnp.ones(8), jnp.asarray(CENTERS), jnp.asarray(0.16), labels=labels)


def quick(teacher=None, own=None, **options):
    options = {"noise_distribution": NOISE, "num_steps": 3, "batch_size": 16, "key": jr.key(0)} | options
    return gk.distill.distill(ring_law() if teacher is None else teacher, Net(2, key=jr.key(1)) if own is None else own,
                              **options)  # fmt: skip


@pytest.mark.slow
def test_the_learned_cycle_reports_and_repeats():
    features = ring_law(np.arange(8))
    net = gk.distill.Discriminator((2,), width=16, depth=1, num_labels=8, features=features, key=jr.key(2))
    options = {
        "divergence": gd.JensenShannon(), "ratio": gk.distill.DiscriminatorRatio(net, 0.1), "fake": fake(labels=8),
        "cond": jnp.arange(8), "fake_steps": 2, "ema": 0.9,
    }  # fmt: skip
    made = quick(ring_law(np.arange(8)), **options)
    again = quick(ring_law(np.arange(8)), **options)
    for name in (
        "divergence",
        "ess",
        "lag",
        "clipped",
        "mean_ratio",
        "de_bruijn",
        "critic/saturation",
        "critic/fake_mse",
    ):
        assert made.history[name].shape == (3,) and np.isfinite(made.history[name]).all(), name
        np.testing.assert_array_equal(made.history[name], again.history[name])
    assert eqx.tree_equal(made.student, again.student)
    before, after = Net(2, key=jr.key(1)), made.state.model
    assert not eqx.tree_equal(made.student, before) and not eqx.tree_equal(made.ema, made.student)
    assert not eqx.tree_equal(after.fake, fake(labels=8)) and not eqx.tree_equal(after.discriminator, net)
    assert eqx.tree_equal(after.teacher, ring_law(np.arange(8)))
    assert eqx.tree_equal(after.discriminator.features, features)
    assert made.state.opt is not None and int(made.state.step) == 3


@pytest.mark.slow
def test_a_network_teacher_is_its_own_first_fake_and_conditions_may_be_functions():
    teacher = fake(labels=3)
    own = gk.distill.FewStep(teacher, [3.0, 1.0])
    made = quick(teacher, own, cond=lambda key: jr.randint(key, (), 0, 3), num_steps=2)
    assert made.state.model.fake is not None and "lag" in made.history
    draws = gk.sample(gk.distill.StudentSampler(), made.student, 3, cond=1, key=jr.key(4))
    assert draws.value.shape == (3, 2) and draws.nfe.tolist() == [2, 2, 2]


@pytest.mark.slow
def test_the_recipe_is_the_same_work():
    recipe = gk.distill.recipe(
        ring_law(), Net(2, key=jr.key(1)), noise_distribution=NOISE, num_steps=3, batch_size=16, fake=fake()
    )
    fitted = gk.fit(recipe, key=jr.key(0))
    assert eqx.tree_equal(fitted.model.student, quick(fake=fake()).student)


def test_a_saturated_discriminator_is_flagged():
    net = Sure(jnp.asarray(0.0))
    with pytest.warns(UserWarning, match="saturated: 100 %"):
        quick(ratio=gk.distill.DiscriminatorRatio(net), divergence=gd.ForwardKL(), fake=fake(), num_steps=2)


def test_ratios_beyond_the_bound_are_flagged():
    far = student([400.0, 0.0], [1.0, 1.0])
    with pytest.warns(UserWarning, match="100 % of the log-ratios ended beyond"):
        quick(own=far, ratio=EXACT, divergence=gd.PearsonChi2(), noise_distribution=dist.Delta(0.0), num_steps=2)


def test_regression_on_a_pool_finds_the_exact_map():
    # The flow of N(m, s^2) takes x at noise level t to m + s (x - m) / sqrt(s^2 + t^2): pairs without any scatter.
    teacher = gk.diffusion.GaussianDenoiser(jnp.array([0.7]), 0.5**2)
    heun = gk.diffusion.heun(gk.diffusion.karras(60, 0.002, 80.0))
    pool = gk.distill.teacher_pool(teacher, heun, 500, key=jr.key(0))
    np.testing.assert_allclose(pool.x, 0.7 + 0.5 * (80 * pool.latents - 0.7) / np.hypot(0.5, 80), atol=0.01)
    pairs = gk.distill.PairRegression()
    made = gk.distill.distill(teacher, student(0.0, 1.0), loss=pairs, positives=pool, noise_distribution=NOISE,
                              num_steps=300, batch_size=64, key=jr.key(1))  # fmt: skip
    np.testing.assert_allclose([made.student.mean[0], jnp.exp(made.student.log_std[0])], [0.7, 0.5], atol=0.02)
    assert made.history["regression"][-1] < 1e-3 < made.history["regression"][0]


class Sure(eqx.Module):
    bias: jax.Array

    def __call__(self, x, sigma, cond=None):
        return self.bias + 20.0


class Plain(eqx.Module):
    """A denoiser that is neither analytic nor a network."""

    def __call__(self, x, sigma, cond=None):
        return x / (1 + sigma**2)


def disc(**options):
    return gk.distill.DiscriminatorRatio(Sure(jnp.asarray(0.0)), **options)


def labeled():
    return ring_law(np.arange(8))


def pair():
    return student([0.0, 0.0], [1.0, 1.0])


EXACT = gk.distill.ExactRatio()
WRONG = {
    "a weight without a ratio": (lambda: {"divergence": gd.JensenShannon(), "fake": fake()}, "ratio"),
    "total variation": (lambda: {"divergence": gd.TotalVariation(), "ratio": EXACT}, "smoothing"),
    "a part with a kink": (lambda: {"divergence": gd.ReverseKL() + gd.TotalVariation(), "ratio": EXACT}, "kink"),
    "a student of unknown law": (lambda: {"ratio": EXACT}, "denoiser"),
    "a teacher of unknown law": (
        lambda: {"teacher": Plain(), "own": student(0.0, 1.0), "latent_shape": (1,), "ratio": EXACT},
        "analytic",
    ),
    "no fake": (dict, "fake"),
    "no shape": (lambda: {"teacher": Plain(), "fake": fake()}, "latent_shape"),
    "a law of vectors": (
        lambda: {"noise_distribution": dist.Uniform(jnp.zeros(2), 1.0), "fake": fake()},
        "noise_distribution",
    ),
    "two losses": (lambda: {"loss": gk.distill.SDS(), "divergence": gd.ReverseKL()}, "loss"),
    "no discriminator": (lambda: {"loss": gk.distill.Adversarial()}, "DiscriminatorRatio"),
    "pairs without latents": (
        lambda: {"loss": gk.distill.PairRegression(), "positives": gk.distill.TeacherSamples(jnp.zeros((4, 2)))},
        "teacher_pool",
    ),
    "no steps": (lambda: {"num_steps": 0}, "num_steps"),
    "no fake steps": (lambda: {"fake_steps": 0, "fake": fake()}, "fake_steps"),
    "a guidance without a density": (
        lambda: {
            "guidance": gk.guidance.interval(gk.guidance.cfg(2.0), 0.1, 1.0),
            "cond": 1,
            "own": pair(),
            "teacher": labeled(),
            "ratio": EXACT,
        },
        "cfg",
    ),
    "positives of another law": (
        lambda: {
            "guidance": gk.guidance.cfg(2.0),
            "cond": 1,
            "teacher": labeled(),
            "ratio": disc(),
            "fake": fake(labels=8),
            "divergence": gd.ForwardKL(),
        },
        "positives",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    make, words = WRONG[case]
    options = make()
    with pytest.raises(ValueError, match=words):
        quick(options.pop("teacher", None), options.pop("own", None), **options)


def test_a_student_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"teacher's shape \(2,\); got shape \(3,\)"):
        quick(own=Net(3, key=jr.key(0)), fake=fake(3))


def test_wrong_kinds():
    with pytest.raises(TypeError, match="Guidance"):
        quick(guidance="strong", fake=fake())
    with pytest.raises(ValueError, match="descending"):
        gk.distill.FewStep(Plain(), [1.0, 2.0])
    with pytest.raises(ValueError, match="one entry"):
        gk.distill.TeacherSamples(jnp.zeros((3, 1)), jnp.arange(2))
    with pytest.raises(ValueError, match="latents"):
        gk.distill.TeacherSamples(jnp.zeros((3, 1)), None, jnp.zeros((2, 1)))
    for sampler in (gk.diffusion.ancestral(gk.diffusion.karras(3, 0.1, 2.0)), gk.distill.StudentSampler()):
        with pytest.raises(ValueError, match="sampler"):
            gk.distill.teacher_pool(ring_law(), sampler, 2, key=jr.key(0))
    with pytest.raises(ValueError, match="log_ratio"):
        gk.distill.divergence_from_scores(Plain(), Plain(), jnp.zeros((2, 1)), sigma_min=0.1, sigma_max=1.0,
                                          divergence=gd.ForwardKL(), key=jr.key(0))  # fmt: skip


@pytest.mark.slow
def test_no_critic_at_all_finds_all_modes_of_the_ring():
    made = gk.distill.distill(
        ring_law(), Net(2, width=64, key=jr.key(1)), divergence=gd.JensenShannon(),
        ratio=gk.distill.EmpiricalRatio(768),
        noise_distribution=dist.LogUniform(0.3, 5.0), weight=jnp.square, num_steps=1500, batch_size=256,
        optimizer=optax.adam(optax.cosine_decay_schedule(2e-3, 1500)), ema=0.995, key=jr.key(0),
    )  # fmt: skip
    x = gk.sample(gk.distill.StudentSampler(), made.ema, 4000, shape=(2,), key=jr.key(2)).value
    found = gk.distill.mode_coverage(x, CENTERS, radius=1.2)
    energy = float(gd.energy_distance(x[:2000], ring_law().sample(2000, key=jr.key(5))))
    assert int(found["covered"]) == 8 and float(found["tv"]) < 0.08 and energy < 0.05


@pytest.mark.long
@pytest.mark.parametrize("law", ["ring", "unbalanced"])
def test_learned_critics_beside_the_empirical_ratio(law):
    weights = np.ones(8) if law == "ring" else np.array([1, 1, 1, 1, 1, 1, 0.5, 0.2])
    teacher = gk.diffusion.MixtureDenoiser(jnp.asarray(weights), jnp.asarray(CENTERS), jnp.asarray(0.16))
    options = {
        "divergence": gd.JensenShannon(),
        "noise_distribution": dist.LogUniform(0.3, 5.0),
        "weight": jnp.square,
        "ema": 0.995,
        "num_steps": 2000,
        "optimizer": optax.adam(optax.cosine_decay_schedule(1e-3, 2000)),
    }
    net = gk.distill.Discriminator((2,), width=64, depth=2, sigma_data=3.0, key=jr.key(2))
    learned = {"ratio": gk.distill.DiscriminatorRatio(net), "fake": fake(width=64), "fake_steps": 5}
    fresh = teacher.sample(2000, key=jr.key(5))
    for name, more in {"empirical": {"ratio": gk.distill.EmpiricalRatio(768)}, "learned": learned}.items():
        made = gk.distill.distill(teacher, Net(2, width=64, key=jr.key(1)), key=jr.key(0), **options, **more)
        x = gk.sample(gk.distill.StudentSampler(), made.ema, 2000, shape=(2,), key=jr.key(3)).value
        found = gk.distill.mode_coverage(x, CENTERS, radius=1.2, weights=weights / weights.sum())
        energy = float(gd.energy_distance(x, fresh))
        report = {k: round(float(v), 4) for k, v in found.items() if k != "mass"} | {"energy": energy}
        print(law, name, report, {k: round(float(v[-100:].mean()), 3) for k, v in made.history.items()})  # noqa: T201
        assert found["tv"] < 0.12 and found["covered"] >= 7 and energy < 0.2, report
