"""Loops, maps and branches that may hold sites."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree
from numpyro.primitives import _PYRO_STACK as _NUMPYRO_STACK

from .._core._checks import check
from ._frame import (
    Abort,
    Context,
    Frame,
    Pending,
    Score as ScoreTerm,
    active,
    current_frame,
    exact_state,
    fold_name,
    is_exact,
    many,
)
from ._multishot import contrast
from ._run import Record, Run, Site, current_run


# The arrays a body hands out of its loop, besides its result.
_Out = dict[str, Any]


def _body(fn: Callable[[], Any], values: dict[str, Any], key: Any, index: Any, static: dict) -> tuple[Any, _Out]:
    """Run one step under its own frame and record; everything collected leaves as arrays.

    `static["plate"]` names a plate along which scores stay apart.
    """
    run, parent = current_run(), current_frame()
    frame = None
    if parent is not None:
        context = parent.context._replace(key=key)
        frame = Frame(context, parent, (*parent.path, index))
        frame.scope = parent.scope
    out: _Out = {}
    with active(frame):
        if run is None:
            result, record = fn(), Record()
        else:
            with run.nested(values, key, frame) as record:
                result = fn()
    out["values"] = dict(record.values)
    out["auxiliary"] = dict(record.auxiliary)
    out["indices"] = dict(record.indices)
    out["deterministic"] = dict(record.deterministic)
    out["log_prob"] = {name: site.log_prob for name, site in record.sites.items()}
    out["scale"] = {name: site.scale for name, site in record.sites.items()}
    static["sites"] = {name: (s.observed, s.auxiliary, s.support) for name, s in record.sites.items()}
    static["used"] = record.used
    if frame is not None:
        plate = static.get("plate")
        parts = [along_plate(s.log_prob, s.plates, plate) for s in frame.scores]
        out["scores"] = sum(parts[1:], parts[0]) if parts else None
        out["group"] = sum((jnp.sum(s.log_prob) for s in frame.group), jnp.zeros(())) if frame.group else None
        out["log_weight"] = frame.log_weight
        out["zeros"] = sum((jnp.sum(z) for z in frame.zeros), jnp.zeros(())) if frame.zeros else None
        out["pending"] = {name: (p.alts, p.coefficients) for name, p in frame.pending.items()}
        static["keep"] = {name: p.keep_gradient for name, p in frame.pending.items()}
    return result, out


def along_plate(log_prob: Any, plates: tuple, name: str | None) -> Any:
    """Sum a site's log-density over everything but the plate `name` (over everything, for None)."""
    if name is None:
        return jnp.sum(log_prob)
    dims = [frame.dim for frame in plates if frame.name == name]
    if not dims:
        raise ValueError(
            f"`plate` must hold every site that is weighed per member; got a site outside plate {name!r} "
            f"(its plates: {[frame.name for frame in plates]}). Give sites outside the plate their own term, or "
            "leave `plate` out."
        )
    axis = jnp.ndim(log_prob) + dims[0]
    return jnp.sum(log_prob, tuple(i for i in range(jnp.ndim(log_prob)) if i != axis))


def _merge(out: _Out, static: dict, scope: str) -> None:
    """Put what a loop collected into the surrounding record and frame."""
    run, frame = current_run(), current_frame()
    if run is not None and run.mode != "boundary":
        record = run.record
        clash = set(out["log_prob"]) & set(record.sites)
        if clash:
            raise ValueError(f"`name` must be new at every site of a program; got {sorted(clash)[0]!r} twice.")
        record.values.update(out["values"])
        record.auxiliary.update(out["auxiliary"])
        record.indices.update(out["indices"])
        record.deterministic.update(out["deterministic"])
        record.used |= static["used"]
        for name, (observed, auxiliary, support) in static["sites"].items():
            scale = out["scale"][name]
            log_prob = out["log_prob"][name]
            if scale is not None:
                extra = jnp.ndim(log_prob) - jnp.ndim(scale)
                log_prob = log_prob * jnp.reshape(scale, jnp.shape(scale) + (1,) * extra)
            support = support if support is None or not _has_tracer(support) else None
            record.sites[name] = Site(log_prob, None, (), observed, auxiliary, scope, None, support)
    if frame is None:
        return
    if out["scores"] is not None:
        frame.scores.append(ScoreTerm(scope, jnp.sum(out["scores"]), ()))
    if out["group"] is not None:
        frame.group.append(ScoreTerm(scope, jnp.sum(out["group"]), ()))
    if out["log_weight"] is not None:
        weight = jnp.sum(out["log_weight"])
        frame.log_weight = weight if frame.log_weight is None else frame.log_weight + weight
    if out["zeros"] is not None:
        frame.zeros.append(jnp.sum(out["zeros"]))
    if frame.inner:
        for name, (alts, coefficients) in out["pending"].items():
            frame.pending[name] = Pending(alts, coefficients, static["keep"][name])


def _has_tracer(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _looped(kind: str, execute: Callable[[Any, dict], tuple[Any, _Out]]) -> Any:
    """Run a loop inside the current frame: remember its result, or replay it for its alternatives."""
    frame, run = current_frame(), current_run()
    if frame is None:
        assert run is not None  # callers outside both went to JAX's own loops
        static: dict = {}
        key = None if run.key is None else fold_name(run.key, f"{kind}{len(run.record.sites)}")
        result, out = execute(key, static)
        _merge(out, static, kind)
        return result
    frame.check_trace(f"gk.vi.{kind}")
    name = frame.fresh(kind)
    address = "/".join((*frame.scope, name))
    if address in frame.context.memo:
        result, out, static = frame.context.memo[address]
        run_only = {**out, "scores": None, "group": None, "log_weight": None, "zeros": None, "pending": {}}
        _merge(run_only, static, address)
        return result
    static = {}
    state, forcing = exact_state(), [t for site, (_, _, t) in frame.context.override.items() if _under(site, address)]
    start = 0 if state is None else len(state.log)
    if state is not None and forcing:
        state.tape = list(forcing[0])
    with frame.within(name):
        result, out = execute(frame.key(address), static)
    static["tape"] = [] if state is None else state.log[start:]
    forced = bool(forcing)
    if out["pending"] and not frame.inner and not forced:
        token = frame.context.options.token
        steps = [np.shape(c) for _, c in out["pending"].values()]
        raise Abort(token, address, _resume_alternatives(address, (result, out, static), steps), 1)
    _merge(out, static, address)
    frame.memo[address] = (result, out, static)
    return result


def _under(site: str, address: str) -> bool:
    return site.startswith(address + "/")


def _resume_alternatives(address: str, base: tuple, shapes: list) -> Callable:
    """Compare the loop as it ran with the loop replayed under each alternative of each step."""

    def resume(run: Callable, context: Context) -> Any:
        result, out, static = base
        inner = context._replace(copies=False)
        # The scores of the loop itself belong to each replay, so the remembered base run must add its own.
        value = run(inner._replace(memo={**inner.memo, address: (result, out, static)})) * _scores_of(out)
        total = value + _zeros_of(out)
        for (site, (alts, coefficients)), shape in zip(out["pending"].items(), shapes, strict=True):
            steps = np.stack(np.unravel_index(np.arange(int(np.prod(shape))), shape), -1)[:, :-1]
            flat = alts.reshape(-1, *alts.shape[len(shape) :])

            def replay(pair: tuple, site: str = site) -> Any:
                step, alternative = pair
                override = {**inner.override, site: (tuple(step), alternative, static["tape"])}
                return run(inner._replace(override=override))

            values = many(replay, (steps, flat))
            total = total + contrast(value, values, coefficients.reshape(-1), static["keep"][site])
        return total

    return resume


def _scores_of(out: _Out) -> Any:
    """The factor a remembered loop contributes to what follows it."""
    factor = jnp.ones(())
    if out["scores"] is not None:
        score = jnp.sum(out["scores"])
        factor = factor * jnp.exp(score - jax.lax.stop_gradient(score))
    if out["log_weight"] is not None:
        factor = factor * jnp.exp(jnp.sum(out["log_weight"]))
    return factor


def _zeros_of(out: _Out) -> Any:
    return jnp.zeros(()) if out["zeros"] is None else jnp.sum(out["zeros"])


def _values_for(run: Run | None, length: int) -> tuple[dict, dict]:
    """Split the values given to a program into those a loop of this length could slice and the others."""
    if run is None:
        return {}, {}
    sliced = {k: v for k, v in run.values.items() if np.ndim(v) > 0 and np.shape(v)[0] == length}
    return sliced, {k: v for k, v in run.values.items() if k not in sliced}


def scan(
    f: Callable, init: PyTree, xs: PyTree = None, length: int | None = None, *, reverse: bool = False
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` whose body may hold sites.

    Inside a program the values of a site are stacked along a new leading axis under the site's name. Local strategies
    run once; `Lanes`, `MVD` and `Enum` replay the loop once per step and alternative.

    Args:
        f: `(carry, x) -> (carry, y)`; may hold sites.
        init: the initial carry.
        xs: arrays with a common leading axis, or None.
        length: number of steps, needed where `xs` is None.
        reverse: run from the last step to the first.

    Returns:
        The final carry and the stacked outputs.

    Raises:
        ValueError: if neither `xs` nor `length` says the number of steps.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> step = lambda m: lambda total, _: (total + vi.sample("x", dist.Normal(m, 1.0)), None)
        >>> fn = lambda m: vi.scan(step(m), jnp.zeros(()), None, length=3)[0]
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.0))
        3.0
    """
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(xs)}
    if length is not None:
        sizes.add(length)
    check(len(sizes) == 1, "length", "given, and equal to the leading axis of every array in `xs`", sorted(sizes))
    size = sizes.pop()
    run = current_run()
    if run is None and current_frame() is None:
        if _NUMPYRO_STACK:
            from numpyro.contrib.control_flow import scan as numpyro_scan

            return numpyro_scan(f, init, xs, length=length, reverse=reverse)
        return jax.lax.scan(f, init, xs, length=length, reverse=reverse)
    sliced, rest = _values_for(run, size)

    def execute(key: Any, static: dict) -> tuple[Any, _Out]:
        def step(carry: Any, item: tuple) -> tuple[Any, tuple]:
            index, x, values = item
            here = None if key is None else jr.fold_in(key, index)
            (carry, y), out = _body(lambda: f(carry, x), {**rest, **values}, here, index, static)
            return carry, (y, out)

        items = (np.arange(size), xs, sliced)
        carry, (ys, out) = _scan_or_loop(step, init, items, size, reverse)
        return (carry, ys), out

    return _looped("scan", execute)


def _scan_or_loop(step: Callable, init: Any, items: Any, size: int, reverse: bool) -> tuple[Any, Any]:
    """`lax.scan`, unrolled while draws are being enumerated."""
    if not is_exact():
        return jax.lax.scan(step, init, items, reverse=reverse)
    carry, outs = init, []
    order = range(size - 1, -1, -1) if reverse else range(size)
    for i in order:
        carry, out = step(carry, jax.tree.map(lambda a, i=i: a[i], items))
        outs.append(out)
    if reverse:
        outs.reverse()
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def vmap(f: Callable, in_axes: int | tuple | None = 0) -> Callable:
    """`jax.vmap` of a function that may hold sites: every lane draws for itself.

    Inside a program the values of a site get a new leading axis under the site's name.

    Args:
        f: the function of one lane.
        in_axes: the mapped axis, or one per positional argument, as in `jax.vmap`; None for arguments not mapped.

    Returns:
        The mapped function of positional arguments.

    Raises:
        ValueError: if no argument is mapped or sizes differ.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from genkit import vi
        >>> lane = lambda m: lambda w: w * vi.sample("x", dist.Normal(m, 1.0))
        >>> fn = lambda m: jnp.sum(vi.vmap(lane(m))(jnp.arange(3.0)))
        >>> float(jax.grad(lambda m: vi.E(fn)(m, key=jax.random.key(0)))(0.0))
        3.0
    """

    def mapped(*args: Any) -> Any:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        check(len(axes) == len(args), "in_axes", "one entry per positional argument", axes)
        moved = [
            a if ax is None else jax.tree.map(lambda leaf, ax=ax: jnp.moveaxis(leaf, ax, 0), a)
            for a, ax in zip(args, axes, strict=True)
        ]
        mapped_args = [m for m, ax in zip(moved, axes, strict=True) if ax is not None]
        sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(mapped_args)}
        check(len(sizes) == 1, "in_axes", "such that all mapped arguments have one common size", sorted(sizes))
        size = sizes.pop()

        def lane(items: list) -> Any:
            rest = iter(items)
            return f(*[m if ax is None else next(rest) for m, ax in zip(moved, axes, strict=True)])

        return _vmap_lanes(lane, mapped_args, size)

    return mapped


def _vmap_lanes(lane: Callable, items: Any, size: int) -> Any:
    run = current_run()
    if run is None and current_frame() is None:
        if _NUMPYRO_STACK:
            from numpyro.contrib.control_flow import scan as numpyro_scan

            return numpyro_scan(lambda c, x: (c, lane(x)), 0, items, length=size)[1]
        return jax.vmap(lane)(items)
    sliced, rest = _values_for(run, size)

    def execute(key: Any, static: dict) -> tuple[Any, _Out]:
        def one(item: tuple) -> tuple[Any, _Out]:
            index, x, values = item
            here = None if key is None else jr.fold_in(key, index)
            return _body(lambda: lane(x), {**rest, **values}, here, index, static)

        return many(one, (np.arange(size), items, sliced))

    return _looped("vmap", execute)
