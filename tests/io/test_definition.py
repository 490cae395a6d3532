"""Definition files: run by path, checked by name and type, refused in one clear line."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit as gk
from genkit.io import DefinitionError, load_definition, with_needs


RECIPE = '''"""A constant."""
import jax, jax.numpy as jnp, optax
import genkit as gk

loss = lambda model, batch, *, key: (jnp.mean((model - batch) ** 2), {})
draw = jax.tree_util.Partial(lambda key: 3.0 + jax.random.normal(key, (8,)))
recipe = gk.Recipe(lambda key: jnp.zeros(()), draw, gk.Phase(loss, optax.adam(0.1)), num_steps=30, ema=0.9)
'''

STUDENT = '''"""Learns from a teacher."""
import jax, jax.numpy as jnp, optax
import genkit as gk

needs = {"teacher": "models/constant.py"}


def build(key, *, teacher):
    return {"student": jnp.zeros(()), "teacher": teacher}


loss = lambda model, batch, *, key: ((model["student"] - model["teacher"]) ** 2, {})
draw = jax.tree_util.Partial(lambda key: jnp.zeros(()))
recipe = gk.Recipe(build, draw, gk.Phase(loss, optax.sgd(0.4), where=lambda m: m["student"]), num_steps=20)
'''


@pytest.fixture
def write(tmp_path):
    def write(text, name="m.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_loads_what_the_file_binds(write):
    path = write(RECIPE)
    definition = load_definition(path)
    assert (definition.kind, definition.doc, definition.needs) == ("recipe", "A constant.", {})
    assert isinstance(gk.load(path), gk.Recipe) and gk.load(path).source.text == path.read_bytes()
    problem = gk.load(write("import genkit as gk\nproblem = gk.Problem(lambda x: x, (1,))"))
    assert isinstance(problem, gk.Problem) and problem.args == (1,)
    sampler = "import genkit as gk\nfrom genkit.diffusion import ddim, karras\nsampler = {}ddim(karras(4, 0.1, 1.0)){}"
    assert isinstance(gk.load(write(sampler.format("", ""))), gk.Table)
    assert isinstance(gk.load(write(sampler.format("gk.Sampler(", ")"))), gk.AbstractSampler)
    method = "class Method:\n    def run(self, problem, *, key): ...\nsampler = Method()"
    assert hasattr(gk.load(write(method)), "run")


def test_leaves_no_trace_beside_the_file_and_reads_no_cache(write, tmp_path):
    path = write("import genkit as gk\nproblem = gk.Problem(lambda: 1)")
    before = set(sys.modules)
    gk.load(path)
    added = set(sys.modules) - before
    assert len(added) == 1 and added.pop().startswith("_genkit_definition_m_")
    assert [p.name for p in tmp_path.iterdir()] == ["m.py"]
    # Same size, same second: Python's bytecode cache would not notice.
    write("import genkit as gk\nproblem = gk.Problem(lambda: 2)")
    assert gk.load(path).model() == 2


def test_dataclasses_and_type_hints_of_the_file_work(write):
    text = "import dataclasses, typing\nimport equinox as eqx, genkit as gk\n"
    text += "class Net(eqx.Module):\n    w: 'float' = 1.0\n"
    text += "assert typing.get_type_hints(Net) == {'w': float}\nproblem = gk.Problem(Net)"
    assert gk.load(write(text)).model().w == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1",
            r"must bind `recipe` \(a gk.Recipe\) or `problem` \(a gk.Problem\) or .*; found: x \(an int\).",
        ),
        ("", "found: nothing."),
        ("import os", "found: nothing."),
        ("recipe = 3", r"m.py must bind `recipe` to a gk.Recipe; found: an int."),
        ("import genkit as gk\nrecipe = gk.Recipe", "m.py must bind `recipe` to a gk.Recipe; found: the class Recipe"),
        ("problem = 'p'", "m.py must bind `problem` to a gk.Problem; found: a str."),
        (
            "sampler = 'heun'",
            "m.py must bind `sampler` to a sampler for gk.sample or a method for gk.infer; found: a str",
        ),
        ("recipe = 1\nproblem = 2", "must bind exactly one of .*; found: `recipe` and `problem`"),
        ("x = (1,\ny = 2", r"m.py, line 1: '\(' was never closed in `x = \(1,`"),
        ("\n\ndef f(:\n    pass", r"m.py, line 3: .* in `def f\(:`"),
        ("x = 'a\x00b'", "m.py"),
        ("import genkit as gk\n\nx = undefined", "m.py, line 3: NameError: name 'undefined' is not defined"),
        ("import no_such_package", "m.py, line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f():\n    return 1 / 0\n\nf()", "m.py, line 2: ZeroDivisionError: division by zero"),
        ("import genkit as gk\nrecipe = gk.Recipe(3, 3, [], 0)", "m.py, line 2: "),
        (
            "needs = ['a']\nimport genkit as gk\nproblem = gk.Problem(len)",
            r"must bind `needs` to a dict .*; found: \['a'\]",
        ),
        ("needs = {'a b': 'x'}\nimport genkit as gk\nproblem = gk.Problem(len)", "must bind `needs` to a dict"),
    ],
)
def test_files_that_are_refused(write, text, message):
    with pytest.raises(DefinitionError, match=message):
        gk.load(write(text))
    assert not [name for name in sys.modules if name.startswith("_genkit_definition_m_") and "NameError" in name]


def test_only_the_kinds_asked_for(write):
    path = write("import genkit as gk\nproblem = gk.Problem(len)")
    with pytest.raises(DefinitionError, match=r"must bind `recipe` \(a gk.Recipe\); found: problem \(a Problem\)"):
        load_definition(path, ("recipe",))


def test_paths_that_are_no_definition_files(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"nothing to load at .*gone.py"):
        gk.load(tmp_path / "gone.py")
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        gk.load(tmp_path)
    with pytest.raises(gk.CorruptFileError, match="neither a definition file .* nor an array file"):
        gk.load(write("x = 1", "m.txt"))
    with pytest.raises(DefinitionError, match=r"does not end in .py"):
        load_definition(write("x = 1", "m.txt"))


def test_interrupts_pass(write):
    with pytest.raises(KeyboardInterrupt):
        gk.load(write("raise KeyboardInterrupt"))


# Run folders


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_run_folders_are_self_contained(write, tmp_path):
    path = write(RECIPE)
    fitted = gk.fit(gk.load(path), key=jax.random.key(0), run=tmp_path / "run")
    assert (tmp_path / "run" / "definition.py").read_bytes() == path.read_bytes()
    path.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded = gk.load(tmp_path / "moved")
    assert same(fitted.state, loaded.state) and same(fitted.ema, loaded.ema) and same(fitted.log, loaded.log)


def test_an_edited_file_does_not_continue_a_run(write, tmp_path):
    path = write(RECIPE)
    gk.fit(gk.load(path), key=jax.random.key(0), run=tmp_path / "run", num_steps=10)
    edited = write(RECIPE.replace("adam(0.1)", "adam(0.2)"))
    with pytest.raises(ValueError, match=r"the definition file differs from the one .* was started with"):
        gk.fit(gk.load(edited), key=jax.random.key(0), run=tmp_path / "run", resume=True)
    own = gk.load(tmp_path / "run" / "definition.py")
    assert int(gk.fit(own, key=jax.random.key(0), run=tmp_path / "run", resume=True).state.step) == 30


def test_runs_of_scripts_need_their_recipe(write, tmp_path):
    recipe = gk.load(write(RECIPE)).replace(source=None)
    fitted = gk.fit(recipe, key=jax.random.key(0), run=tmp_path / "run")
    with pytest.raises(
        ValueError, match="`like` must be the recipe .* was trained with: the run has no definition file"
    ):
        gk.load(tmp_path / "run")
    assert same(fitted.state, gk.load(tmp_path / "run", like=recipe).state)


def test_runs_that_are_corrupt_or_empty(write, tmp_path):
    run = tmp_path / "run"
    gk.fit(gk.load(write(RECIPE)), key=jax.random.key(0), run=run)
    state = (run / "state.gk").read_bytes()
    (run / "state.gk").write_bytes(state[:-1])
    with pytest.raises(gk.CorruptFileError, match=r"state.gk` cannot be read: it was cut short"):
        gk.load(run)
    (run / "state.gk").unlink()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        gk.load(run)
    (run / "state.gk").write_bytes(state)
    for content in ("[]", "{", '{"format": 2}'):
        (run / "meta.json").write_text(content)
        with pytest.raises(gk.CorruptFileError, match="meta.json"):
            gk.load(run)
    (run / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no meta.json"):
        gk.load(run)


def test_needs_are_filled_recorded_and_copied(write, tmp_path):
    teacher = gk.fit(gk.load(write(RECIPE)), key=jax.random.key(0), run=tmp_path / "teacher")
    definition = load_definition(write(STUDENT, "student.py"))
    recipe = with_needs(definition, {"teacher": tmp_path / "teacher"})
    run = tmp_path / "student"
    fitted = gk.fit(recipe, key=jax.random.key(1), run=run)
    # The teacher that `build` gets is the moving average of its run, and it is not trained.
    assert float(fitted.model["teacher"]) == float(teacher.ema)
    np.testing.assert_allclose(fitted.model["student"], teacher.ema, rtol=1e-3)
    assert sorted(p.name for p in (run / "needs" / "teacher").iterdir()) == ["definition.py", "meta.json", "state.gk"]
    for path in sorted((tmp_path / "teacher").iterdir()):
        path.unlink()
    assert same(gk.load(run).model, fitted.model)


def test_needs_that_are_not_met(write, tmp_path):
    definition = load_definition(write(STUDENT, "student.py"))
    with pytest.raises(DefinitionError, match=r"needs `teacher`, a run of models/constant.py; .* --with teacher=RUN"):
        with_needs(definition, {})
    with pytest.raises(DefinitionError, match="needs teacher; got `critic` besides"):
        with_needs(definition, {"teacher": tmp_path, "critic": tmp_path})
    with pytest.raises(FileNotFoundError, match="is not a run folder: it has no meta.json"):
        with_needs(definition, {"teacher": tmp_path})


def test_another_teacher_does_not_continue_a_run(write, tmp_path):
    config, definition = gk.load(write(RECIPE)), load_definition(write(STUDENT, "student.py"))
    for seed in (0, 1):
        gk.fit(config, key=jax.random.key(seed), run=tmp_path / f"teacher{seed}")
    first, second = (with_needs(definition, {"teacher": tmp_path / f"teacher{i}"}) for i in (0, 1))
    gk.fit(first, key=jax.random.key(1), run=tmp_path / "run", num_steps=3)
    with pytest.raises(ValueError, match="`teacher` must be the run .* was started with"):
        gk.fit(second, key=jax.random.key(1), run=tmp_path / "run", resume=True)


# Array files


def test_array_files_through_the_verbs(tmp_path):
    tree = {"w": jnp.arange(3.0), "key": jax.random.key(0)}
    gk.save(tmp_path / "a.gk", tree)
    loaded = gk.load(tmp_path / "a.gk", like=tree)
    assert loaded["w"].tolist() == [0, 1, 2] and loaded["key"].dtype == tree["key"].dtype
    with pytest.raises(ValueError, match="`like` must be a pytree of the structure saved in .*; got None"):
        gk.load(tmp_path / "a.gk")
    (tmp_path / "a.gk").write_bytes((tmp_path / "a.gk").read_bytes()[:-3])
    with pytest.raises(gk.CorruptFileError, match="it was cut short"):
        gk.load(tmp_path / "a.gk", like=tree)


# Files of a run are bound to it


def test_an_edited_copy_of_the_definition_is_run_only_when_trusted(write, tmp_path):
    run = tmp_path / "run"
    gk.fit(gk.load(write(RECIPE)), key=jax.random.key(0), run=run)
    (run / "definition.py").write_text(RECIPE + "# mine\n")
    with pytest.raises(DefinitionError, match="was edited since the training began"):
        gk.load(run)
    assert isinstance(gk.load(run, trust_edited=True), gk.Fitted)


def test_a_comment_does_not_stop_a_run_from_being_resumed(write, tmp_path):
    run = tmp_path / "run"
    whole = gk.fit(gk.load(write(RECIPE)), key=jax.random.key(0))
    gk.fit(gk.load(write(RECIPE)), key=jax.random.key(0), run=run, num_steps=10)
    gk.fit(gk.load(write(RECIPE + "# a comment\n")), key=jax.random.key(0), run=run, resume=True)
    assert same(gk.load(run).state, whole.state)
    assert (run / "definition.py").read_text() == RECIPE
    assert len(gk.storage.read_meta(run)["resumed"]) == 1


def test_another_checkpoint_of_a_needed_run_is_refused(write, tmp_path):
    gk.fit(gk.load(write(RECIPE)), key=jax.random.key(0), run=tmp_path / "teacher")
    recipe = with_needs(load_definition(write(STUDENT, "student.py")), {"teacher": tmp_path / "teacher"})
    gk.fit(recipe, key=jax.random.key(1), run=tmp_path / "student", num_steps=2)
    gk.fit(gk.load(write(RECIPE)), key=jax.random.key(5), run=tmp_path / "other")
    state = tmp_path / "student" / "needs" / "teacher" / "state.gk"
    state.write_bytes((tmp_path / "other" / "state.gk").read_bytes())
    with pytest.raises(gk.CorruptFileError, match="it is not the checkpoint that the run was trained with"):
        gk.load(tmp_path / "student")
