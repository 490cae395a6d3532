"""Distances between samples: closed forms, independent double loops, gradients, memory, wrong input."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from scipy.spatial.distance import cdist

import genkit as gk
from genkit.divergence import _pairs


v = gk.divergence
SIZES = [(1, 1), (7, 7), (5, 9), (40, 13)]


def samples(n, m, shape=(3,), seed=0):
    random = np.random.RandomState(seed)
    return random.randn(n, *shape), 0.7 * random.randn(m, *shape) + 0.4


def flat(x):
    return x.reshape(len(x), -1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shape", [(3,), (), (1, 2, 2)])
def test_energy_distance_against_scipy(sizes, shape, x64):
    x, y = samples(*sizes, shape)
    a, b = flat(x), flat(y)
    want = 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()
    np.testing.assert_allclose(v.energy_distance(x, y), want, rtol=1e-12, atol=1e-14)


def test_energy_distance_in_one_dimension(x64):
    # Twice the integral of the squared difference of the distribution functions; SciPy's is its root.
    x, y = samples(30, 17, ())
    np.testing.assert_allclose(v.energy_distance(x, y), scipy.stats.energy_distance(x, y) ** 2, rtol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_mmd_and_cauchy_schwarz_against_sums(sizes, x64):
    x, y = samples(*sizes)

    def gram(a, b, variance):
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * variance))

    want = gram(x, x, 0.64).mean() + gram(y, y, 0.64).mean() - 2 * gram(x, y, 0.64).mean()
    np.testing.assert_allclose(v.mmd(x, y, bandwidth=0.8), want, rtol=1e-10, atol=1e-14)
    kde = [np.log(gram(a, b, 2 * 0.64).mean()) for a, b in ((x, x), (y, y), (x, y))]
    np.testing.assert_allclose(v.cauchy_schwarz(x, y, 0.8), kde[0] + kde[1] - 2 * kde[2], rtol=1e-10, atol=1e-14)


def test_cauchy_schwarz_is_the_integral_of_the_densities(x64):
    x, y = samples(6, 9, ())
    grid = np.linspace(-12, 12, 20_001)
    p, q = (scipy.stats.norm(s[:, None], 0.5).pdf(grid).mean(0) for s in (x, y))
    integral = lambda f: np.trapezoid(f, grid)
    want = -2 * np.log(integral(p * q)) + np.log(integral(p * p)) + np.log(integral(q * q))
    np.testing.assert_allclose(v.cauchy_schwarz(x, y, 0.5), want, rtol=1e-10)
    # Far apart the overlap underflows; its logarithm does not.
    assert np.isfinite(float(v.cauchy_schwarz(x, y + 1e4, 0.5)))


@pytest.mark.parametrize("name", ["energy_distance", "mmd", "cauchy_schwarz"])
def test_zero_for_equal_samples_positive_else(name):
    call = {
        "energy_distance": v.energy_distance,
        "mmd": lambda x, y: v.mmd(x, y, bandwidth=1.0),
        "cauchy_schwarz": lambda x, y: v.cauchy_schwarz(x, y, 1.0),
    }[name]
    x, y = (jnp.asarray(s, jnp.float32) for s in samples(20, 20))
    np.testing.assert_allclose(call(x, x), 0.0, atol=1e-6)
    assert float(call(x, y)) > 1e-3
    np.testing.assert_allclose(call(x, y), call(y, x), rtol=1e-5)


def test_gradients_match_finite_differences(x64):
    x, y = samples(6, 8)
    h = 1e-6
    for call in (
        v.energy_distance,
        lambda x, y: v.mmd(x, y, bandwidth=0.7),
        lambda x, y: v.cauchy_schwarz(x, y, 0.7),
        lambda x, y: v.sliced_wasserstein(x, y, key=jr.key(0), num_slices=16),
        lambda x, y: v.sinkhorn_divergence(x, y, 0.2, tolerance=1e-12),
    ):
        slope = np.asarray(jax.grad(call)(jnp.asarray(x), y))
        for i, j in ((0, 0), (5, 2)):
            shift = np.zeros_like(x)
            shift[i, j] = h
            difference = (call(x + shift, y) - call(x - shift, y)) / (2 * h)
            np.testing.assert_allclose(slope[i, j], difference, rtol=1e-5, atol=1e-8)


def test_blocks_do_not_change_the_result(monkeypatch):
    x, y = (jnp.asarray(s, jnp.float32) for s in samples(50, 31))
    whole = float(v.energy_distance(x, y))
    monkeypatch.setattr(_pairs, "_BLOCK", 7 * 31 * 3)  # seven rows at a time, the last block smaller
    jax.clear_caches()
    np.testing.assert_allclose(v.energy_distance(x, y), whole, rtol=1e-5)
    jax.clear_caches()


def test_memory_is_bounded():
    # 20,000 by 20,000 distances would be 1.6 GB in float32; the program may use a hundredth of that.
    x = jnp.zeros((20_000, 3))
    for program in (
        jax.jit(lambda x: v.energy_distance(x, x)),
        jax.jit(jax.grad(lambda x: v.mmd(x, 2 * x, bandwidth=1.0))),
        jax.jit(lambda x: v.precision_recall(x, 2 * x)),
    ):
        memory = program.lower(x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2**27


def test_memory_of_sliced_wasserstein_does_not_grow_with_the_slices():
    # 128 projections of two samples of a million would be a gigabyte, and their sorts several.
    x = jnp.zeros((1_000_000, 2))
    program = jax.jit(lambda x: v.sliced_wasserstein(x, 2 * x, key=jr.key(0), num_slices=128))
    assert program.lower(x).compile().memory_analysis().temp_size_in_bytes < 2**28


def test_calls_with_other_values_do_not_compile(compilations):
    x, y = (jnp.asarray(s, jnp.float32) for s in samples(12, 9))
    z = x + y[:1]

    def everything(x, y, width):
        v.energy_distance(x, y)
        v.mmd(x, y, bandwidth=width)
        v.cauchy_schwarz(x, y, width)
        v.sliced_wasserstein(x, y, key=jr.key(0), num_slices=8)
        v.sinkhorn_divergence(x, y, width)
        v.precision_recall(x, y)
        v.nearest_distance_ratio(x, y, y + 1.0)

    everything(x, y, 0.5)
    with compilations() as count:
        everything(z, y, 0.6)
    assert count() == 0


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("sizes", [(8, 8), (5, 9), (1, 6), (12, 18)])
def test_one_dimensional_wasserstein(sizes, order, x64):
    x, y = samples(*sizes, ())
    got = v.sliced_wasserstein(x, y, key=jr.key(0), num_slices=3, p=order)
    # Independent: both quantile functions on a grid that has every step of both.
    u = (np.arange(sizes[0] * sizes[1]) + 0.5) / (sizes[0] * sizes[1])
    quantile = lambda s: np.sort(s)[np.floor(u * len(s)).astype(int)]
    want = np.mean(np.abs(quantile(x) - quantile(y)) ** order) ** (1 / order)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    if order == 1.0:
        np.testing.assert_allclose(got, scipy.stats.wasserstein_distance(x, y), rtol=1e-12)


def test_sliced_wasserstein_of_a_shift(x64):
    # Along every direction the distance is |theta . shift|, of mean square |shift|^2 / d.
    x, _ = samples(50, 1, (3,))
    shift = np.array([1.0, -2.0, 0.5])
    num_slices = 20_000
    got = float(v.sliced_wasserstein(x, x + shift, key=jr.key(0), num_slices=num_slices))
    mean = (shift**2).sum() / 3
    sd = np.sqrt((shift**2).sum() ** 2 * (3 / 15 - 1 / 9))  # E[theta_1^4] = 3/15 on the sphere in space
    assert abs(got**2 - mean) < scipy.stats.norm.isf(5e-7) * sd / np.sqrt(num_slices)
    assert float(v.sliced_wasserstein(x, x, key=jr.key(0))) == 0.0
    slope = jax.grad(lambda y: v.sliced_wasserstein(x, y, key=jr.key(0)))(jnp.asarray(x))
    assert np.all(np.isfinite(slope))


def brute_precision(real, fake, k):
    reach = [np.sort(np.delete(np.linalg.norm(real - r, axis=1), i))[k - 1] for i, r in enumerate(real)]
    return np.mean([(np.linalg.norm(real - f, axis=1) <= reach).any() for f in fake])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_against_a_double_loop(k):
    real, fake = samples(60, 45, (1, 2, 2))
    got = v.precision_recall(real, fake, k=k)
    want = brute_precision(flat(real), flat(fake), k), brute_precision(flat(fake), flat(real), k)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert 0 < want[1] < 1


def test_precision_and_recall_at_the_ends():
    real = np.random.RandomState(0).randn(30, 2)
    assert [float(s) for s in v.precision_recall(real, real)] == [1.0, 1.0]
    assert [float(s) for s in v.precision_recall(real, real + 1e3)] == [0.0, 0.0]
    doubled = np.concatenate([real, real])  # a point's own copy is a neighbor like any other
    np.testing.assert_allclose(v.precision_recall(doubled, real, k=1)[0], brute_precision(doubled, real, 1))


def test_nearest_distance_ratio_against_scipy():
    samples_, train = samples(20, 50)
    test = samples(1, 30, seed=1)[1]
    want = cdist(samples_, train).min(1).mean() / cdist(test, train).min(1).mean()
    np.testing.assert_allclose(v.nearest_distance_ratio(samples_, train, test), want, rtol=1e-5)
    assert float(v.nearest_distance_ratio(train, train, test)) == 0.0


X = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _pairs.as_samples(x=X, y=np.zeros((4, 3))), "`y` must be of examples like those of `x`"),
        (lambda: v.energy_distance(np.zeros((0, 2), np.float32), X), "`x` must be of shape .n, .shape., n at least 1"),
        (lambda: v.energy_distance(X, X + np.nan), "`y` must be finite; got 8 NaN or infinite of 8 entries"),
        (lambda: v.mmd(X, X, bandwidth=0.0), "`bandwidth` must be positive"),
        (lambda: v.cauchy_schwarz(X, X, -1.0), "`bandwidth` must be positive"),
        (lambda: v.sliced_wasserstein(X, X, key=jr.key(0), p=0.5), "`p` must be in"),
        (lambda: v.sliced_wasserstein(X, X, key=jr.key(0), num_slices=0), "`num_slices` must be an integer >= 1"),
        (lambda: v.precision_recall(X, X, k=4), "`real` must be more than `k` = 4 examples"),
        (lambda: v.precision_recall(X, X[:3], k=3), "`fake` must be more than `k` = 3 examples"),
        (lambda: v.precision_recall(X, X, k=0), "`k` must be an integer >= 1"),
        (lambda: v.nearest_distance_ratio(X, X, X * np.inf), "`test` must be finite"),
        (lambda: v.sinkhorn_divergence(X, X, 0.0), "`epsilon` must be positive"),
    ],
)
def test_wrong_input(call, words):
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_units_of_the_data_do_not_overflow(scale):
    x, y = (np.float32(s) for s in samples(12, 9))
    wide = [np.float32(scale) * s for s in (x, y)]
    for call in (v.energy_distance, lambda x, y: v.sliced_wasserstein(x, y, key=jr.key(0), num_slices=8)):
        np.testing.assert_allclose(call(*wide) / scale, call(x, y), rtol=1e-5)
    np.testing.assert_allclose(v.cauchy_schwarz(*wide, scale), v.cauchy_schwarz(x, y, 1.0), rtol=1e-4)
    np.testing.assert_allclose(v.mmd(*wide, bandwidth=scale), v.mmd(x, y, bandwidth=1.0), rtol=1e-4)
    assert [float(s) for s in v.precision_recall(*wide)] == [float(s) for s in v.precision_recall(x, y)]


def test_bandwidths_far_from_the_data():
    x, y = (np.float32(1e25) * np.float32(s) for s in samples(12, 9))
    np.testing.assert_allclose(v.mmd(x, y, bandwidth=1.0), 1 / 12 + 1 / 9, rtol=1e-5)
    assert float(v.cauchy_schwarz(x, y, 1.0)) == np.inf


@pytest.mark.parametrize("dtype", [np.int32, np.float16, bool])
def test_integers_and_half_precision_are_floats(dtype):
    x, y = (np.abs(s * 2).astype(dtype) for s in samples(12, 9))
    for call in (
        v.energy_distance,
        lambda x, y: v.mmd(x, y, bandwidth=0.5),
        lambda x, y: v.cauchy_schwarz(x, y, 0.5),
        lambda x, y: v.sliced_wasserstein(x, y, key=jr.key(0), num_slices=8, p=1.5),
        lambda x, y: v.sinkhorn_divergence(x, y, 0.5),
    ):
        np.testing.assert_allclose(call(x, y), call(np.float32(x), np.float32(y)), rtol=1e-6)
