"""Argument checks: the message names the argument, what was expected, what came and what to try."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genkit._core._checks import (
    NonFiniteError,
    check,
    check_choice,
    check_count,
    check_finite,
    check_interval,
    check_key,
    check_positive,
    check_shape,
    describe,
    describe_type,
    is_concrete,
)


BAD = {
    "check": (lambda: check(False, "n", "even", 3), "`n` must be even; got 3."),
    "check, hint": (lambda: check(False, "n", "even", 3, "Try 4."), "`n` must be even; got 3. Try 4."),
    "check, text": (lambda: check(False, "n", "even", "three apples"), "`n` must be even; got three apples."),
    "check, numpy bool": (lambda: check(np.bool_(False), "n", "even", 3), "`n` must be even; got 3."),
    "key array": (
        lambda: check_key(jax.random.split(jax.random.key(0), 3)),
        "`key` must be a single key; got an array of keys of shape (3,).",
    ),
    "choice": (
        lambda: check_choice("kind", "karas", ["karras", "uniform"]),
        "`kind` must be one of 'karras', 'uniform'; got 'karas'. Did you mean 'karras'?",
    ),
    "choice, far": (lambda: check_choice("kind", "xyz", ("I", "II")), "`kind` must be one of 'I', 'II'; got 'xyz'."),
    "choice, not text": (lambda: check_choice("kind", None, ["I"]), "`kind` must be one of 'I'; got None."),
    "finite, array": (
        lambda: check_finite("x", jnp.array([[1.0, jnp.nan], [jnp.inf, 0.0]])),
        "`x` must be finite; got 2 NaN or infinite of 4 entries, first at (0, 1).",
    ),
    "finite, tree": (
        lambda: check_finite("batch", {"a": np.ones(2), "b": (np.float32(np.nan),)}, "Drop such rows."),
        "`batch['b'][0]` must be finite; got 1 NaN or infinite of 1 entries, first at (). Drop such rows.",
    ),
    "finite, Python float": (lambda: check_finite("x", [1.0, float("nan")]), "`x[1]` must be finite"),
    "finite, bfloat16": (lambda: check_finite("x", jnp.full(2, jnp.inf, jnp.bfloat16)), "2 NaN or infinite of 2"),
    "finite, complex": (lambda: check_finite("x", jnp.array([1j * jnp.nan])), "1 NaN or infinite of 1"),
    "interval": (lambda: check_interval("eta", 1.5, 0.1, 1.0), "`eta` must be in [0.1, 1.0]; got 1.5."),
    "interval, open": (
        lambda: check_interval("q", 0, 0, 1, open_lo=True, open_hi=True),
        "`q` must be in (0, 1); got 0.",
    ),
    "interval, half line": (lambda: check_interval("x", -3.0, -2.0), "`x` must be in [-2.0, inf); got -3.0."),
    "interval, array": (
        lambda: check_interval("t", jnp.array([0.5, 2.0, 3.0]), 0, 1),
        "`t` must be in [0, 1]; got 2.0.",
    ),
    "interval, NaN": (lambda: check_interval("t", np.nan, 0, 1), "`t` must be in [0, 1]; got nan."),
    "interval, text": (lambda: check_interval("t", "abc", 0, 1), "`t` must be real and in [0, 1]; got 'abc'."),
    "interval, None": (lambda: check_interval("t", None, 0, 1), "`t` must be real and in [0, 1]; got None."),
    "interval, complex": (lambda: check_interval("t", 1j, 0, 1), "`t` must be real and in [0, 1]; got 1j."),
    "interval, key": (lambda: check_interval("t", jax.random.key(0)), "`t` must be real and in (-inf, inf)"),
    "positive": (lambda: check_positive("sigma", 0.0), "`sigma` must be positive; got 0.0."),
    "non-negative": (lambda: check_interval("sigma", -1, 0), "`sigma` must be non-negative; got -1."),
    "positive, bfloat16": (lambda: check_positive("s", jnp.bfloat16(-1)), "`s` must be positive; got -1.0."),
    "count": (lambda: check_count("num_steps", 0), "`num_steps` must be an integer >= 1; got 0."),
    "count, float": (lambda: check_count("num_steps", 3.0), "`num_steps` must be an integer >= 1; got 3.0."),
    "count, bool": (lambda: check_count("num_steps", True), "`num_steps` must be an integer >= 1; got True."),
    "count, text": (lambda: check_count("num_steps", "3"), "`num_steps` must be an integer >= 1; got '3'."),
    "count, minimum": (lambda: check_count("order", np.int64(1), 2), "`order` must be an integer >= 2; got 1."),
    "shape": (lambda: check_shape("x", jnp.ones((2, 3)), (2, 4)), "`x` must be of shape (2, 4); got shape (2, 3)."),
    "shape, wildcard": (
        lambda: check_shape("x", np.ones(3), (None, 4), "One row per draw."),
        "`x` must be of shape (*, 4); got shape (3,). One row per draw.",
    ),
    "shape, one axis": (lambda: check_shape("x", 1.0, (5,)), "`x` must be of shape (5,); got shape ()."),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_values_are_refused_in_one_voice(name):
    run, message = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        run()
    assert message in str(caught.value)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 0, None, np.zeros(2, np.uint32), "key"])
def test_anything_but_a_typed_key_is_refused(key):
    with pytest.raises(
        TypeError, match=r"`noise_key` must be a typed JAX PRNG key; got .* Make one with `jax.random.key"
    ):
        check_key(key, "noise_key")


def test_right_values_pass():
    check(True, "n", "even", 3)
    check_key(jax.random.key(0))
    check_key(jax.random.key(0, impl="rbg"))
    check_choice("kind", "I", iter(["I", "II"]))
    check_finite(
        "tree", {"x": jnp.ones(3), "n": 3, "label": jnp.array(-1), "key": jax.random.key(0), "f": 1.0, "s": "a"}
    )
    check_finite("empty", np.zeros((0, 3)))
    check_interval("t", [0.0, 1.0], 0, 1)
    check_interval("t", np.zeros((0,)), 0, 1)
    check_interval("anything", -1e30)
    check_positive("sigma", 3)
    check_count("n", np.int32(4), 4)
    check_shape("x", np.ones((7, 4)), (None, 4))
    check_shape("x", jax.random.split(jax.random.key(0), 3), (3,))
    check_shape("x", 2.0, ())


def test_traced_values_pass():
    # Their values are not known while tracing; the drivers check them at run time.
    @jax.jit
    def traced(x, key):
        assert not is_concrete(x)
        check_finite("x", {"x": x})
        check_interval("x", x, 0, 1)
        check_positive("x", x)
        check_shape("x", x, (2,))
        check_key(key)
        return x

    assert is_concrete(traced(jnp.array([-5.0, jnp.nan]), jax.random.key(0)))


def test_keys_pass_under_vmap():
    keys = jax.random.split(jax.random.key(0), 4)

    def draw(key):
        check_key(key)
        return jax.random.normal(key)

    assert jax.vmap(draw)(keys).shape == (4,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (jnp.ones((2, 3)), "float32[2, 3]"),
        (np.zeros(0, np.int64), "int64[0]"),
        (jnp.float32(0.5), "0.5"),
        (np.float64(-2.0), "-2.0"),
        (jnp.array(True), "True"),
        (jax.random.key(0), "key<fry>[]"),
        ("short", "'short'"),
        ("x" * 500, "'" + "x" * 116 + "..."),
        (None, "None"),
    ],
)
def test_descriptions_are_short(value, text):
    assert describe(value) == text
    assert len(describe(value)) <= 120


def test_tracers_are_described_by_type():
    seen = []
    jax.jit(lambda x: seen.append(describe(x)) or x)(jnp.float32(1.0))
    assert seen == ["float32[]"]


def test_the_exception_is_a_value_error_and_exported():
    import genkit as gk

    assert gk.NonFiniteError is NonFiniteError
    assert issubclass(NonFiniteError, ValueError)


class Unprintable:
    def __repr__(self):
        raise AssertionError("a check that passes formats nothing")

    __str__ = __repr__


def test_checks_that_pass_format_nothing():
    def compose():
        raise AssertionError("a check that passes composes no text")

    check(True, compose, compose, Unprintable(), compose)


def test_texts_may_be_functions():
    with pytest.raises(ValueError, match=r"^`n` must be even; got 3\. Try 4\.$"):
        check(False, lambda: "n", lambda: "even", 3, lambda: "Try 4.")


@pytest.mark.parametrize(("value", "text"), [(jnp.ones(3), "float32[3]"), ("name", "'name'"), ({}, "dict"), (3, "int")])
def test_values_of_a_wrong_kind_are_described_by_type(value, text):
    assert describe_type(value) == text
