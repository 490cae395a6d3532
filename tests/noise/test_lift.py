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
