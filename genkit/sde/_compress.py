"""Compression of rows by QR, with derivatives that rank-deficient rows (fast processes forget) do not harm.

Only R'R of a QR matters, so its derivative may be taken in any gauge: dR = Q'dV, which needs no inverse, leaves out
(dQ)'V, which is 0 where dQ R = (I - QQ') dV. It is exact for R'R: R'dR + dR'R = V'dV + dV'V. Higher derivatives use
that dQ and are exact wherever the null space of V is the same nearby.

Both are primitives of their own: reverse mode through `jax.lax.scan` drops the rule of a `jax.custom_jvp`, so that
forward mode on top, as in `jax.hessian`, would differentiate the QR itself; the rule of a primitive stays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def _transposed(v: Array) -> Array:
    return jnp.swapaxes(v, -1, -2)


def _primitive(name: str, function: Callable, rule: Callable) -> Callable:
    """`function` of one array, leading axes batched, whose derivative is `rule(v, dv)` in every order and mode."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function))
    primitive.def_abstract_eval(lambda v: ShapedArray((out := jax.eval_shape(function, v)).shape, out.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda vs, axes: (primitive.bind(jnp.moveaxis(vs[0], axes[0], 0)), 0)
    ad.primitive_jvps[primitive] = lambda primals, tangents: (primitive.bind(*primals), rule(*primals, *tangents))
    return primitive.bind


def _basis_tangent(v: Array, dv: Array) -> Array:
    q = _basis(v)
    outside = dv - q @ (_transposed(q) @ dv)
    tolerance = 1e3 * jnp.finfo(v.dtype).eps
    return outside @ jnp.linalg.pinv(_transposed(q) @ v, rtol=tolerance)


_basis = _primitive("orthonormal_basis", lambda v: jnp.linalg.qr(v)[0], _basis_tangent)
_rows = _primitive("compress", lambda v: _transposed(_basis(v)) @ v, lambda v, dv: _transposed(_basis(v)) @ dv)


def compress(v: Array) -> Array:
    """Rows R (n, n) with R'R = V'V, from V (m, n), m >= n (leading axes batched)."""
    return _rows(v)
