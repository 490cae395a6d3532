"""Inverse problems: exact posteriors of Gaussian data, the mixture posterior, replacement, the spectral sampler."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk
from genkit.diffusion._samplers._inpainting import gray_basis


gd = gk.diffusion
OPERATOR = np.array([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 1.0, 0.5]])
Y = np.array([1.5, -0.7])


def prior():
    factor = np.array([[1.0, 0, 0, 0], [0.5, 0.8, 0, 0], [-0.3, 0.2, 0.6, 0], [0.1, 0.4, -0.2, 0.3]])
    return gd.GaussianDenoiser(jnp.array([0.5, -0.5, 0.0, 1.0]), jnp.asarray(factor @ factor.T))


def posterior(mean, cov, noise):
    """Mean and covariance given the measurement, and the log-density of the measurement."""
    total = OPERATOR @ cov @ OPERATOR.T + noise**2 * np.eye(2)
    gain = np.linalg.solve(total, OPERATOR @ cov).T
    shift = Y - OPERATOR @ mean
    evidence = -0.5 * (shift @ np.linalg.solve(total, shift) + np.linalg.slogdet(2 * np.pi * total)[1])
    cov = cov - gain @ OPERATOR @ cov
    return mean + gain @ shift, (cov + cov.T) / 2, evidence


LEVELS = np.array([1e-3, 0.1, 1.0, 30.0])


def table_of(denoiser):
    x = jr.normal(jr.key(0), (4, 4)) * (1 + LEVELS[:, None])
    return jax.jit(jax.vmap(denoiser))(x, jnp.asarray(LEVELS))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_moment_matching_is_exact_on_gaussian_data(noise, x64):
    law = prior()
    mean, cov, _ = posterior(np.asarray(law.mean), np.asarray(law.cov), noise)
    exact = table_of(gd.GaussianDenoiser(jnp.asarray(mean), jnp.asarray(cov)))
    found = table_of(gd.Measurement(law, OPERATOR, Y, noise))
    np.testing.assert_allclose(found, exact, atol=1e-6)
    if noise:
        # The same through a function of another shape, and by as many iterations as there are measurements.
        operator = lambda x: (jnp.asarray(OPERATOR) @ x).reshape(2, 1)
        iterated = gd.Measurement(law, operator, Y.reshape(2, 1), noise, num_iterations=4)
        np.testing.assert_allclose(table_of(iterated), exact, atol=1e-5)
        # A noise level for each entry.
        np.testing.assert_allclose(table_of(gd.Measurement(law, OPERATOR, Y, np.full(2, noise))), exact, atol=1e-9)


def test_the_other_methods_against_their_formulas(x64):
    white = gd.GaussianDenoiser(jnp.zeros(4), jnp.array(0.49))
    mean, cov, _ = posterior(np.zeros(4), 0.49 * np.eye(4), 0.3)
    exact = table_of(gd.GaussianDenoiser(jnp.asarray(mean), jnp.asarray(cov)))
    np.testing.assert_allclose(
        table_of(gd.Measurement(white, OPERATOR, Y, 0.3, "pigdm", sigma_data=0.7)), exact, atol=1e-9
    )
    # Rows that measure one coordinate each: the diagonal is all there is.
    rows = np.eye(4)[:2] * 2.0
    one, two = (table_of(gd.Measurement(white, rows, Y, 0.3, method)) for method in ("tmpd", "mmps"))
    np.testing.assert_allclose(one, two, atol=1e-9)
    x = jr.normal(jr.key(0), (4, 4)) * (1 + LEVELS[:, None])
    law = prior()
    x0 = np.asarray(table_of(law))
    residual = Y - x0 @ OPERATOR.T
    null = np.eye(4) - np.linalg.pinv(OPERATOR) @ OPERATOR
    placed = x0 @ null.T + Y @ np.linalg.pinv(OPERATOR).T
    np.testing.assert_allclose(table_of(gd.Measurement(law, OPERATOR, Y, 0.0, "ddnm")), placed, atol=1e-6)
    spread = (0.5 * LEVELS) ** 2
    near = [
        x0[i] + OPERATOR.T @ np.linalg.solve(OPERATOR @ OPERATOR.T + 0.09 / spread[i] * np.eye(2), residual[i])
        for i in range(4)
    ]
    np.testing.assert_allclose(table_of(gd.Measurement(law, OPERATOR, Y, 0.3, "diffpir", scale=0.5)), near, atol=1e-8)
    size = lambda x, s: jnp.linalg.norm(Y - OPERATOR @ law(x, s))
    slope = jax.jit(jax.vmap(jax.grad(size)))(x, jnp.asarray(LEVELS))
    stepped = x0 - 0.4 * LEVELS[:, None] * slope
    np.testing.assert_allclose(table_of(gd.Measurement(law, OPERATOR, Y, 0.3, "dps", scale=0.4)), stepped, atol=1e-8)


def test_at_no_noise_the_state_is_the_answer():
    for method in ("mmps", "tmpd", "pigdm", "dps", "ddnm", "diffpir"):
        given = gd.Measurement(prior(), OPERATOR, Y, 0.0, method)
        np.testing.assert_array_equal(given(jnp.arange(4.0), jnp.array(0.0)), jnp.arange(4.0))


def energy_of(draws, reference):
    return float(gk.divergence.energy_distance(draws, reference))


@pytest.mark.slow
def test_draws_of_a_mixture_posterior():
    # Three components, one measurement with noise: the posterior is a mixture of three with new weights.
    means = np.array([[-2.0, 0.5, 0, 1], [2.0, 0.5, 1, 0], [0.0, -2.0, -1, 0]])
    covs = np.stack([np.asarray(prior().cov) * scale for scale in (0.2, 0.1, 0.3)])
    weights = np.array([0.3, 0.3, 0.4])
    law = gd.MixtureDenoiser(jnp.asarray(weights), jnp.asarray(means), jnp.asarray(covs))
    parts = [posterior(m, c, 0.4) for m, c in zip(means, covs, strict=True)]
    shares = weights * np.exp([part[2] for part in parts])
    exact = gd.MixtureDenoiser(
        jnp.asarray(shares / shares.sum()), jnp.asarray([p[0] for p in parts]), jnp.asarray([p[1] for p in parts])
    )
    num = 1500
    table = gd.sa(gd.karras(60, 0.01, 30.0), 2)
    given = gd.Measurement(law, OPERATOR, Y, 0.4)
    draws = gk.sample(table, given, num, key=jr.key(0)).value
    reference, other = (exact.sample(num, key=jr.key(k)) for k in (1, 2))
    found, null, unconditional = (energy_of(d, reference) for d in (draws, other, law.sample(num, key=jr.key(3))))
    # Moment matching is approximate here: within a hundredth of the way from the prior to the posterior.
    assert null < 0.02 and found < 0.05 and unconditional > 1.0
    assert found < 0.03 * unconditional


def test_replacement_and_repaint():
    # A strongly correlated pair, one known exactly: the other given it is Gaussian.
    law = gd.GaussianDenoiser(jnp.zeros(2), jnp.array([[1.0, 0.9], [0.9, 1.0]]))
    known = gd.Replacement(jnp.array([1.0, 0.0]), jnp.array([1.5, 0.0]))
    grid = gd.karras(24, 0.01, 10.0)
    num = 2000
    plain = gk.sample(gd.repaint(grid, num_resamples=1), law, num, key=jr.key(0), guidance=known).value
    again = gk.sample(gd.repaint(grid, num_resamples=8), law, num, key=jr.key(0), guidance=known).value
    np.testing.assert_array_equal(plain[:, 0], 1.5)
    np.testing.assert_array_equal(again[:, 0], 1.5)
    errors = [abs(float(draws[:, 1].mean()) - 1.35) for draws in (plain, again)]
    # Drawing again makes the parts agree; the standard error of a mean is 0.01.
    assert errors[1] < 0.1 and errors[1] < 0.5 * errors[0]


def test_repaint_without_repetition_is_ancestral():
    grid = gd.karras(9, 0.02, 10.0)
    first, second = gd.repaint(grid, 3, 1), gd.ancestral(grid)
    for name in ("a", "b", "c", "sigma", "step"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    # Without a measurement the travel keeps the law.
    with jax.enable_x64(True):
        law = prior()
    long = gd.log_uniform(200, 0.02, 10.0, final=None)
    there = gd.exact_error(gd.repaint(long, 10, 3), law).relative_variance
    assert there < 1.2 * gd.exact_error(gd.ancestral(long), law).relative_variance


def test_colors_from_gray():
    basis = gray_basis(3)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-12)
    image = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    law = gd.GaussianDenoiser(jnp.zeros((3, 2, 2)), jnp.array(1.0))
    known = gd.Replacement.of_gray(image)
    drawn = gk.sample(gd.ancestral(gd.karras(8, 0.05, 5.0)), law, 2, key=jr.key(0), guidance=known).value
    np.testing.assert_allclose(drawn.mean(1), np.broadcast_to(image.mean(0), (2, 2, 2)), atol=1e-5)
    assert float(jnp.abs(drawn - image).max()) > 0.1


def test_the_spectral_sampler():
    # White data: directions are independent; measured ones follow the posterior, the others the prior.
    law = gd.GaussianDenoiser(jnp.zeros(4), jnp.array(1.0))
    num = 3000
    draw = lambda noise: (
        gk.sample(gd.DDRM(gd.karras(40, 0.01, 10.0), OPERATOR, Y, noise, eta=0.0), law, num, key=jr.key(0)).value
    )
    exact = draw(0.0)
    np.testing.assert_allclose(exact @ OPERATOR.T, np.broadcast_to(Y, (num, 2)), atol=1e-4)
    null = np.linalg.svd(OPERATOR)[2][2:]
    band = 5 * np.sqrt(1 / num)
    assert np.all(np.abs((exact @ null.T).mean(0)) < band)
    np.testing.assert_allclose((exact @ null.T).var(0), 1.0, atol=0.15)
    noisy = draw(0.2) @ OPERATOR.T
    assert 0.001 < float(np.abs(noisy.mean(0) - Y).max()) < 0.15


def test_a_measurement_is_a_pytree_and_takes_conditions(compilations):
    means = jnp.array([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    law = gd.MixtureDenoiser(jnp.ones(2), means, jnp.array(0.1), labels=np.array([0, 1]))
    run = jax.jit(lambda given, x: given(x, jnp.asarray(0.5), jnp.asarray(1)))
    first = run(gd.Measurement(law, OPERATOR, Y, 0.1), jnp.zeros(4))
    with compilations() as count:
        second = run(gd.Measurement(law, OPERATOR, 2 * Y, 0.2), jnp.zeros(4))
        assert count() <= 2  # scaling Y and the like; never the program itself
    assert not np.allclose(first, second)
    assert gd.Measurement(law, OPERATOR, Y, 0.1).num_labels == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda law: gd.Measurement(law, OPERATOR[:, :3], Y, 0.1), "operator"),
        (lambda law: gd.Measurement(law, OPERATOR, Y[:1], 0.1), "operator"),
        (lambda law: gd.Measurement(law, lambda x: x[:3], Y, 0.1), "operator"),
        (lambda law: gd.Measurement(law, lambda x: OPERATOR.T @ x, Y, 0.1), "operator"),
        (lambda law: gd.Measurement(law, OPERATOR, Y, -0.1), "noise_std"),
        (lambda law: gd.Measurement(law, OPERATOR, Y, np.ones(3)), "noise_std"),
        (lambda law: gd.Measurement(law, OPERATOR, Y, 0.1, "mcg"), "method"),
        (lambda law: gd.Measurement(law, OPERATOR, Y, 0.1, num_iterations=0), "num_iterations"),
        (lambda law: gd.Measurement(law, OPERATOR, Y, 0.1, scale=0.0), "scale"),
        (lambda law: gd.Measurement(law, OPERATOR, np.array([np.nan, 0]), 0.1), "y"),
        (lambda law: gd.Replacement(jnp.ones(3), jnp.ones(4)), "mask"),
        (lambda law: gd.Replacement(2 * jnp.ones(4), jnp.ones(4)), "mask"),
        (lambda law: gd.Replacement(jnp.ones(4), jnp.ones(4), jnp.eye(3)), "basis"),
        (lambda law: gd.repaint(gd.karras(4, 0.1, 1.0), 0), "jump"),
        (lambda law: gd.DDRM(gd.karras(4, 0.1, 1.0), OPERATOR, Y[:1], 0.1), "y"),
        (lambda law: gd.DDRM(gd.karras(4, 0.1, 1.0), OPERATOR, Y, 0.1, eta=2.0), "eta"),
        (lambda law: gd.Replacement.of_gray(jnp.zeros((3, 8))), "image"),
        (lambda law: gd.log_prob(gd.Measurement(law, OPERATOR, Y, 0.1), jnp.ones(4), sigma_min=0.1, sigma_max=1.0),
         "no posterior"),
    ],
)  # fmt: skip
def test_wrong_input(make, says):
    with pytest.raises(ValueError, match=says):
        make(prior())
