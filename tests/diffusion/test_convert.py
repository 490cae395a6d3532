"""Conversions: exact pairs, round trips, both ends of the noise range, gradients, wrong input."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit as gk
from genkit.diffusion import convert


NAMES = ("eps", "x0", "v", "score", "velocity", "F")
PAIRS = list(itertools.permutations(NAMES, 2))
RATES = {"alpha_dot": -1.3, "sigma_dot": 0.7}
SIGMA_DATA = 0.4


def truth(name: str, x0, eps, alpha, sigma):
    """The predictions by their definitions, in float64."""
    c = np.sqrt((alpha * SIGMA_DATA) ** 2 + sigma**2)
    return {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "score": lambda: -eps / sigma,
        "velocity": lambda: RATES["alpha_dot"] * x0 + RATES["sigma_dot"] * eps,
        "F": lambda: (x0 - alpha * SIGMA_DATA**2 / c**2 * (alpha * x0 + sigma * eps)) * c / (sigma * SIGMA_DATA),
    }[name]()


def call(value, source, target, x, alpha, sigma):
    return convert(value, source, target, x, alpha, sigma, **RATES, sigma_data=SIGMA_DATA)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 3.0), (0.3, 0.1)])
def test_every_pair_against_the_definitions(source, target, alpha, sigma, x64):
    x0, eps = np.array([[0.3, -1.2], [2.0, 0.1]]), np.array([[1.1, 0.4], [-0.7, 0.9]])
    x = alpha * x0 + sigma * eps
    got = call(truth(source, x0, eps, alpha, sigma), source, target, x, alpha, sigma)
    np.testing.assert_allclose(got, truth(target, x0, eps, alpha, sigma), rtol=1e-12, atol=1e-13)


# Determined at the ends: at sigma = 0 the state is alpha x0, at alpha = 0 it is sigma eps.
AT_SIGMA_0 = [
    *((source, "x0") for source in ("eps", "v", "score", "velocity", "F")),
    *itertools.permutations(("eps", "v", "velocity", "F"), 2),
]
AT_ALPHA_0 = [
    *((source, "eps") for source in ("x0", "v", "score", "velocity", "F")),
    *((source, "score") for source in ("eps", "x0", "v", "velocity", "F")),
    *itertools.permutations(("x0", "v", "velocity", "F"), 2),
]


def test_exact_with_finite_gradients_at_the_ends(x64):
    x0, eps = np.array([0.3, -1.2]), np.array([1.1, 0.4])

    def limit(name, alpha, sigma):
        c = np.sqrt((alpha * SIGMA_DATA) ** 2 + sigma**2)
        if name == "F":  # its definition divides by sigma; this is the same form multiplied out
            return sigma * x0 / (SIGMA_DATA * c) - alpha * SIGMA_DATA * eps / c
        if name == "score" and sigma == 0:
            return np.array([0.5, -0.25])  # any finite number says eps = 0
        return truth(name, x0, eps, alpha, sigma)

    cases = [*((s, t, 0.9, 0.0) for s, t in AT_SIGMA_0), *((s, t, 0.0, 1.1) for s, t in AT_ALPHA_0)]
    points = [(limit(s, alpha, sigma), alpha * x0 + sigma * eps, alpha, sigma) for s, _, alpha, sigma in cases]

    @jax.jit
    def all_cases(points):
        found = []
        for (source, target, _, _), point in zip(cases, points, strict=True):

            def total(*point, source=source, target=target):
                value, *rest = point
                made = call(value, source, target, *rest)
                return jnp.sum(made), made

            found.append(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*point))
        return found

    for (source, target, alpha, sigma), (gradients, got) in zip(cases, all_cases(points), strict=True):
        says = f"{source} to {target} at alpha {alpha}, sigma {sigma}"
        np.testing.assert_allclose(got, limit(target, alpha, sigma), rtol=1e-13, atol=1e-14, err_msg=says)
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients), says


@pytest.mark.parametrize(
    ("source", "target", "alpha", "sigma"),
    [
        ("eps", "x0", 0.0, 1.0),
        ("score", "v", 0.0, 1.0),
        ("x0", "eps", 1.0, 0.0),
        ("x0", "F", 1.0, 0.0),
        ("v", "score", 1.0, 0.0),
    ],
)
def test_undetermined_is_nan(source, target, alpha, sigma):
    got = call(jnp.ones(2), source, target, jnp.ones(2), alpha, sigma)
    assert np.all(np.isnan(got))


@pytest.mark.parametrize("level", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("via", ["v", "F", "velocity"])
@pytest.mark.parametrize("name", ["eps", "x0"])
def test_round_trips_at_extreme_levels_in_float32(level, via, name):
    # At an extreme level the state hardly tells the other quantity, so what is in between carries a huge error; the way
    # back must multiply it by as small a number, and not spoil the round trip.
    alpha, sigma = np.float32(1 / (1 + level)), np.float32(level / (1 + level))
    x0, eps = np.array([0.3, -1.2], np.float32), np.array([1.1, 0.4], np.float32)
    x = alpha * x0 + sigma * eps
    kwargs = {"alpha_dot": -1.0, "sigma_dot": 1.0, "sigma_data": 1.0}
    value = {"eps": eps, "x0": x0}[name]
    there = convert(value, name, via, x, alpha, sigma, **kwargs)
    again = convert(there, via, name, x, alpha, sigma, **kwargs)
    np.testing.assert_allclose(again, value, atol=8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("level", [1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(("v", "F", "velocity"), 2)))
def test_bounded_forms_round_trip_to_rounding(level, source, target):
    alpha, sigma = np.float32(1 / (1 + level)), np.float32(level / (1 + level))
    x, value = np.array([0.3, -1.2], np.float32), np.array([1.1, 0.4], np.float32)
    kwargs = {"alpha_dot": -1.0, "sigma_dot": 1.0, "sigma_data": 1.0}
    there = convert(value, source, target, x, alpha, sigma, **kwargs)
    again = convert(there, target, source, x, alpha, sigma, **kwargs)
    np.testing.assert_allclose(again, value, rtol=2e-6, atol=2e-6)


def test_f_with_unit_data_on_a_variance_preserving_path_is_minus_v():
    alpha, sigma = 0.6, 0.8
    x, v = jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])
    np.testing.assert_allclose(convert(v, "v", "F", x, alpha, sigma), -v, rtol=1e-6)


def test_broadcasts_and_vectorizes():
    alpha, sigma = jnp.array([[0.8], [0.0]]), jnp.array([[0.6], [1.0]])
    x, v = jnp.ones((2, 3)), 2 * jnp.ones((2, 3))
    together = convert(v, "v", "eps", x, alpha, sigma)
    one_by_one = jax.vmap(lambda v, x, a, s: convert(v, "v", "eps", x, a, s))(v, x, alpha[:, 0], sigma[:, 0])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)


def test_wrong_input():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="`source` must be one of .* got 'epsilon'. Did you mean 'eps'"):
        convert(x, "epsilon", "x0", x, 1.0, 1.0)
    with pytest.raises(ValueError, match="`target` must be one of"):
        convert(x, "eps", "x1", x, 1.0, 1.0)
    with pytest.raises(ValueError, match="`alpha_dot and sigma_dot` must be given"):
        convert(x, "eps", "velocity", x, 1.0, 1.0)
    with pytest.raises(ValueError, match="`sigma_dot` must be given"):
        convert(x, "velocity", "eps", x, 1.0, 1.0, alpha_dot=0.0)
    with pytest.raises(ValueError, match="`value` must be of the shape of `x`"):
        inspect.unwrap(convert)(jnp.ones(2), "eps", "x0", x, 1.0, 1.0)  # without the tests' own type check
    with pytest.raises(ValueError, match="broadcastable to the shape"):
        convert(x, "eps", "x0", x, jnp.ones(2), 1.0)


def test_public_name():
    assert gk.diffusion.convert is convert
