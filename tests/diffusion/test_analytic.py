"""Analytic denoisers against linear algebra, quadrature and Tweedie's formula, at every noise level."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats
from stats import assert_covariance, assert_frequencies, assert_mean

import genkit as gk


d = gk.diffusion
LEVELS = [1e-6, 1e-2, 0.5, 3.0, 1e3]


def random_cov(size, seed=0, rank=None):
    factor = np.random.RandomState(seed).randn(size, rank or size)
    return factor @ factor.T / size


@pytest.fixture
def mixture(x64):
    means = np.array([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.5]])
    covs = np.array([[[0.09, 0.02], [0.02, 0.04]], [[0.04, -0.01], [-0.01, 0.09]], [[0.0625, 0.0], [0.0, 0.0625]]])
    return np.array([0.5, 0.3, 0.2]), means, covs, np.array([0, 1, 1])


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_gaussian_against_linear_algebra(sigma, shape, x64):
    mean, cov = np.arange(6.0), random_cov(6)
    denoiser = d.GaussianDenoiser(mean.reshape(shape), cov)
    assert denoiser.shape == shape
    x = mean + np.random.RandomState(1).randn(6) * (1 + sigma)
    total = cov + sigma**2 * np.eye(6)
    want = mean + cov @ np.linalg.solve(total, x - mean)
    got = denoiser(jnp.asarray(x.reshape(shape)), jnp.array(sigma))
    np.testing.assert_allclose(np.ravel(got), want, rtol=1e-9, atol=1e-9)
    log_density = scipy.stats.multivariate_normal(mean, total).logpdf(x)
    np.testing.assert_allclose(denoiser.log_density(jnp.asarray(x.reshape(shape)), sigma), log_density, rtol=1e-10)
    np.testing.assert_allclose(denoiser.cov, cov, atol=1e-13)


@pytest.mark.parametrize("sigma", [0.0, *LEVELS])
def test_kinds_of_covariance_agree(sigma, x64):
    mean, diagonal = jnp.arange(4.0).reshape(1, 2, 2), jnp.array([0.5, 2.0, 1e-6, 1.0])
    x = mean + 0.3 * (1 + sigma)
    full = d.GaussianDenoiser(mean, jnp.diag(diagonal))
    diag = d.GaussianDenoiser(mean, diagonal.reshape(1, 2, 2))
    assert diag.basis is None and full.basis is not None
    np.testing.assert_allclose(diag(x, sigma), full(x, sigma), rtol=1e-10)
    np.testing.assert_allclose(diag.log_density(x, sigma), full.log_density(x, sigma), rtol=1e-10)
    iso, same = d.GaussianDenoiser(mean, 0.7), d.GaussianDenoiser(mean, jnp.full((1, 2, 2), 0.7))
    np.testing.assert_allclose(iso(x, sigma), same(x, sigma), rtol=1e-12)
    np.testing.assert_allclose(iso.log_density(x, sigma), same.log_density(x, sigma), rtol=1e-12)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_float32_matches_float64_at_every_level(kind):
    size = 16
    cov = {"scalar": 0.3, "diagonal": np.linspace(0.01, 4, size), "full": random_cov(size)}[kind]
    mean, white = np.linspace(-1, 1, size), np.random.RandomState(3).randn(size)
    for sigma in (0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e6, 1e12):
        x = (mean + white * (1 + sigma)).astype(np.float32)
        low = d.GaussianDenoiser(mean.astype(np.float32), np.float32(cov))(jnp.asarray(x), jnp.float32(sigma))
        with jax.enable_x64(True):
            high = d.GaussianDenoiser(mean.astype(np.float32), np.float32(cov))(
                jnp.asarray(x, jnp.float64), jnp.float64(np.float32(sigma))
            )
        scale = np.abs(x).max() / (1 + sigma)  # the error may be relative to the state, not to the noise
        np.testing.assert_allclose(low, high, atol=2e-6 * max(1.0, scale), rtol=2e-5)
        if sigma == 0:
            np.testing.assert_array_equal(low, x)


def test_directions_without_variance_stay_at_the_mean():
    denoiser = d.GaussianDenoiser(jnp.zeros(3), jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(denoiser(jnp.ones(3), jnp.array(0.0)), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(denoiser(jnp.ones(3), jnp.array(1e-12)), [1.0, 0.0, 0.0])
    flat = d.GaussianDenoiser(jnp.zeros(4), jnp.asarray(random_cov(4, rank=2), jnp.float32))
    assert np.all(np.isfinite(flat(jnp.ones(4), jnp.array(0.0))))


@pytest.mark.parametrize("cond", [None, -1, 0, 1])
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 2.0, 50.0])
def test_mixture_against_its_own_score(mixture, sigma, cond):
    # Tweedie: D = x + sigma^2 grad log p, with a density of an independent implementation.
    weights, means, covs, labels = mixture
    denoiser = d.MixtureDenoiser(weights, means, covs, labels)
    chosen = np.ones(3, bool) if cond in (None, -1) else labels == cond
    x = np.array([0.6, 0.2]) * (1 + sigma)

    parts = [
        np.log(w / weights[chosen].sum()) + scipy.stats.multivariate_normal(m, c + sigma**2 * np.eye(2)).logpdf(x)
        for w, m, c in zip(weights[chosen], means[chosen], covs[chosen], strict=True)
    ]
    np.testing.assert_allclose(denoiser.log_density(x, sigma, cond), np.logaddexp.reduce(parts), rtol=1e-10)
    shares = np.exp(parts - np.logaddexp.reduce(parts))
    posterior = [
        m + c @ np.linalg.solve(c + sigma**2 * np.eye(2), x - m)
        for m, c in zip(means[chosen], covs[chosen], strict=True)
    ]
    got = denoiser(jnp.asarray(x), jnp.array(sigma), cond)
    np.testing.assert_allclose(got, shares @ np.array(posterior), rtol=1e-9, atol=1e-10)
    score = jax.grad(lambda x: denoiser.log_density(x, sigma, cond))(jnp.asarray(x))
    np.testing.assert_allclose(got, x + sigma**2 * score, rtol=1e-9, atol=1e-8 * (1 + sigma))


def test_mixture_kinds_of_covariance_agree(x64):
    means, weights = jnp.arange(12.0).reshape(3, 2, 2), jnp.array([1.0, 2.0, 1.0])
    x = jnp.full((2, 2), 5.0)
    variances = jnp.array([0.5, 1.0, 2.0])
    iso = d.MixtureDenoiser(weights, means, variances)
    diag = d.MixtureDenoiser(weights, means, jnp.broadcast_to(variances[:, None, None], (3, 2, 2)))
    full = d.MixtureDenoiser(weights, means, variances[:, None, None] * jnp.eye(4))
    assert iso.basis is None and diag.basis is None and full.basis is not None
    for sigma in (0.0, 0.1, 10.0):
        for other in (diag, full):
            np.testing.assert_allclose(iso(x, sigma), other(x, sigma), rtol=1e-10)
            np.testing.assert_allclose(iso.log_density(x, sigma), other.log_density(x, sigma), rtol=1e-10)
    shared = d.MixtureDenoiser(weights, means, 0.5)
    np.testing.assert_allclose(shared(x, 0.3), d.MixtureDenoiser(weights, means, jnp.full(3, 0.5))(x, 0.3), rtol=1e-12)
    np.testing.assert_allclose(full.covs[2], 2.0 * np.eye(4), atol=1e-12)
    np.testing.assert_allclose(iso.covs[2], 2.0 * np.eye(4), atol=1e-12)
    np.testing.assert_allclose(iso.weights, [0.25, 0.5, 0.25], rtol=1e-12)


def test_one_component_is_the_gaussian(x64):
    mean, cov = jnp.arange(3.0), random_cov(3)
    one = d.MixtureDenoiser(jnp.ones(1), mean[None], cov[None])
    gaussian = d.GaussianDenoiser(mean, cov)
    x = jnp.array([0.3, -2.0, 1.0])
    for sigma in (0.0, 0.2, 30.0):
        np.testing.assert_allclose(one(x, sigma), gaussian(x, sigma), rtol=1e-10)


def with_slopes(denoiser):
    """Value and derivatives by example and level, compiled once; the label is data (-1 for all)."""

    @jax.jit
    def run(x, sigma, cond):
        by_x, by_sigma = jax.jacobian(lambda x, s: denoiser(x, s, cond), argnums=(0, 1))(x, sigma)
        return denoiser(x, sigma, cond), by_x, by_sigma

    return run


def test_mixture_is_finite_in_float32_at_every_level():
    means = jnp.array([[-3.0, 0.0], [3.0, 0.0]])
    denoiser = d.MixtureDenoiser(jnp.ones(2), means, jnp.array([0.1, 0.2]), jnp.array([0, 1]))
    run = with_slopes(denoiser)
    for sigma in (0.0, 1e-12, 1e-3, 1.0, 1e4, 1e10):
        x = np.float32([1.0, 40.0]) * np.float32(1 + sigma)
        for cond in (0, -1):
            found = run(x, np.float32(sigma), cond)
            assert all(np.all(np.isfinite(part)) for part in found), (sigma, cond)
        if sigma == 0:
            np.testing.assert_allclose(found[0], x, rtol=1e-6)
        np.testing.assert_allclose(denoiser(jnp.asarray(x), sigma, None), found[0], rtol=1e-6)


def test_draws_follow_the_law():
    weights, labels = jnp.array([0.5, 0.3, 0.2]), jnp.array([0, 1, 1])
    means = jnp.array([[-9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    covs = 0.1 * jnp.asarray(np.stack([random_cov(2, seed) for seed in range(3)]), jnp.float32)
    denoiser = d.MixtureDenoiser(weights, means, covs, labels)
    draws = np.asarray(jax.jit(lambda key: denoiser.sample(20_000, key=key))(jr.key(0)))
    member = np.argmin(((draws[:, None] - np.asarray(means)) ** 2).sum(-1), axis=1)
    assert_frequencies(member, np.asarray(weights))
    assert_mean(draws[member == 1], np.asarray(means[1]))
    assert_covariance(draws[member == 2], np.asarray(covs[2]))
    asked = jnp.array([0, 1, -1] * 2000)
    given = np.asarray(jax.jit(lambda key: denoiser.sample(6000, cond=asked, key=key))(jr.key(1)))
    member = np.argmin(((given[:, None] - np.asarray(means)) ** 2).sum(-1), axis=1)
    assert np.all(member[0::3] == 0)
    assert_frequencies(member[1::3] - 1, [0.6, 0.4])
    assert_frequencies(member[2::3], np.asarray(weights))
    cov = random_cov(3)
    assert_covariance(d.GaussianDenoiser(jnp.zeros(3), cov).sample(20_000, key=jr.key(2)), cov)
    assert_mean(d.GaussianDenoiser(jnp.ones((1, 2)), 0.5).sample(5000, key=jr.key(3)).reshape(-1, 2), np.ones(2))


@pytest.mark.parametrize("cond", [None, -1, 0, 2])
@pytest.mark.parametrize("sigma", [1e-3, 0.3, 5.0, 1e3])
def test_empirical_is_a_mixture_without_width(sigma, cond, x64):
    random = np.random.RandomState(0)
    data, labels = random.randn(30, 1, 2, 2), np.arange(30) % 3
    empirical = d.EmpiricalDenoiser(data, labels)
    mixture = d.MixtureDenoiser(np.ones(30), data, 0.0, labels)
    x = jnp.asarray(random.randn(1, 2, 2) * (1 + sigma))
    np.testing.assert_allclose(empirical(x, sigma, cond), mixture(x, sigma, cond), rtol=1e-8, atol=1e-9)
    got, want = empirical.log_density(x, sigma, cond), mixture.log_density(x, sigma, cond)
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_empirical_is_finite_at_every_level():
    data = np.random.RandomState(0).randn(20, 3).astype(np.float32)
    denoiser = d.EmpiricalDenoiser(data, np.arange(20) % 2)
    run = with_slopes(denoiser)
    x = np.float32([0.3, -0.2, 1.0])
    members = data[1::2]
    for sigma in (0.0, 1e-30, 1e-10, 1e-3, 0.3, 1e6, 1e15):
        for cond in (-1, 1):
            found = run(x, np.float32(sigma), cond)
            assert all(np.all(np.isfinite(part)) for part in found), (sigma, cond)
        if sigma <= 1e-3:
            np.testing.assert_allclose(found[0], members[np.argmin(((members - x) ** 2).sum(1))], rtol=1e-6)
        if sigma >= 1e6:
            np.testing.assert_allclose(found[0], members.mean(0), rtol=1e-4, atol=1e-5)


def test_empirical_ties_and_draws():
    denoiser = d.EmpiricalDenoiser(jnp.array([[-1.0], [1.0]]), jnp.array([0, 1]))
    assert float(denoiser(jnp.zeros(1), jnp.array(0.0))[0]) == 0.0
    assert set(np.ravel(denoiser.sample(50, key=jr.key(0))).tolist()) == {-1.0, 1.0}
    assert np.all(np.asarray(denoiser.sample(50, cond=1, key=jr.key(1))) == 1.0)
    asked = jnp.array([0, 1, 0])
    assert np.ravel(denoiser.sample(3, cond=asked, key=jr.key(2))).tolist() == [-1.0, 1.0, -1.0]


def test_label_as_data_and_one_compilation():
    denoiser = d.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [1.0]]), 0.01, jnp.array([0, 1]))
    traces = []

    @eqx.filter_jit
    def run(model, x, sigma, cond):
        traces.append(1)
        return jax.vmap(model)(x, sigma, cond)

    values = run(denoiser, jnp.zeros((3, 1)), jnp.ones(3), jnp.array([0, 1, -1]))
    np.testing.assert_allclose(np.ravel(values), [-0.990099, 0.990099, 0.0], atol=1e-5)
    other = eqx.tree_at(lambda m: m.means, denoiser, 2 * denoiser.means)
    run(other, jnp.ones((3, 1)), jnp.ones(3), jnp.array([1, 1, -1]))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: d.GaussianDenoiser(jnp.zeros(2), jnp.ones(3)), "`cov` must be of shape"),
        (lambda: d.GaussianDenoiser(jnp.zeros(2), -1.0), "`cov` must be non-negative"),
        (lambda: d.GaussianDenoiser(jnp.zeros(2), jnp.array([1.0, -1.0])), "`cov` must be non-negative"),
        (lambda: d.GaussianDenoiser(jnp.zeros(2), jnp.array([[1.0, 2.0], [2.0, 1.0]])), "positive semi-definite"),
        (lambda: d.GaussianDenoiser(jnp.zeros(2), jnp.array([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: d.GaussianDenoiser(jnp.array([jnp.nan]), 1.0), "`mean` must be finite"),
        (lambda: d.GaussianDenoiser(jnp.zeros(1), jnp.nan), "`cov` must be finite"),
        (lambda: d.MixtureDenoiser(jnp.array([1.0, -1.0]), jnp.zeros((2, 1)), 1.0), "`weights` must be non-neg"),
        (lambda: d.MixtureDenoiser(jnp.zeros(2), jnp.zeros((2, 1)), 1.0), "`weights` must be positive for some"),
        (
            lambda: d.MixtureDenoiser(jnp.array([1.0, 0.0]), jnp.zeros((2, 1)), 1.0, jnp.array([0, 1])),
            "positive for some component of label 1",
        ),
        (lambda: d.MixtureDenoiser(jnp.ones(2), jnp.zeros((2, 2)), jnp.ones((2, 3))), "`covs` must be of shape"),
        (lambda: d.MixtureDenoiser(jnp.ones(2), jnp.zeros((2, 1)), 1.0, jnp.array([0, 2])), "`labels` must be 0, 1"),
        (lambda: d.MixtureDenoiser(jnp.ones(2), jnp.zeros((2, 1)), 1.0, jnp.array([-1, 0])), "`labels` must be 0, 1"),
        (lambda: d.EmpiricalDenoiser(jnp.array([[0.0], [jnp.inf]])), "`data` must be finite"),
        (lambda: d.EmpiricalDenoiser(jnp.zeros((0, 2))), "number of examples"),
    ],
)
def test_wrong_laws(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_counts():
    # The tests' own type check refuses these first, so the message is not looked at.
    with pytest.raises((ValueError, TypeError)):
        d.MixtureDenoiser(jnp.ones(3), jnp.zeros((2, 1)), 1.0)
    with pytest.raises((ValueError, TypeError)):
        d.MixtureDenoiser(jnp.ones(2), jnp.zeros((2, 1)), 1.0, jnp.zeros(3, int))
    with pytest.raises(TypeError):
        d.EmpiricalDenoiser(jnp.zeros((3, 2))).sample(3, key=jr.PRNGKey(0))


def test_wrong_calls():
    gaussian = d.GaussianDenoiser(jnp.zeros(2), 1.0)
    mixture = d.MixtureDenoiser(jnp.ones(2), jnp.zeros((2, 2)), 1.0, jnp.array([0, 1]))
    empirical = d.EmpiricalDenoiser(jnp.zeros((3, 2)))
    x = jnp.zeros(2)
    for denoiser in (gaussian, mixture, empirical):
        with pytest.raises(ValueError, match="`sigma` must be non-negative"):
            denoiser(x, -1.0)
        with pytest.raises(ValueError, match=r"`x` must be of shape \(2,\)"):
            denoiser(jnp.zeros(3), 1.0)
        with pytest.raises(ValueError, match="`num_samples`"):
            denoiser.sample(0, key=jr.key(0))
    for denoiser in (gaussian, empirical):
        with pytest.raises(ValueError, match="`cond` must be None"):
            denoiser(x, 1.0, 0)
    with pytest.raises(ValueError, match="a label below 2"):
        mixture(x, 1.0, 2)
    with pytest.raises(ValueError, match="one integer label"):
        mixture(x, 1.0, 0.5)
    with pytest.raises(ValueError, match="a label or 3 labels"):
        mixture.sample(3, cond=jnp.array([0, 1]), key=jr.key(0))
