"""Argument checks: one voice for everything a user can get wrong.

Every message names the argument, what was expected, what came and, where there is something to try, what to try.
Checks on numbers look at concrete values only: a traced value passes, because its value is not known yet.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np


class NonFiniteError(ValueError):
    """A computation produced NaN or infinity; the message names where and at which step.

    `draws` holds what was computed nevertheless, where the computation was a drawing.
    """

    draws: Any = None


def is_concrete(value: Any) -> bool:
    """Whether `value` can be looked at now (it is not a tracer)."""
    return not isinstance(value, jax.core.Tracer)


def describe(value: Any) -> str:
    """A short description of `value` for an error message: dtype and shape of arrays, `repr` of the rest."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if value.shape or not is_concrete(value) or not _is_number(value):
            return f"{value.dtype}{list(value.shape)}"
        return repr(value.item())
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _is_number(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, np.number) or jnp.issubdtype(value.dtype, np.bool_)


def check(condition: bool | np.bool_, name: str, expected: str, got: Any, hint: str = "") -> None:
    """Raise `ValueError("`name` must be <expected>; got <got>. <hint>")` unless `condition` holds."""
    if not condition:
        tail = f" {hint}" if hint else ""
        raise ValueError(f"`{name}` must be {expected}; got {got if isinstance(got, str) else describe(got)}.{tail}")


def check_key(key: Any, name: str = "key") -> None:
    """Refuse anything but one typed PRNG key."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"`{name}` must be a typed JAX PRNG key; got {describe(key)}. Make one with `jax.random.key(0)` "
            "(`jax.random.PRNGKey` makes the legacy kind; `jax.random.wrap_key_data` converts it)."
        )
    check(key.shape == (), name, "a single key", f"an array of keys of shape {key.shape}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a string that is not one of `choices`, proposing the nearest."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else ""
        check(False, name, f"one of {', '.join(map(repr, choices))}", repr(value), hint)


def check_finite(name: str, value: Any, hint: str = "") -> None:
    """Refuse arrays (or trees of arrays) that hold NaN or infinity; integers and keys always pass."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        is_array = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if not is_concrete(leaf) or not (is_array or isinstance(leaf, (float, complex))):
            continue
        finite = np.isfinite(np.asarray(leaf))
        if not finite.all():
            where = name + jax.tree_util.keystr(path)
            first = tuple(int(i) for i in np.argwhere(~finite)[0]) if finite.ndim else ()
            count = int((~finite).sum())
            raise NonFiniteError(
                f"`{where}` must be finite; got {count} NaN or infinite of {finite.size} entries, first at {first}."
                + (f" {hint}" if hint else "")
            )


def check_interval(
    name: str, value: Any, lo: float = -np.inf, hi: float = np.inf, *, open_lo: bool = False, open_hi: bool = False
) -> None:
    """Refuse numbers or arrays outside `[lo, hi]` (an end is excluded where `open_*` says so), NaN and non-numbers."""
    if not is_concrete(value):
        return
    left, right = "(" if open_lo or lo == -np.inf else "[", ")" if open_hi or hi == np.inf else "]"
    if hi == np.inf and lo == 0:
        expected = "positive" if open_lo else "non-negative"
    else:
        expected = f"in {left}{lo}, {hi}{right}"
    is_key = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    array = np.empty(0, object) if is_key else np.asarray(value)
    if not (jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)):
        check(False, name, f"real and {expected}", describe(value))
    above = array > lo if open_lo else array >= lo
    below = array < hi if open_hi else array <= hi
    if not (above & below).all():
        bad = array[~(above & below)].ravel()[0] if array.ndim else array
        check(False, name, expected, repr(bad.item()))


def check_positive(name: str, value: Any) -> None:
    """Refuse numbers or arrays that are not strictly positive."""
    check_interval(name, value, 0, open_lo=True)


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Refuse anything but a Python (or NumPy) integer of at least `minimum`."""
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    check(ok and value >= minimum, name, f"an integer >= {minimum}", describe(value))


def check_shape(name: str, value: Any, shape: Sequence[int | None], why: str = "") -> None:
    """Refuse arrays whose shape differs from `shape`; `None` in `shape` matches any size."""
    got = tuple(np.shape(value))
    ok = len(got) == len(shape) and all(want is None or want == have for want, have in zip(shape, got, strict=True))
    want = "(" + ", ".join("*" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "") + ")"
    check(ok, name, f"of shape {want}", f"shape {got}", why)
