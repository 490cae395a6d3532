"""Logarithms of modified Bessel functions against published digits, scipy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")
log_bessel_i = jax.jit(gk.distributions.log_bessel_i)
log_bessel_k = jax.jit(gk.distributions.log_bessel_k)
bessel_ratio = jax.jit(gk.distributions.bessel_ratio)

# order, argument, log I, log K, I_{v+1} / I_v: trapezoidal sums and the Wronskian in 50 digits
VALUES = [
    (1023, 300, -923.65689453281365, 915.99200260142071, 0.143471935264424),
    (50, 2000, 1994.6555490128131, -2002.9499110241861, 0.97506257620081),
    (4095, 2e4, 19576.339933191995, -19586.957101737036, 0.815972086964904),
    (16383, 16383, 8723.5730920425883, -8734.3168123044232, 0.414198302899646),
    (0, 1e-8, 2.5e-17, 2.9197478174224401, 5e-9),
]


def test_published_digits():
    order, x, log_i, log_k, ratio = jnp.array(VALUES).T
    # One relative rounding of the largest term, which is of the size of order * log(order).
    np.testing.assert_allclose(log_bessel_i(order, x), log_i, rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(log_bessel_k(order, x), log_k, rtol=1e-12)
    np.testing.assert_allclose(bessel_ratio(order, x), ratio, rtol=1e-12)


def test_scipy_where_it_does_not_overflow():
    order, x = np.meshgrid([0.0, 0.3, 1.0, 5.5, 20.0, 31.0, 40.0], [1e-3, 0.5, 3.0, 20.0, 100.0, 600.0])
    with np.errstate(divide="ignore"):
        log_i = np.log(scipy.special.ive(order, x)) + x
        log_k = np.log(scipy.special.kve(order, x)) - x
    known = np.isfinite(log_i) & np.isfinite(log_k)
    assert known.sum() > 38
    np.testing.assert_allclose(log_bessel_i(order, x)[known], log_i[known], rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(log_bessel_k(order, x)[known], log_k[known], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["log_bessel_i", "log_bessel_k", "bessel_ratio"])
@pytest.mark.parametrize("argument", ["order", "x"])
def test_derivatives_are_finite_differences(name, argument):
    order = jnp.array([0.5, 7.0, 31.9, 32.1, 300.0])
    x = jnp.array([2.0, 40.0, 10.0, 10.0, 100.0])

    def total(shift):
        moved = {"order": order, "x": x}
        moved[argument] = moved[argument] + shift
        return getattr(gk.distributions, name)(**moved)

    run = jax.jit(total)
    step = 1e-4
    difference = (run(step) - run(-step)) / (2 * step)
    exact = jax.jit(jax.jacfwd(total))(0.0)
    # Error of the difference: step^2 / 6 of the third derivative, and 1e-16 / step of the value.
    np.testing.assert_allclose(exact, difference, rtol=1e-6, atol=1e-8)


def test_float32_keeps_its_digits_and_gradients():
    order = jnp.float32(16383.0)
    slope = jax.jit(jax.grad(gk.distributions.log_bessel_i, argnums=1))
    for x in (1e-3, 10.0, 1.6e4, 1e6):
        single = bessel_ratio(order, jnp.float32(x))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, bessel_ratio(16383.0, x), rtol=1e-5)
        assert jnp.isfinite(slope(order, jnp.float32(x)))


def test_values_at_zero():
    assert log_bessel_i(0.0, 0.0) == 0.0
    assert log_bessel_i(2.0, 0.0) == -jnp.inf
    assert log_bessel_k(2.0, 0.0) == jnp.inf
    assert bessel_ratio(2.0, 0.0) == 0.0
    np.testing.assert_allclose(jax.jit(jax.grad(gk.distributions.bessel_ratio, argnums=1))(2.0, 0.0), 1 / 6)


@pytest.mark.parametrize(("order", "x", "name"), [(-1.0, 1.0, "order"), (1.0, -1.0, "x"), (1.0, jnp.nan, "x")])
def test_arguments_outside_the_domain(order, x, name):
    with pytest.raises(ValueError, match=f"`{name}` must be numbers of at least 0"):
        gk.distributions.log_bessel_i(order, x)
