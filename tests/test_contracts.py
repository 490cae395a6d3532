"""One battery that every concrete public module passes.

The cases live beside the tests of each submodule, in `tests/<submodule>/contracts.py`, as a list `CASES` of
`contract.Case`: a new class lands with a line there. `test_every_public_module_has_a_case` holds that.
"""

import functools
import importlib.util
import inspect
import re
from pathlib import Path

import contract
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit


def collect() -> dict[str, contract.Case]:
    cases = {}
    for path in sorted(Path(__file__).parent.glob("*/contracts.py")):
        spec = importlib.util.spec_from_file_location(f"contracts_{path.parent.name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for case in module.CASES:
            name = f"{path.parent.name}: {case.name}"
            assert name not in cases, f"two cases are called {name!r}"
            cases[name] = case
    return cases


CASES = collect()


def each(condition=lambda case: True):
    """Run a test on the cases to which it applies."""
    chosen = [pytest.param(case, id=name) for name, case in CASES.items() if condition(case)]
    return pytest.mark.parametrize("case", chosen)


def is_public(space) -> bool:
    return space.__name__.startswith("genkit.") and not space.__name__.startswith("genkit._")


def public_modules() -> set[type]:
    spaces = [genkit, *(v for name in dir(genkit) if inspect.ismodule(v := getattr(genkit, name)) and is_public(v))]
    found = {
        v
        for space in spaces
        for name in dir(space)
        if not name.startswith("_") and inspect.isclass(v := getattr(space, name))
    }
    ours = {cls for cls in found if issubclass(cls, eqx.Module) and cls.__module__.startswith("genkit.")}
    ours = {cls for cls in ours if not cls.__name__.startswith("Abstract")}  # some have defaults for everything
    return {cls for cls in ours if not inspect.isabstract(cls) and not getattr(cls, "__abstractvars__", ())}


def test_every_public_module_has_a_case():
    covered = {cls for case in CASES.values() for cls in case.classes()}
    lacking = sorted(f"{cls.__module__}.{cls.__name__}" for cls in public_modules() - covered)
    assert not lacking, f"add a Case to tests/<submodule>/contracts.py for: {', '.join(lacking)}"


def allclose(a, b, rtol=1e-5, atol=1e-5):
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x.astype(np.float64), y.astype(np.float64), rtol=rtol, atol=atol)


@each()
def test_round_trip_through_leaves(case):
    module = case.made
    leaves, structure = jax.tree.flatten(module)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(module)
    assert eqx.tree_equal(again, module)


@each()
def test_same_arguments_same_structure(case):
    # Static fields must compare equal and hash: otherwise every new object compiles again.
    first, second = case.made, case.make()
    arrays, static = eqx.partition(first, eqx.is_array)
    arrays_again, static_again = eqx.partition(second, eqx.is_array)
    assert jax.tree.structure(static) == jax.tree.structure(static_again)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))
    assert jax.tree.structure(arrays) == jax.tree.structure(arrays_again)


@each()
def test_numbers_are_arrays(case):
    loose = [
        f"{jax.tree_util.keystr(path)} = {leaf!r}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(case.made)
        if isinstance(leaf, (bool, int, float, complex))
    ]
    assert not loose, f"Python numbers as leaves are static under filter_jit: {loose}"


@each()
def test_immutable(case):
    module = case.made
    with pytest.raises(AttributeError):
        module.no_such_field = 1


@each()
def test_repr_is_readable(case):
    module = case.made
    text = re.sub(r"<numpyro\.\S+ object at 0x\w+", "", repr(module))  # numpyro's laws do not do better
    assert type(module).__name__ in text
    assert " at 0x" not in text, f"an address in {text!r}: use a module or a named function instead of a lambda"


@each(lambda case: case.use)
def test_jit_equals_eager_and_compiles_once(case, compilations):
    run = eqx.filter_jit(case.use)
    first, same = case.made, case.make()
    jitted = run(first)
    if case.eager:
        allclose(jitted, case.use(first), case.rtol, case.rtol)
    with compilations() as count:
        run(same)
    assert count() == 0


@pytest.mark.slow
@each(lambda case: case.use and case.vmap)
def test_vmap_equals_loop(case):
    module = case.made
    twice = jax.tree.map(lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x, module)
    mapped = eqx.filter_jit(eqx.filter_vmap(case.use, in_axes=(eqx.if_array(0),)))(twice)
    alone = eqx.filter_jit(case.use)(module)
    allclose(jax.tree.map(lambda x: x[1], mapped), alone, case.rtol, case.rtol)


@each(lambda case: case.use and case.dtype)
@pytest.mark.parametrize("double", [False, True])
def test_dtype_is_kept(case, double):
    with jax.enable_x64(double):
        run = (lambda: case.use(case.make())) if not case.eager else functools.partial(case.use, case.make())
        outputs = jax.tree.leaves(eqx.filter_eval_shape(run))
        wanted = jnp.float64 if double else jnp.float32
        floating = [x for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)]
        assert floating, "the case returns no floating array: set dtype=False"
        assert {str(x.dtype) for x in floating} == {jnp.dtype(wanted).name}


@pytest.mark.slow
@each(lambda case: case.use and case.grad)
def test_gradients_are_finite(case):

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(module):
        outputs = jax.tree.leaves(case.use(module))
        return sum(jnp.sum(x) for x in outputs if jnp.issubdtype(x.dtype, jnp.floating))

    gradients = jax.tree.leaves(gradient(case.made))
    assert gradients, "no floating leaves: set grad=False"
    assert all(np.isfinite(g).all() for g in gradients)
    assert case.zero_grad or any(np.any(np.asarray(g) != 0) for g in gradients)
