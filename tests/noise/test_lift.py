"""The lift against the exact covariance and the published figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit.noise as gn
from genkit.noise import _tables


TS = np.arange(1, 65) / 64


def error(lift, hurst, kind="I"):
    exact = gn.fbm_covariance(hurst, TS[:, None], TS[None], kind)
    return float(jnp.linalg.norm(lift.covariance(hurst, TS[:, None], TS[None]) - exact) / jnp.linalg.norm(exact))


def test_default_lift_is_within_a_thousandth():
    with jax.enable_x64(True):
        for hurst in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
            assert error(gn.ma_fbm(), hurst) < 1e-3
            assert error(gn.ma_fbm(kind="II"), hurst, "II") < 1e-3


def test_five_terms_reproduce_the_reference_figures():
    published = {0.05: 0.454, 0.1: 0.198, 0.2: 0.034, 0.3: 0.007, 0.7: 0.161, 0.8: 0.328, 0.9: 0.604, 0.95: 0.788}
    split = {0.05: 0.03, 0.1: 0.025, 0.2: 0.0085, 0.3: 0.003, 0.45: 0.0003, 0.7: 0.0006, 0.9: 0.0004, 0.95: 0.0003}
    with jax.enable_x64(True):
        for hurst, wanted in published.items():
            assert abs(error(gn.ma_fbm(5, 0.1, 100.0, kind="I-published"), hurst) - wanted) < 6e-4
        for hurst, wanted in split.items():
            assert error(gn.ma_fbm(5, 0.1, 100.0), hurst) < wanted


def test_small_index_figures_of_the_default():
    with jax.enable_x64(True):
        for hurst, wanted in ((0.05, 0.017), (0.1, 0.0017), (0.2, 0.0011)):
            assert error(gn.ma_fbm(), hurst) < wanted


def test_default_holds_down_to_the_end_of_the_range():
    """What is faster than any speed of the history's quadrature is most of the variance there."""
    with jax.enable_x64(True):
        for hurst in (0.01, 0.015, 0.02, 0.03, 0.05, 0.07):
            assert error(gn.ma_fbm(), hurst) < 4e-3
            assert error(gn.ma_fbm(5, 0.05, 1e3), hurst) < 0.012
            assert error(gn.ma_fbm(kind="II"), hurst, "II") < 0.026
            assert abs(float(gn.ma_fbm().covariance(hurst, 1.0, 1.0)) - 1) < 5e-3


def divergence(lift, hurst):
    """Kullback-Leibler divergence from exact to lifted, of 20 points observed with noise of sd .1."""
    t = np.arange(1, 21) / 20
    exact = np.asarray(gn.fbm_covariance(hurst, t[:, None], t[None])) + 0.01 * np.eye(20)
    lifted = np.asarray(lift.covariance(hurst, t[:, None], t[None])) + 0.01 * np.eye(20)
    log_dets = np.linalg.slogdet(lifted)[1] - np.linalg.slogdet(exact)[1]
    return (np.trace(np.linalg.solve(lifted, exact)) - 20 + log_dets) / 2


@pytest.mark.parametrize(
    ("lift", "split"),
    [
        # the largest values that round to the printed figures of the lift with its own history
        (gn.ma_fbm(5, 0.05, 20.0), (6.005, 1.305, 0.01095, 0.00145, 0.00205, 0.00025, 0.000065)),
        (gn.ma_fbm(5, 0.05, 1e3), (1.895, 0.2535, 0.00235, 0.00045, 0.00085, 0.00025, 0.000085)),
        (gn.ma_fbm(), (0.9375, 0.08085, 0.000065, 0.000015, 0.000025, 5.5e-6, 5e-6)),
    ],
)
def test_divergence_of_noisy_points_is_no_worse_than_the_reference(lift, split):
    with jax.enable_x64(True):
        for hurst, bound in zip((0.05, 0.1, 0.3, 0.6, 0.7, 0.9, 0.95), split, strict=True):
            assert 0 <= divergence(lift, hurst) < bound


def test_divergence_of_the_published_lift():
    published = {0.05: 7.95, 0.1: 1.88, 0.3: 0.0188, 0.6: 0.0075, 0.7: 0.0209, 0.9: 0.219, 0.95: 0.769}
    with jax.enable_x64(True):
        for hurst, wanted in published.items():
            np.testing.assert_allclose(divergence(gn.ma_fbm(5, 0.05, 20.0, "I-published"), hurst), wanted, rtol=0.01)


def test_ends_of_the_range_in_float32():
    lift = gn.ma_fbm()
    with jax.enable_x64(True):
        wide = {h: np.asarray(lift.covariance(h, 0.7, 1.0)) for h in (0.01, 0.99)}
        lift.weights(jnp.asarray(np.float32(0.99), jnp.float64))  # rounded once, .99 lies 1e-8 outside
    slope = jax.jit(jax.grad(lambda h: lift.covariance(h, 0.7, 1.0)))
    for hurst, wanted in wide.items():
        for given in (hurst, np.float32(hurst)):
            assert np.isfinite(lift.weights(given)).all()
            assert np.isfinite(lift.history(given)).all()
            np.testing.assert_allclose(lift.covariance(given, 0.7, 1.0), wanted, rtol=1e-3)
        assert np.isfinite(slope(hurst))
    assert np.isnan(jax.jit(lift.weights)(0.995)).all()


def test_published_weights(monkeypatch):
    monkeypatch.setattr(_tables, "_RIDGE", 0.0)  # the figures are of the plain solution
    gamma = _tables.grid(5, 1 / 20, 20)
    np.testing.assert_allclose(
        _tables.weights_published(gamma, 0.7), [2.26197, -1.42064, 0.01979, -0.31070, -0.17701], atol=6e-6
    )
    np.testing.assert_allclose(
        _tables.weights_kind_two(gamma, 0.7), [-0.93484, 3.26805, -1.77131, 0.11563, -0.31547], atol=6e-6
    )
    np.testing.assert_allclose(
        _tables.weights_published(gamma, 0.3), [0.80441, -0.11152, 0.48741, 0.08451, 1.18733], atol=6e-6
    )


def test_tables_follow_the_solved_weights():
    with jax.enable_x64(True):
        lift = gn.ma_fbm()
        for hurst in (0.013, 0.237, 0.5, 0.861, 0.987):
            scale = 1 / np.sqrt(_tables.kind_one_variance(hurst))
            wanted = scale * _tables.weights_of_full_variance(lift.gamma, hurst)
            np.testing.assert_allclose(lift.weights(hurst), wanted, atol=1e-8 * np.abs(wanted).max())


def test_weights_and_history_are_smooth_in_the_index():
    with jax.enable_x64(True):
        lift = gn.ma_fbm()
        for function in (lift.weights, lift.history):
            for hurst in (0.2, 0.5, 0.8):
                slope = jax.jacfwd(function)(jnp.asarray(hurst))
                difference = (function(hurst + 1e-5) - function(hurst - 1e-5)) / 2e-5
                np.testing.assert_allclose(slope, difference, atol=1e-5)
    narrow = jax.jit(lift.weights)(jnp.float32(0.3))  # in the program, in float32
    np.testing.assert_allclose(narrow, lift.weights(0.3), atol=2e-5)


def test_variance_is_not_lost_at_small_indices():
    """The projection alone lacks two per cent of it at H = .1; what is given back is right on average over [0, 1]."""
    with jax.enable_x64(True):
        t = (np.arange(2_000) + 0.5) / 2_000
        for kind, hurst in (("I", 0.1), ("I", 0.15), ("II", 0.05), ("II", 0.1), ("II", 0.15)):
            lost = jnp.mean(t ** (2 * hurst) - gn.ma_fbm(kind=kind).covariance(hurst, t, t))
            assert abs(float(lost)) < 2e-4


def test_one_half_has_no_history_and_brownian_is_exact():
    with jax.enable_x64(True):
        assert np.abs(gn.ma_fbm().history(0.5)).max() < 1e-4
        lift = gn.brownian()
        assert lift.weights(0.5).shape == (0,)
        np.testing.assert_array_equal(lift.covariance(0.5, 0.3, TS), np.minimum(0.3, TS))


def test_lift_is_static_and_hashable():
    assert not jax.tree.leaves(gn.ma_fbm())
    assert hash(gn.ma_fbm()) == hash(gn.ma_fbm())
    assert gn.ma_fbm(5) != gn.ma_fbm(6)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"num_terms": 0}, "num_terms"),
        ({"num_terms": 2.5}, "num_terms"),
        ({"lo": -1.0}, "lo"),
        ({"lo": 2.0, "hi": 1.0}, "hi"),
        ({"kind": "I-publish"}, "I-published"),
    ],
)
def test_refuses_wrong_grids(kwargs, name):
    with pytest.raises((ValueError, TypeError), match=name):
        gn.ma_fbm(**kwargs)


def test_refuses_an_index_outside_the_table():
    with pytest.raises(ValueError, match="hurst"):
        gn.ma_fbm(2, 0.1, 10.0).weights(0.995)
