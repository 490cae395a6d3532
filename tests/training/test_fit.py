"""The training loop: what it computes, in which order, and that nothing else decides it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from training.recipes import Counted, Rows, Squares, arrays, build, recipe, same

import genkit as gk
from genkit._core._fields import FROZEN
from genkit.training import model_updates
from genkit.training._feed import call_length


@pytest.fixture
def as_users_run_it():
    """Without the run-time type checks of the tests, which would speak before genkit does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def by_hand(recipe, key, num_steps):
    """The same training as a plain loop over jitted steps, one phase of one update."""
    build_key, train_key = jax.random.split(key)
    model = recipe.build(build_key)
    (phase,) = recipe.phases
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state, average, losses = phase.optimizer.init(params), params, []

    @jax.jit
    def step(params, state, average, i):
        data_key, loss_key = jax.random.split(jax.random.fold_in(train_key, i))
        batch = recipe.data(data_key)
        loss = lambda p: phase.objective(eqx.combine(p, static), batch, key=loss_key)[0]
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = phase.optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(recipe.ema, (1 + i) / (10 + i))
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return params, state, average, value

    for i in range(num_steps):
        params, state, average, value = step(params, state, average, i)
        losses.append(value)
    return eqx.combine(params, static), eqx.combine(average, static), np.asarray(losses)


def test_equals_a_training_written_by_hand():
    fitted = gk.fit(recipe(), key=jax.random.key(1))
    model, average, losses = by_hand(recipe(), jax.random.key(1), 60)
    # The same operations in the same order; only fusion, hence the last bits, may differ.
    np.testing.assert_allclose(fitted.log["loss"], losses, rtol=1e-5)
    for got, want in ((fitted.model, model), (fitted.ema, average)):
        for a, b in zip(arrays(got), arrays(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert fitted.log["loss"][-10:].mean() < 0.7 * fitted.log["loss"][:10].mean()
    assert int(fitted.state.step) == 60 and set(fitted.log) == {"loss", "size"}
    assert all(values.shape == (60,) and isinstance(values, np.ndarray) for values in fitted.log.values())


@pytest.mark.parametrize("log_every", [1, 7, 1000])
def test_the_cadence_changes_no_bit(log_every):
    whole = gk.fit(recipe(), key=jax.random.key(2))
    assert same(whole, gk.fit(recipe(log_every=log_every), key=jax.random.key(2)))


def test_another_key_is_another_training_and_compiles_nothing(compilations):
    config = recipe()
    first = gk.fit(config, key=jax.random.key(0))
    with compilations() as count:
        second = gk.fit(config, key=jax.random.key(1))
    assert count() == 0
    assert not np.array_equal(first.log["loss"], second.log["loss"])


def test_other_data_and_decay_compile_nothing(compilations):
    config = recipe()
    gk.fit(config, key=jax.random.key(0))
    changed = config.replace(data=Rows(config.data.x + 1, 16), ema=0.5)
    with compilations() as count:
        gk.fit(changed, key=jax.random.key(0))
    assert count() == 0


def test_the_length_of_calls():
    assert call_length(4000, 100) == 100
    assert call_length(150, 100) == 75
    assert call_length(101, 100) == 100  # a prime: one more program for the rest
    assert call_length(3, 100) == 3
    assert call_length(5, 1) == 1
    for remaining in range(1, 300):
        for log_every in (1, 2, 10, 100):
            assert 1 <= call_length(remaining, log_every) <= log_every


def test_the_caller_keeps_their_arrays():
    # Compiled calls consume their input: what `build` gives away must be a copy.
    mine = jnp.arange(3.0)
    loss = lambda model, batch, *, key: (jnp.sum((model - batch) ** 2), {})
    data = jax.tree_util.Partial(lambda key: jnp.zeros(()))
    fitted = gk.fit(
        gk.Recipe(lambda key: mine, data, gk.Phase(loss, optax.sgd(0.1)), 4, ema=0.9), key=jax.random.key(0)
    )
    again = gk.fit(gk.Recipe(lambda key: fitted.model, data, gk.Phase(loss, optax.sgd(0.1)), 4), key=jax.random.key(0))
    assert mine.tolist() == [0.0, 1.0, 2.0]
    np.testing.assert_allclose(fitted.model, 0.8**4 * mine, rtol=1e-6)
    np.testing.assert_allclose(again.ema, 0.8**8 * mine, rtol=1e-6)


# Phases


class Pair(eqx.Module):
    a: jax.Array
    b: jax.Array
    count: jax.Array
    scale: jax.Array = eqx.field(metadata=FROZEN)
    table: np.ndarray = eqx.field(default_factory=lambda: np.ones(2))


def pair():
    return Pair(jnp.array(1.0), jnp.array(1.0), jnp.array(0), jnp.array(2.0))


def pull(target):
    return lambda model, batch, *, key: ((model.a - target) ** 2 + (model.b - target) ** 2 + model.scale**2, {})


nothing = jax.tree_util.Partial(lambda key: jnp.zeros(()))


def train(phases, num_steps, make=pair, data=nothing, **options):
    return gk.fit(gk.Recipe(lambda key: make(), data, phases, num_steps, **options), key=jax.random.key(0))


def test_phases_take_turns_and_train_their_own_leaves():
    phases = [
        gk.Phase(pull(0.0), optax.sgd(0.25), where=lambda m: m.a, name="left"),
        gk.Phase(pull(5.0), optax.sgd(0.25), where=lambda m: m.b, repeats=3),
    ]
    fitted = train(phases, 2)
    np.testing.assert_allclose(fitted.model.a, 0.5**2, rtol=1e-6)  # halves its distance per update
    np.testing.assert_allclose(fitted.model.b, 5 - 4 * 0.5**6, rtol=1e-6)
    assert float(fitted.model.scale) == 2.0 and set(fitted.log) == {"left/loss", "phase1/loss"}
    # A loss is that before the update; over repeats the log has the mean.
    np.testing.assert_allclose(fitted.log["left/loss"][0], 1 + 1 + 4, rtol=1e-6)
    inner = [(4 * 0.5**i) ** 2 + 4.5**2 + 4 for i in range(3)]
    np.testing.assert_allclose(fitted.log["phase1/loss"][0], np.mean(inner), rtol=1e-6)


def test_optimizers_keep_state_for_what_they_train_alone():
    phase = gk.Phase(pull(0.0), optax.adam(0.1), where=lambda m: m.b)
    (state,) = train(phase, 2).state.opt
    moments = state[0].mu
    assert moments.a is None and moments.scale is None and moments.b.shape == ()


class Towards(gk.Objective):
    target: np.ndarray

    def __call__(self, model, batch, *, key):
        return jnp.sum((model - self.target) ** 2), {}


def test_objectives_may_hold_numpy_arrays():
    # As an objective with a table does; the recipe draws no batch here.
    phase = gk.Phase(Towards(np.array([1.0, 2.0])), optax.sgd(0.5))
    fitted = gk.fit(gk.Recipe(lambda key: jnp.zeros(2), lambda key: None, phase, 1), key=jax.random.key(0))
    assert fitted.model.tolist() == [1.0, 2.0]


def test_by_default_floating_arrays_outside_frozen_fields_are_trained():
    # Weight decay moves whatever the optimizer sees.
    fitted = train(gk.Phase(pull(0.0), optax.adamw(0.1, weight_decay=0.5)), 3)
    assert float(fitted.model.scale) == 2.0 and int(fitted.model.count) == 0
    assert isinstance(fitted.model.table, np.ndarray) and fitted.model.table.tolist() == [1, 1]
    assert float(fitted.model.a) < 1 and float(fitted.model.b) < 1
    chosen = train(gk.Phase(pull(0.0), optax.sgd(0.1), where=lambda m: m.scale), 1)
    np.testing.assert_allclose(chosen.model.scale, 2 - 0.1 * 4, rtol=1e-6)


def test_updates_are_written_after_the_optimizer_step():
    def objective(model, batch, *, key):
        loss = (model.a - 3.0) ** 2
        updates = model_updates(model, lambda m: (m.b, m.count), (0.5 * model.b, model.count + 1))
        return loss, {"updates": updates, "b": model.b}

    fitted = train(gk.Phase(objective, optax.sgd(0.5)), 3)
    assert int(fitted.model.count) == 3 and float(fitted.model.a) == 3.0
    np.testing.assert_allclose(fitted.model.b, 0.5**3, rtol=1e-6)
    np.testing.assert_allclose(fitted.log["b"], [1, 0.5, 0.25], rtol=1e-6)


def test_an_update_wins_over_the_optimizer_step():
    def objective(model, batch, *, key):
        return (model.a - 3.0) ** 2, {"updates": model_updates(model, lambda m: m.a, jnp.array(7.0))}

    assert float(train(gk.Phase(objective, optax.sgd(0.5)), 2).model.a) == 7.0


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (lambda m: model_updates(m, lambda m: m.a, jnp.zeros(2)), r"at .a` must be float32\[\]; got float32\[2\]"),
        (lambda m: model_updates(m, lambda m: m.count, 1.5), r"at .count` must be int32\[\]; got float32\[\]"),
        (lambda m: {"a": 1.0}, "must be a tree like the model, with None elsewhere"),
    ],
)
def test_updates_that_do_not_fit_are_refused(updates, message):
    objective = lambda model, batch, *, key: (model.a**2, {"updates": updates(model)})
    with pytest.raises(ValueError, match=message):
        train(gk.Phase(objective, optax.sgd(0.1)), 2)


def test_typed_keys_in_a_model_are_carried():
    class Keyed(eqx.Module):
        w: jax.Array
        key: jax.Array

    def objective(model, batch, *, key):
        draw = jax.random.normal(model.key)
        return (model.w - draw) ** 2, {
            "draw": draw,
            "updates": model_updates(model, lambda m: m.key, jax.random.fold_in(model.key, 1)),
        }

    fitted = train(gk.Phase(objective, optax.sgd(0.1)), 3, make=lambda: Keyed(jnp.zeros(()), jax.random.key(1)))
    assert len(set(fitted.log["draw"].tolist())) == 3


def by_kind_of_array(params):
    """One label for biases, another for weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "b" if "bias" in jax.tree_util.keystr(path) else "w", params
    )


OPTIMIZERS = {
    "lbfgs": optax.lbfgs(),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=3)),
    "multisteps": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=3),
    "schedule": optax.inject_hyperparams(optax.adamw)(optax.cosine_decay_schedule(1e-2, 20)),
    "polyak": optax.polyak_sgd(0.1),
    "lion": optax.lion(1e-3),
    "multi_transform": optax.multi_transform({"w": optax.adam(1e-2), "b": optax.sgd(1e-2)}, by_kind_of_array),
}


@pytest.fixture(scope="module")
def log_of_every_optimizer():
    """One training with a phase for each optimizer, each on a network of its own."""

    class Own(gk.Objective):
        name: str = eqx.field(static=True)

        def __call__(self, model, batch, *, key):
            return Squares()(model[self.name], batch, key=key)

    def phase(name):
        return gk.Phase(Own(name), OPTIMIZERS[name], where=lambda model: model[name], name=name)

    config = recipe(phases=[phase(name) for name in OPTIMIZERS], num_steps=20)
    config = config.replace(build=lambda key: {name: build(key) for name in OPTIMIZERS})
    return gk.fit(config, key=jax.random.key(0)).log


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name, log_of_every_optimizer):
    losses = log_of_every_optimizer[f"{name}/loss"]
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean()


# The moving average


def test_without_an_average_ema_is_the_model():
    fitted = gk.fit(recipe(ema=None, num_steps=5), key=jax.random.key(0))
    assert fitted.state.ema is None and same(fitted.ema, fitted.model)


def test_the_average_warms_up_and_leaves_constants_alone():
    fitted = train(gk.Phase(pull(0.0), optax.sgd(0.25)), 3, ema=0.999)
    value, average = 1.0, 1.0
    for step in range(3):
        value *= 0.5
        decay = min(0.999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    np.testing.assert_allclose(fitted.ema.a, average, rtol=1e-6)
    assert float(fitted.ema.scale) == 2.0 and fitted.state.ema.scale is None
    assert int(fitted.ema.count) == 0


def test_the_average_of_half_precision_moves():
    make = lambda: jnp.ones((4,), jnp.bfloat16)
    shift = lambda model, batch, *, key: (jnp.sum(model.astype(jnp.float32)), {})
    fitted = train(gk.Phase(shift, optax.sgd(2.0**-6)), 40, make=make, ema=0.9999)
    assert fitted.state.ema.dtype == jnp.float32 and fitted.ema.dtype == jnp.bfloat16
    value, average = 1.0, 1.0
    for step in range(40):
        value -= 2.0**-6  # exact in bfloat16 down to a half
        average += (1 - min(0.9999, (1 + step) / (10 + step))) * (value - average)
    np.testing.assert_allclose(fitted.state.ema, average, rtol=1e-5)


# Data made in Python


def test_host_data_arrive_once_each_and_in_order():
    phases = [
        gk.Phase(lambda m, batch, *, key: (m.a**2, {"first": batch[0, 0]}), optax.sgd(0.1)),
        gk.Phase(lambda m, batch, *, key: (m.b**2, {"first": batch[0, 0]}), optax.sgd(0.1), repeats=2),
    ]

    def numbered(start):
        return (np.full((2, 3), i, np.float32) for i in range(start, 1000))

    for log_every in (1, 4, 100):
        fitted = train(phases, 7, data=gk.data.Host(numbered), log_every=log_every)
        assert fitted.log["phase0/first"].tolist() == [3.0 * i for i in range(7)]
        assert fitted.log["phase1/first"].tolist() == [3.0 * i + 1.5 for i in range(7)]


def test_host_data_give_the_same_bits_at_any_cadence():
    whole = gk.fit(recipe(Counted()), key=jax.random.key(0))
    assert same(whole, gk.fit(recipe(Counted(), log_every=7), key=jax.random.key(0)))


def test_host_data_that_end_keep_the_work(tmp_path):
    config = recipe(Counted(limit=35))
    with pytest.raises(ValueError, match="`data` must be 60 batches; got 35, then its end. Let the iterator go on"):
        gk.fit(config, key=jax.random.key(0), run=tmp_path / "run")
    assert int(gk.io.load_run(tmp_path / "run", like=config).state.step) == 30


def test_host_batches_of_other_shapes_are_refused():
    shapes = gk.data.Host(lambda start: (np.zeros((2 + (i == 5), 2)) for i in range(start, 99)))
    with pytest.raises(ValueError, match=r"`batch 5 of `data`` must be like the first one .*; got float64\[3, 2\]"):
        train(gk.Phase(pull(0.0), optax.sgd(0.1)), 20, data=shapes)


def test_host_wants_a_function(as_users_run_it):
    with pytest.raises(ValueError, match="a bare iterator cannot be resumed"):
        gk.data.Host([1])


# Precision


def test_double_precision(x64):
    rows = Rows(jnp.asarray(np.random.default_rng(0).normal(size=(64, 2))), 16)
    fitted = gk.fit(recipe(rows, num_steps=10), key=jax.random.key(0))
    assert fitted.model.layers[0].weight.dtype == jnp.float64 and fitted.log["loss"].dtype == np.float64


# Wrong input

good = {"build": build, "data": nothing, "phases": gk.Phase(Squares(), optax.sgd(0.1)), "num_steps": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"build": 3}, r"`build` must be a function `build\(key, \*\*needs\)`"),
        (
            {"data": np.zeros(3)},
            r"`data` must be a callable pytree .*; got float64\[3\]. Wrap arrays",
        ),
        ({"data": iter([1])}, "`data` must be a callable pytree"),
        ({"phases": []}, "`phases` must be at least one gk.Phase"),
        ({"phases": [Squares()]}, r"`phases\[0\]` must be a gk.Phase; got Squares"),
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1; got 0"),
        ({"num_steps": 2.5}, "`num_steps` must be an integer >= 1; got 2.5"),
        ({"log_every": 0}, "`log_every` must be an integer >= 1"),
        ({"save_every": -1}, "`save_every` must be an integer >= 1"),
        ({"ema": 1.0}, r"`ema` must be in \[0, 1\); got 1.0"),
        ({"ema": float("nan")}, r"`ema` must be in \[0, 1\); got nan"),
    ],
)
@pytest.mark.filterwarnings("ignore:Python iterable type")  # JAX's word on the iterator, before it is refused
def test_recipes_refuse_what_they_cannot_use(change, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        gk.Recipe(**good | change)


def test_phases_refuse_what_they_cannot_use(as_users_run_it):
    with pytest.raises(ValueError, match="`objective` must be a callable"):
        gk.Phase(3, optax.sgd(0.1))
    with pytest.raises(ValueError, match="`optimizer` must be an optax optimizer"):
        gk.Phase(Squares(), 0.1)
    with pytest.raises(ValueError, match="`repeats` must be an integer >= 1; got 0"):
        gk.Phase(Squares(), optax.sgd(0.1), repeats=0)
    for where, message in (
        (lambda m: m.c, "`where` of phase 0 does not apply to the model: 'Pair' object has no attribute 'c'"),
        (lambda m: m.count, "`where` must be a selection with at least one floating JAX array"),
        (lambda m: m.table, "`where` must be a selection with at least one floating JAX array"),
    ):
        with pytest.raises(ValueError, match=message):
            train(gk.Phase(pull(0.0), optax.sgd(0.1), where=where), 2)


def test_problems_refuse_what_they_cannot_use(as_users_run_it):
    with pytest.raises(ValueError, match="`args` must be a tuple of arguments"):
        gk.Problem(pair, args=3.0)
    with pytest.raises(ValueError, match="`model` must be a numpyro model"):
        gk.Problem(3)
    assert gk.Problem(pair, [1], {"y": 2}).args == (1,)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda m: m.a, "`objective of phase0` must be a function returning `.scalar, dict.`"),
        (lambda m: (m.a[None], {}), r"`loss of phase0` must be a floating scalar; got float32\[1\]"),
        (lambda m: (m.count, {}), r"`loss of phase0` must be a floating scalar; got int32\[\]"),
        (lambda m: (m.a, None), "`by-products of phase0` must be a dict; got NoneType"),
    ],
)
def test_objectives_must_return_what_was_agreed(returned, message):
    with pytest.raises(ValueError, match=message):
        train(gk.Phase(lambda model, batch, *, key: returned(model), optax.sgd(0.1)), 2)


def test_fit_refuses_what_it_cannot_use(as_users_run_it):
    with pytest.raises(ValueError, match="`recipe` must be a gk.Recipe"):
        gk.fit(Squares(), key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"`key` must be a typed JAX PRNG key; got uint32\[2\]"):
        gk.fit(recipe(), key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="`key` must be a single key"):
        gk.fit(recipe(), key=jax.random.split(jax.random.key(0)))
    with pytest.raises(ValueError, match="`num_steps` must be an integer >= 1; got 0"):
        gk.fit(recipe(), key=jax.random.key(0), num_steps=0)
    with pytest.raises(ValueError, match="`resume` must be False without `run`"):
        gk.fit(recipe(), key=jax.random.key(0), resume=True)
