"""Inputs that people really have: integers, half precision, empty batches, NaN."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest

import genkit as gk


NORMAL = gk.diffusion.GaussianDenoiser(jnp.zeros(2), 1.0)
SHIFTED = gk.diffusion.GaussianDenoiser(jnp.ones(2), 1.0)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_numbers_are_not_cast_to_the_dtype_of_the_data(dtype):
    x = np.array([[1, 4], [3, 0], [2, 2], [9, 5]]).astype(dtype)
    few_steps = gk.distill.FewStep(NORMAL, [2.0, 0.5])
    model = gk.distill.ConsistencyModel(lambda x, t, cond: 0.3 * x, 0.5, 0.5)
    objective = gk.distill.ConsistencyObjective(np.array([2.0, 1.0, 0.5]), "l2")
    network = gk.distill.Discriminator((2,), width=4, depth=1, features=NORMAL, key=jr.key(0))
    calls = {
        "one step": lambda x: gk.distill.OneStep(NORMAL, 0.5)(x[0]),
        "few steps": lambda x: few_steps(x[:2]),
        "rollout": lambda x: few_steps.rollout(x[:2], None, jnp.asarray(1)),
        "consistency": lambda x: objective(gk.distill.Pair(model), (x, None), key=jr.key(0))[0],
        "discriminator": lambda x: network(x[0], 0.5),
        "ratio": lambda x: gk.distill.ScoreRatio(20.0).log_ratio(NORMAL, SHIFTED, x[0], 0.5),
        "fdpg": lambda x: gk.distill.fdpg(x[:, 0], 0.5 * np.arange(4), divergence=gk.divergence.JensenShannon()),
        "coverage": lambda x: gk.distill.mode_coverage(x, x[:2], radius=1.5)["precision"],
        "scores": lambda x: gk.distill.divergence_from_scores(
            NORMAL, SHIFTED, x, sigma_min=0.01, sigma_max=50.0, key=jr.key(0)
        ),
    }
    for name, call in calls.items():
        np.testing.assert_allclose(call(x), call(np.float32(x)), rtol=1e-5, err_msg=name)


NOTHING = np.zeros((0, 2), np.float32)
LOST = np.array([0.0, np.nan, 0.0], np.float32)
ZEROS = np.zeros(3, np.float32)


def student_loss(cond):
    model = gk.distill.Distillation(gk.distill.OneStep(NORMAL, 3.0), NORMAL)
    return gk.distill.StudentObjective(gk.distill.SDS(), dist.Uniform(0.5, 2.0), None, 8, (2,))(
        model, cond, key=jr.key(0)
    )


def consistency_loss(x):
    pair = gk.distill.Pair(gk.distill.ConsistencyModel(lambda x, t, cond: x))
    return gk.distill.ConsistencyObjective(np.array([2.0, 1.0]))(pair, (x, None), key=jr.key(0))


def fdpg(policy, target, divergence=None, **options):
    return gk.distill.fdpg(policy, target, divergence=divergence or gk.divergence.ReverseKL(), **options)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: student_loss(np.zeros(0, int)), "`batch` must be `batch_size` = 8 conditions"),
        (lambda: consistency_loss(NOTHING), "`batch` must be at least one example"),
        (lambda: gk.distill.Conditions(np.zeros(0, int), 4), "`cond` must be at least one condition"),
        (lambda: gk.distill.TeacherSamples(NOTHING), "`x` must be draws"),
        (lambda: gk.distill.TeacherSamples(LOST), "`x` must be finite"),
        (lambda: fdpg(NOTHING[:, 0], NOTHING[:, 0]), "at least one draw"),
        (lambda: fdpg(LOST, ZEROS), "`policy_log_prob` must be finite"),
        (lambda: fdpg(ZEROS, LOST), "`target_log_prob` must be in"),
        (lambda: fdpg(ZEROS, ZEROS, proposal_log_prob=LOST), "`proposal_log_prob` must be finite"),
        (lambda: fdpg(ZEROS, ZEROS, log_z=np.nan), "`log_z` must be finite"),
        (lambda: fdpg(ZEROS, np.array([-np.inf, 0.0, 0.0], np.float32)), "gives a draw no probability"),
        (lambda: gk.distill.mode_coverage(LOST[:, None], ZEROS[:, None], radius=1.0), "`samples` must be finite"),
        (lambda: gk.distill.mode_coverage(NOTHING, NOTHING, radius=1.0), "n at least 1"),
        (lambda: gk.divergence.diagnose(LOST, ZEROS), "`u` must be in"),
        (lambda: gk.divergence.self_normalize(LOST), "`u` must be in"),
        (lambda: gk.divergence.JensenShannon().value(NOTHING[:, 0], NOTHING[:, 0]), "at least one draw"),
    ],
)
def test_nothing_and_nan_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_target_may_forbid_draws():
    """P = 0 at one of three draws of a uniform policy: f(0)/3 + 2 f(3/2)/3 where Z = 2/3."""
    target = jnp.array([-jnp.inf, 0.0, 0.0])
    forward = np.log(1.5)
    np.testing.assert_allclose(fdpg(jnp.zeros(3), target, gk.divergence.ForwardKL()), forward, rtol=1e-5)
    f = lambda r: r * np.log(r) - (r + 1) * np.log((r + 1) / 2)
    shannon = (np.log(2.0) + 2 * f(1.5)) / 3
    np.testing.assert_allclose(fdpg(jnp.zeros(3), target, gk.divergence.JensenShannon()), shannon, rtol=1e-5)
    slope = jax.grad(lambda policy: fdpg(policy, target, gk.divergence.ForwardKL()))(jnp.zeros(3))
    np.testing.assert_allclose(slope, [1 / 3, -1 / 6, -1 / 6], rtol=1e-5)


def test_large_log_ratios_of_jensen_shannon_are_infinite_and_not_nan():
    u = jnp.array([-jnp.inf, 20.0, 200.0])
    got = gk.divergence.JensenShannon().phi(u)
    np.testing.assert_allclose(got[:2], [np.log(2.0), np.exp(20.0) * np.log(2.0) - (20.0 + 1 - np.log(2.0))], rtol=1e-6)
    assert got[2] == np.inf
