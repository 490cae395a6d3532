"""Functions that change the model between compiled calls."""

import os
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.recipes import Counted, Squares, optimizer, recipe, same

import genkit as gk
from genkit._core._checks import NonFiniteError
from genkit.training._hooks import cuts, hooks_of


def key():
    return jax.random.key(5)


def shaken(model, key):
    """The model with its last bias moved at random."""
    bias = model.layers[-1].bias
    return eqx.tree_at(lambda m: m.layers[-1].bias, model, bias + 0.1 * jax.random.normal(key, bias.shape))


def with_hooks(after=shaken, after_every=None, num_steps=60, data=None, adapt=None, **options):
    phase = gk.Phase(Squares(), optimizer, after=after, after_every=after_every, adapt=adapt)
    return recipe(data, num_steps, phases=phase, **options)


def linear(**options):
    """A training of one number that falls by 1 each step."""
    loss = lambda model, batch, *, key: (model, {})
    phase = gk.Phase(loss, optax.sgd(1.0), **options)
    return gk.Recipe(lambda key: jnp.zeros(()), jax.tree_util.Partial(lambda key: 0.0), phase, 10, log_every=4)


def test_hooks_run_after_the_cycles_they_name():
    seen = []

    def note(model, key):
        seen.append(-float(model))
        return model

    for cycles, expected in ((3, [3, 6, 9]), (range(2, 8, 2), [2, 4, 6]), (None, [10]), (10, [10]), (11, [])):
        seen.clear()
        fitted = gk.fit(linear(after=note, after_every=cycles), key=key())
        assert seen == expected and fitted.model == -10


def test_calls_are_cut_where_hooks_are_due():
    hooks = hooks_of(linear(after=[shaken, shaken, shaken], after_every=[4, range(3, 9, 5), None]).phases)
    assert list(cuts(0, 10, 3, hooks)) == [(0, 3), (3, 1), (4, 3), (7, 1), (8, 2)]
    assert list(cuts(4, 5, 100, hooks)) == [(4, 1)]
    assert list(cuts(5, 5, 100, hooks)) == []


def test_what_a_hook_returns_is_trained_on():
    fitted = gk.fit(linear(after=lambda model, key: model + 100, after_every=5), key=key())
    assert fitted.model == 190 and fitted.state.model == 190
    assert fitted.log["loss"].tolist() == [0, -1, -2, -3, -4, 95, 94, 93, 92, 91]


def test_what_runs_at_the_end_makes_the_model_and_not_the_state():
    polished = gk.fit(linear(after=lambda model, key: jnp.round(model / 7)), key=key())
    assert polished.model == -1 and polished.ema == -1 and polished.state.model == -10


def test_hooks_draw_from_keys_of_their_own():
    drawn = []

    def note(model, key):
        drawn.append(tuple(jax.random.key_data(key).tolist()))
        return model

    config = with_hooks([note, note], [20, 30])
    gk.fit(config, key=key())
    gk.fit(config, key=key())
    assert len(drawn) == 10 and drawn[:5] == drawn[5:] and len(set(drawn)) == 5


@pytest.mark.parametrize("after_every", [7, range(5, 41, 12)])
@pytest.mark.parametrize("host", [False, True])
def test_a_training_with_hooks_resumes_bitwise(tmp_path, after_every, host):
    data = Counted() if host else None
    config = with_hooks([shaken, shaken], [after_every, None], data=data)
    whole = gk.fit(config, key=key())
    assert not same(whole.model, whole.state.model)
    for step in (4, 15, 41, 60):
        gk.fit(config, key=key(), run=tmp_path / "run", resume=True, num_steps=step)
    resumed = gk.fit(config, key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, whole)
    assert same(gk.io.load_run(tmp_path / "run", like=config), whole)


def test_the_cadence_of_the_log_changes_no_bit():
    whole = gk.fit(with_hooks(after_every=12), key=key())
    assert same(whole, gk.fit(with_hooks(after_every=12, log_every=5), key=key()))
    # Hooks are no part of the compiled program: the steps between them are those of any training.
    idle = gk.fit(with_hooks(lambda model, key: model, 13), key=key())
    assert same(idle, gk.fit(recipe(), key=key()))


def test_other_hooks_compile_no_step_again(compilations):
    config = with_hooks(lambda model, key: model, 10)
    gk.fit(config, key=key())
    with compilations() as count:
        gk.fit(with_hooks(lambda model, key: model, 10), key=key())
    assert count() == 0


@pytest.mark.parametrize("step", [20, 25])
def test_a_hook_that_fails_is_run_again_on_resuming(tmp_path, step):
    failures = ["once"]

    def fails_once(model, key):
        if failures:
            failures.pop()
            raise RuntimeError("mine")
        return shaken(model, key)

    whole = gk.fit(with_hooks(after_every=step), key=key())
    with pytest.raises(RuntimeError, match="mine"):
        gk.fit(with_hooks(fails_once, step), key=key(), run=tmp_path / "run")
    resumed = gk.fit(with_hooks(after_every=step), key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, whole)


def test_ctrl_c_in_a_hook_keeps_the_work(tmp_path):
    def pressed(model, key):
        os.kill(os.getpid(), signal.SIGINT)
        return shaken(model, key)

    with pytest.raises(KeyboardInterrupt, match="interrupted after 20 of 60 steps"):
        gk.fit(with_hooks(pressed, 20), key=key(), run=tmp_path / "run")
    resumed = gk.fit(with_hooks(after_every=20), key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, gk.fit(with_hooks(after_every=20), key=key()))


def test_the_search_for_what_is_not_finite_starts_behind_the_last_hook():
    def loss(model, batch, *, key):
        return jnp.where(batch == 17, jnp.nan, model), {}

    data = gk.data.Host(lambda start: (np.asarray(i) for i in range(start, 100)))
    phase = gk.Phase(loss, optax.sgd(1.0), after=lambda model, key: model + 100, after_every=5)
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 17") as caught:
        gk.fit(gk.Recipe(lambda key: jnp.zeros(()), data, phase, 40, log_every=2), key=key())
    assert caught.value.fitted.model == 300 - 17


def test_the_state_of_an_optimizer_follows_the_hook():
    forget = lambda opt, before, after: jax.tree.map(lambda x: x * (before == after).astype(x.dtype), opt)
    loss = lambda model, batch, *, key: (model, {})
    phase = gk.Phase(loss, optax.sgd(1.0, momentum=1.0), after=lambda m, key: m + 1, after_every=4, adapt=forget)
    config = gk.Recipe(lambda key: jnp.zeros(()), jax.tree_util.Partial(lambda key: 0.0), phase, 6)
    # The momentum after n steps is n: 1 + 2 + 3 + 4 down, one up, and afresh 1 + 2 down.
    assert gk.fit(config, key=key()).model == -12


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            lambda model, key: None,
            "`after of phase 0` must be a function that keeps the structure of the model; got None",
        ),
        (lambda model, key: jnp.zeros(2), r"`array at  after after of phase 0` must be float32\[\]; got float32\[2\]"),
        (lambda model, key: model / 0, "after after of phase 0` must be finite"),
    ],
)
def test_models_that_do_not_fit_are_refused(after, message):
    with pytest.raises(ValueError, match=message) as caught:
        gk.fit(linear(after=after, after_every=3), key=key())
    if isinstance(caught.value, NonFiniteError):
        assert caught.value.fitted.model == -3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after_every": 3}, "`after_every` must be None where there is no `after`; got 3"),
        ({"after": shaken, "after_every": 0}, "`after_every` must be an integer >= 1; got 0"),
        ({"after": shaken, "after_every": range(0, 9)}, "an ascending range of positive numbers"),
        ({"after": [shaken], "after_every": [1, 2]}, "`after_every` must be one entry for each of 1 functions; got 2"),
    ],
)
def test_wrong_hooks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear(**options)


def test_a_result_can_be_extended():
    class Mean(gk.Fitted):
        std_err: float

    fitted = gk.fit(linear(), key=key())
    mean = Mean.extend(fitted, std_err=0.1, report={"n": 3})
    assert isinstance(mean, gk.Fitted) and mean.std_err == 0.1 and mean.report == {"n": 3}
    assert mean.model == -10 and mean.log["loss"].shape == (10,) and fitted.report is None
