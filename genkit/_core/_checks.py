"""Argument checks: one voice for everything a user can get wrong.

Every message names the argument, what was expected, what came and, where there is something to try, what to try.
Checks on numbers look at concrete values only: a traced value passes, because its value is not known yet.

A check that passes formats nothing. Hand `check` the value itself, which it describes when it fails; a text that must
be composed is given as a function without arguments, or the caller says `if not condition: fail(...)`.
"""

import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


_ARRAYS = (jax.Array, np.ndarray, np.generic)
_LONGEST = 120

Text = str | Callable[[], str]


class NonFiniteError(ValueError):
    """A computation produced NaN or infinity; the message names where and at which step.

    `draws` holds what was computed nevertheless, where the computation was a drawing, and `fitted` what was trained,
    where it was a training.
    """

    draws: PyTree = None
    fitted: PyTree = None


def is_concrete(value: object) -> bool:
    """Return True unless `value` is a tracer, whose numbers are not known yet."""
    return not isinstance(value, jax.core.Tracer)


def describe(value: object) -> str:
    """A short description of `value` for an error message: dtype and shape of arrays, `repr` of the rest."""
    if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, _ARRAYS):
        is_number = jnp.issubdtype(value.dtype, np.number) or jnp.issubdtype(value.dtype, np.bool_)
        if is_number and value.shape == ():
            return repr(value.item())
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    if len(text) > _LONGEST:
        return text[: _LONGEST - 3] + "..."
    return text


def describe_type(value: object) -> str:
    """A description of a value of a wrong kind: arrays and strings as by `describe`, anything else by its type."""
    if isinstance(value, (*_ARRAYS, jax.ShapeDtypeStruct, str)):
        return describe(value)
    return type(value).__name__


def fail(name: Text, expected: Text, got: object, hint: Text = "") -> NoReturn:
    """Raise the error of a check, for callers that have found the fault themselves.

    Args:
        name: the argument; this, `expected` and `hint` may be functions that compose the text.
        expected: what the argument must be.
        got: what came: a text stands as it is, anything else is described.
        hint: what to try.

    Raises:
        ValueError: always.
    """
    if not isinstance(got, str):
        got = describe(got)
    message = f"`{_composed(name)}` must be {_composed(expected)}; got {got}."
    advice = _composed(hint)
    if advice:
        message += " " + advice
    raise ValueError(message)


def check(condition: bool | np.bool_, name: Text, expected: Text, got: object, hint: Text = "") -> None:
    """Raise `ValueError("`name` must be <expected>; got <got>. <hint>")` unless `condition` holds; see `fail`."""
    if not condition:
        fail(name, expected, got, hint)


def _composed(text: Text) -> str:
    if isinstance(text, str):
        return text
    return text()


def check_key(key: object, name: str = "key") -> None:
    """Refuse anything but one typed PRNG key."""
    if not _is_key(key):
        raise TypeError(
            f"`{name}` must be a typed JAX PRNG key; got {describe(key)}. Make one with `jax.random.key(0)` "
            "(`jax.random.PRNGKey` makes the legacy kind; `jax.random.wrap_key_data` converts it)."
        )
    if key.shape != ():
        fail(name, "a single key", f"an array of keys of shape {key.shape}")


def _is_key(value: object) -> TypeGuard[jax.Array]:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a string that is not one of `choices`, proposing the nearest."""
    choices = list(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = ""
    if near:
        hint = f"Did you mean {near[0]!r}?"
    fail(name, f"one of {', '.join(map(repr, choices))}", repr(value), hint)


def check_finite(name: str, value: PyTree, hint: str = "") -> None:
    """Refuse arrays (or trees of arrays) that hold NaN or infinity; integers and keys always pass."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if not is_concrete(leaf) or not _is_inexact(leaf):
            continue
        finite = np.isfinite(np.asarray(leaf))
        if finite.all():
            continue
        first = ()
        if finite.ndim:
            first = tuple(int(i) for i in np.argwhere(~finite)[0])
        message = (
            f"`{name}{jax.tree_util.keystr(path)}` must be finite; got {int((~finite).sum())} NaN or infinite of "
            f"{finite.size} entries, first at {first}."
        )
        if hint:
            message += " " + hint
        raise NonFiniteError(message)


def _is_inexact(leaf: object) -> bool:
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    return isinstance(leaf, (float, complex))


def check_interval(
    name: str, value: object, lo: float = -np.inf, hi: float = np.inf, *, open_lo: bool = False, open_hi: bool = False
) -> None:
    """Refuse numbers or arrays outside `[lo, hi]` (an end is excluded where `open_*` says so), NaN and non-numbers."""
    # Most values are Python numbers well inside: no array is made for them.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and lo < value < hi:
        return
    if not is_concrete(value):
        return
    expected = functools.partial(_interval, lo, hi, open_lo, open_hi)
    if _is_key(value):
        fail(name, f"real and {expected()}", describe(value))
    array = np.asarray(value)
    if not (jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)):
        fail(name, f"real and {expected()}", describe(value))
    # Comparisons with NaN are false, so that NaN is outside every interval.
    inside = (array > lo) & (array < hi)
    if not open_lo:
        inside |= array == lo
    if not open_hi:
        inside |= array == hi
    if not inside.all():
        outside = array.ravel()[~np.ravel(inside)][0]
        fail(name, expected, repr(outside.item()))


def _interval(lo: float, hi: float, open_lo: bool, open_hi: bool) -> str:
    """An interval in words: "positive", "non-negative" or "in [lo, hi)"."""
    if hi == np.inf and lo == 0:
        return "positive" if open_lo else "non-negative"
    left = "[("[bool(open_lo or lo == -np.inf)]
    right = "])"[bool(open_hi or hi == np.inf)]
    return f"in {left}{lo}, {hi}{right}"


def check_positive(name: str, value: object) -> None:
    """Refuse numbers or arrays that are not strictly positive."""
    check_interval(name, value, 0, open_lo=True)


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Refuse anything but a Python (or NumPy) integer of at least `minimum`."""
    # True and False are integers to Python, and never meant as a count.
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        fail(name, f"an integer >= {minimum}", describe(value))


def check_shape(name: str, value: PyTree, shape: Sequence[int | None], why: str = "") -> None:
    """Refuse arrays whose shape differs from `shape`; `None` in `shape` matches any size."""
    got = tuple(np.shape(value))
    if len(got) == len(shape) and all(want is None or want == have for want, have in zip(shape, got, strict=True)):
        return
    expected = ", ".join(map(str, shape)).replace("None", "*")
    if len(shape) == 1:
        expected += ","
    fail(name, f"of shape ({expected})", f"shape {got}", why)
