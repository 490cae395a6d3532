"""The statistical helpers: each passes on the true law, fails on a planted bias, and keeps its error rate."""

import jax
import numpy as np
import pytest
import stats
from scipy.stats import binom, norm


N = 20_000


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def exponential(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=shape)


TRUE_LAWS = {
    "mean": lambda: stats.assert_mean(normal(0, N, 7) + 3, 3.0),
    "mean, known sd": lambda: stats.assert_mean(2 * normal(1, N), 0.0, sd=2.0),
    "mean, tree": lambda: stats.assert_mean(
        {"a": normal(2, N), "b": exponential(3, N, 2)}, {"a": 0.0, "b": np.ones(2)}
    ),
    "mean, skewed": lambda: stats.assert_mean(exponential(4, N, 50), 1.0),
    "mean, float32": lambda: stats.assert_mean(np.float32(normal(5, N)) + np.float32(1e4), 1e4),
    "variance": lambda: stats.assert_variance(exponential(6, N, 5), 1.0),
    "variance, gaussian": lambda: stats.assert_variance(3 * normal(7, 50, 4), 9.0, gaussian=True),
    "covariance": lambda: stats.assert_covariance(normal(8, N, 6), np.eye(6)),
    "distribution": lambda: stats.assert_distribution(normal(9, N, 3), norm.cdf),
    "distribution, atoms": lambda: stats.assert_distribution(
        np.random.default_rng(10).binomial(6, 0.3, N),
        lambda x: binom.cdf(x, 6, 0.3),
        cdf_left=lambda x: binom.cdf(x - 1, 6, 0.3),
    ),
    "frequencies": lambda: stats.assert_frequencies(np.random.default_rng(11).integers(0, 4, N), np.full(4, 0.25)),
    "frequencies, impossible value never drawn": lambda: stats.assert_frequencies(np.zeros(50, int), [1.0, 0.0]),
    "same mean": lambda: stats.assert_same_mean(exponential(12, N, 3), normal(13, N // 2, 3) + 1),
    "same variance": lambda: stats.assert_same_variance(exponential(14, N), normal(15, N)),
    "same distribution": lambda: stats.assert_same_distribution(normal(16, N, 2), normal(17, N // 2, 2)),
}

# The planted error is the smallest that the sample-size helpers promise to see with N draws.
SHIFT = 10.0 / np.sqrt(N)
PLANTED = {
    "mean": (lambda: stats.assert_mean(normal(0, N, 7) + 3 + 1.3 * SHIFT * np.eye(7)[2], 3.0), "mean of entry 2"),
    "mean, known sd": (lambda: stats.assert_mean(2 * normal(1, N) + 2 * SHIFT, 0.0, sd=2.0), "mean"),
    "mean, tree": (
        lambda: stats.assert_mean({"a": normal(2, N), "b": exponential(3, N, 2) + 1.2 * SHIFT}, {"a": 0.0, "b": 1.0}),
        "mean of entry",
    ),
    "mean, NaN": (lambda: stats.assert_mean(np.where(np.arange(N) == 7, np.nan, normal(5, N)), 0.0), "nan"),
    "mean, constant": (lambda: stats.assert_mean(np.full(100, 1.001), 1.0), "mean"),
    "mean, dependent draws": (lambda: stats.assert_mean(normal(4, N) + SHIFT, 0.0, ess=1.2 * N), "mean"),
    "variance": (lambda: stats.assert_variance(1.15 * exponential(6, N), 1.0), "variance"),
    "variance, gaussian": (lambda: stats.assert_variance(1.06 * normal(7, N), 1.0, gaussian=True), "variance"),
    "variance, too small": (lambda: stats.assert_variance(0.94 * normal(7, N), 1.0, gaussian=True), "variance"),
    "covariance": (
        lambda: stats.assert_covariance(normal(8, N, 3) + 0.3 * normal(18, N, 1), np.eye(3)),
        "covariance of entry",
    ),
    "distribution": (lambda: stats.assert_distribution(normal(9, N) + 0.2, norm.cdf), "Kolmogorov"),
    "distribution, NaN": (lambda: stats.assert_distribution(np.append(normal(9, N), np.nan), norm.cdf), "nan"),
    "distribution, same moments": (
        lambda: stats.assert_distribution(np.sign(normal(9, N)), norm.cdf, detects=0.1),
        "Kolmogorov",
    ),
    "frequencies": (
        lambda: stats.assert_frequencies(np.random.default_rng(11).integers(0, 4, N), [0.27, 0.23, 0.25, 0.25]),
        "frequency of",
    ),
    "frequencies, impossible value": (lambda: stats.assert_frequencies([0, 0, 1], [1.0, 0.0]), "frequency of"),
    "same mean": (lambda: stats.assert_same_mean(normal(12, N), normal(13, N) + 1.5 * SHIFT), "difference of means"),
    "same variance": (lambda: stats.assert_same_variance(1.1 * normal(14, N), normal(15, N)), "difference"),
    "same distribution": (lambda: stats.assert_same_distribution(normal(16, N), normal(17, N) + 0.2), "Kolmogorov"),
}


@pytest.mark.parametrize("name", TRUE_LAWS)
def test_true_law_passes(name):
    TRUE_LAWS[name]()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bias_is_caught(name):
    run, message = PLANTED[name]
    with pytest.raises(AssertionError, match=message):
        run()


def test_every_assertion_has_a_planted_bias():
    assertions = {name for name in dir(stats) if name.startswith("assert_")}
    tested = {"assert_" + name.split(",")[0].replace(" ", "_") for name in PLANTED}
    assert assertions == tested


@pytest.mark.parametrize(
    "alarm",
    [
        lambda x, y: stats.assert_mean(x, 0.0, error=0.1),
        lambda x, y: stats.assert_mean(x, 0.0, sd=1.0, error=0.1),
        lambda x, y: stats.assert_variance(x, 1.0, gaussian=True, error=0.1),
        lambda x, y: stats.assert_covariance(x, np.eye(3), error=0.1),
        lambda x, y: stats.assert_distribution(x, norm.cdf, error=0.1),
        lambda x, y: stats.assert_same_mean(x, y, error=0.1),
        lambda x, y: stats.assert_same_distribution(x, y, error=0.1),
        lambda x, y: stats.assert_frequencies((x > 0).ravel(), [0.5, 0.5], error=0.1),
    ],
)
def test_false_alarms_stay_below_the_stated_error(alarm):
    # At a loosened error of 0.1 the number of alarms in 400 families is below the binomial's upper 1e-6 quantile.
    replications, alarms = 400, 0
    for seed in range(replications):
        try:
            alarm(normal(1000 + seed, 400, 3), normal(9000 + seed, 400, 3))
        except AssertionError:
            alarms += 1
    assert alarms <= binom.isf(stats.FAMILY_ERROR, replications, 0.1)


def test_sample_sizes_have_the_promised_power():
    # At a loosened error of 0.05 an error of the stated size is missed in about 5 % of the replications at most.
    error, delta, replications = 0.05, 0.1, 400
    limit = binom.isf(stats.FAMILY_ERROR, replications, error)
    missed = {"mean": 0, "variance": 0, "distribution": 0}
    for seed in range(replications):
        for kind in missed:
            if kind == "mean":
                x = normal(seed, stats.sample_size(delta, 1.0, error=error)) + delta
                run = lambda x=x: stats.assert_mean(x, 0.0, error=error)
            elif kind == "variance":
                x = np.sqrt(1 + delta) * normal(seed, stats.sample_size_variance(delta, error=error))
                run = lambda x=x: stats.assert_variance(x, 1.0, error=error)
            else:
                shift = 2 * norm.isf((1 - delta) / 2)  # two unit normals this far apart have Kolmogorov distance delta
                x = normal(seed, stats.sample_size_distribution(delta, error=error)) + shift
                run = lambda x=x: stats.assert_distribution(x, norm.cdf, error=error)
            try:
                run()
                missed[kind] += 1
            except AssertionError:
                pass
    assert max(missed.values()) <= limit, missed


def test_published_constants():
    assert stats.z_score() == pytest.approx(4.8916, abs=1e-3)
    assert stats.z_score(100) == pytest.approx(5.73, abs=1e-2)
    assert stats.dkw_band(100_000) == pytest.approx(0.0085, abs=1e-4)
    assert stats.sample_size(1.0, 1.0) == pytest.approx(93, abs=1)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="take at least"):
        stats.assert_mean(normal(0, 100), 0.0, detects=0.1)
    with pytest.raises(ValueError, match="take at least"):
        stats.assert_variance(normal(0, 100), 1.0, detects=0.1)
    with pytest.raises(ValueError, match="take at least"):
        stats.assert_distribution(normal(0, 100), norm.cdf, detects=0.1)
    stats.assert_mean(normal(0, stats.sample_size(0.1, 1.1)), 0.0, detects=0.1)


def test_wrong_samples_are_refused():
    with pytest.raises(ValueError, match="scalar"):
        stats.assert_mean(1.0, 0.0)
    with pytest.raises(ValueError, match="share a sample axis"):
        stats.assert_mean({"a": np.zeros(3), "b": np.zeros(4)}, 0.0)
    with pytest.raises(ValueError, match="expected a tree like"):
        stats.assert_mean({"a": np.zeros(3), "b": np.zeros(3), "c": np.zeros(3)}, {"a": 0.0, "b": 0.0})


def test_jax_arrays_are_accepted():
    x = jax.random.normal(jax.random.key(0), (N, 2))
    stats.assert_mean(x, jax.numpy.zeros(2))
    stats.assert_distribution(x, norm.cdf)
