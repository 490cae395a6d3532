"""The runner and the three hooks, with trivial members of each."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk
from genkit.sampling import Guidance, Population, Slot, StepTransform
from genkit.sampling._hooks import collect_hooks
from genkit.sampling._runner import merged


gd = gk.diffusion
GRID = gd.karras(5, 0.1, 5.0)
NUMBERS = jnp.arange(4) % 3


def labeled(calls=None):
    """Unit Gaussians around the label plus one, around zero without one; each evaluated example appends its label."""

    def denoise(x, sigma, cond=None):
        label = -1 if cond is None else cond
        if calls is not None:
            jax.debug.callback(lambda c, _: calls.append(int(c)), label, x)
        mean = jnp.where(label < 0, 0.0, label + 1.0)
        return mean + (x - mean) / (1 + sigma**2)

    return denoise


def draw(guidance, *, table=None, n=4, calls=None, cond=NUMBERS, **kwargs):
    sampler = gk.Sampler(gd.heun(GRID) if table is None else table, guidance, **kwargs)
    draws = gk.sample(sampler, labeled(calls), n, key=jr.key(0), shape=(2,), cond=cond)
    jax.effects_barrier()
    return draws


class Blend(Guidance):
    """Half of the prediction with the condition, half without; draws whose number is in `alone` skip the second."""

    alone: jax.Array = eqx.field(converter=jnp.asarray, default=())

    def slots(self):
        return Slot("with"), Slot("without", cond="null")

    def init(self, x):
        return jnp.zeros((), jnp.int32)

    def needs(self, carry, ctx):
        return {"with": True, "without": ~jnp.any(ctx.cond == self.alone) & (ctx.sigma > 0.2)}

    def combine(self, preds, ctx, carry):
        other = jnp.where(preds["without"].present, preds["without"].x0, preds["with"].x0)
        return (preds["with"].x0 + other) / 2, carry + 1, {"evaluations": carry, "corrector": ctx.corrector}


class Early(Guidance):
    """The unconditional prediction in the first three evaluations, counted in the carry, then the conditional one."""

    def slots(self):
        return Slot("with"), Slot("without", cond="null")

    def init(self, x):
        return jnp.zeros((), jnp.int32)

    def needs(self, carry, ctx):
        return {"with": carry >= 3, "without": carry < 3}

    def combine(self, preds, ctx, carry):
        return jnp.where(preds["with"].present, preds["with"].x0, preds["without"].x0), carry + 1, {}


# Counting and skipping.


def test_needs_may_follow_the_carry():
    calls = []
    draws = draw(Early(), table=gd.ddim(GRID), calls=calls)
    assert draws.nfe.tolist() == [5] * 4 and calls.count(-1) == 4 * 3 and len(calls) == 4 * 5


def test_a_slot_is_evaluated_where_some_draw_needs_it():
    calls = []
    draws = draw(Blend([0]), calls=calls)
    rows = np.asarray(gd.heun(GRID).sigma)
    guided = int((rows > 0.2).sum())
    assert len(calls) == int(draws.nfe.sum()) == 4 * (len(rows) + guided)
    needs = np.where(np.asarray(NUMBERS) == 0, 0, guided)
    np.testing.assert_array_equal(draws.nfe_logical, len(rows) + needs)
    assert calls.count(-1) == 4 * guided


def test_a_slot_nobody_needs_is_skipped():
    calls = []
    draws = draw(Blend([0, 1, 2]), calls=calls)
    assert len(calls) == int(draws.nfe.sum()) == 4 * 9 and -1 not in calls


@pytest.mark.parametrize("n", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))])
def test_compaction_runs_only_what_is_needed(n):
    calls = []
    cond = jnp.arange(n) % 3
    draws = draw(Blend([0]), calls=calls, n=n, cond=cond, skip="compact")
    rows = np.asarray(gd.heun(GRID).sigma)
    guided, needing = int((rows > 0.2).sum()), int((np.asarray(cond) != 0).sum())
    sizes = [0, -(-n // 4), -(-n // 2), -(-3 * n // 4), n]
    bucket = min(size for size in sizes if size >= needing)
    assert calls.count(-1) == guided * bucket and len(calls) == n * len(rows) + guided * bucket
    assert int(draws.nfe.sum()) == len(calls)
    plain = draw(Blend([0]), n=n, cond=cond)
    np.testing.assert_allclose(draws.value, plain.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(draws.nfe_logical, plain.nfe_logical)


def test_what_another_draw_needs_does_not_show():
    # Draw 0 skips its second evaluation, alone as well as beside draws that need theirs.
    mixed = draw(Blend([0]))
    alone = gk.sample(gd.heun(GRID), labeled(), 1, key=jr.key(0), shape=(2,), cond=0, guidance=Blend([0]))
    np.testing.assert_allclose(mixed.value[0], alone.value[0], rtol=1e-6, atol=1e-7)
    assert int(alone.nfe[0]) == 9


def test_one_concatenated_call():
    calls = []
    fused = draw(Blend(), calls=calls, fuse=True)
    np.testing.assert_allclose(fused.value, draw(Blend()).value, rtol=1e-5, atol=1e-6)
    # A fused call evaluates both parts wherever one is needed: the count says so.
    assert len(calls) == int(fused.nfe.sum()) == 4 * 2 * 9
    np.testing.assert_array_equal(fused.nfe_logical, draw(Blend()).nfe_logical)


def test_static_plan_compiles_what_the_grid_decides():
    guidance = gk.guidance.interval(gk.guidance.cfg(2.0), 0.2, 2.0)
    calls = []
    static = draw(guidance, calls=calls, skip="static")
    dynamic = draw(guidance)
    np.testing.assert_allclose(static.value, dynamic.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(static.nfe, dynamic.nfe)
    assert len(calls) == int(static.nfe.sum())
    # One scan per run of equal pattern.
    call = {"cond": NUMBERS, "x_init": None, "shape": (2,)}
    sampler = lambda skip: gk.Sampler(gd.heun(GRID), guidance, skip=skip)
    text = lambda skip: str(jax.make_jaxpr(lambda keys: sampler(skip).draw(labeled(), keys, **call).value)(keys))
    keys = jr.split(jr.key(0), 4)
    assert text("static").count("scan[") == 3 and text("dynamic").count("scan[") == 1


def test_static_plan_with_idle_rows():
    table = gd.heun(GRID, churn=(1.0, 0.0, 5.0, 1.0))
    static = draw(gk.guidance.cfg(2.0), table=table, skip="static")
    np.testing.assert_allclose(static.value, draw(gk.guidance.cfg(2.0), table=table).value, rtol=1e-5, atol=1e-6)
    assert static.nfe.tolist() == [18] * 4


@pytest.mark.parametrize(
    ("guidance", "table"),
    [
        pytest.param(
            lambda: gk.guidance.step_adaptive(gk.guidance.cfg(2.0), 2),
            gd.heun(GRID, churn=(1.0, 0.0, 5.0, 1.0)),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: Blend([0]), gd.heun(GRID), marks=pytest.mark.slow),
        pytest.param(
            lambda: gk.guidance.interval(gk.guidance.cfg(2.0), 0.2, 2.0), gd.heun(GRID), marks=pytest.mark.slow
        ),
        pytest.param(Early, gd.ddim(GRID), marks=pytest.mark.slow),
        pytest.param(lambda: None, gd.ddim(GRID), marks=pytest.mark.slow),
        pytest.param(lambda: Question(), gd.ancestral(GRID), marks=pytest.mark.slow),
        pytest.param(
            lambda: (gk.guidance.interval(gk.guidance.cfg(2.0), 0.2, 2.0), Shift(jnp.asarray(0.5), "start")),
            gd.ddim(GRID),
            marks=pytest.mark.slow,
        ),
        (lambda: (gk.guidance.step_adaptive(Blend(), 2), Shift(jnp.asarray(0.5), "end"), Reverse(2)), gd.unipc(GRID)),
    ],
)
def test_two_phases(guidance, table):
    # Loops that take turns do what one loop with branches does, evaluation by evaluation.
    cond = jnp.array([0, 0, 1, 1])
    once, turns = [], []
    dynamic = draw(guidance(), table=table, calls=once, cond=cond)
    phases = draw(guidance(), table=table, calls=turns, cond=cond, skip="phases")
    assert sorted(turns) == sorted(once)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, (phases.value, phases.info), (dynamic.value, dynamic.info))
    np.testing.assert_array_equal(phases.nfe, dynamic.nfe)
    np.testing.assert_array_equal(phases.nfe_logical, dynamic.nfe_logical)


def test_the_loop_of_the_second_phase_holds_the_plain_prediction_alone():
    guidance = gk.guidance.step_adaptive(gk.guidance.cfg(2.0), 2)
    call = {"cond": NUMBERS, "x_init": None, "shape": (2,)}
    sampler = gk.Sampler(gd.ddim(GRID), guidance, skip="phases")
    calls = []
    jaxpr = jax.make_jaxpr(lambda keys: sampler.draw(labeled(calls), keys, **call).value)(jr.split(jr.key(0), 4))
    outer = next(e for e in jaxpr.eqns if e.primitive.name == "while")
    guided, alone = [e.params["body_jaxpr"] for e in outer.params["body_jaxpr"].eqns if e.primitive.name == "while"]
    evaluations = lambda body: str(body).count("debug_callback")
    assert evaluations(guided) == 2 * evaluations(alone) > 0


def test_static_plan_refuses_needs_of_draws():
    with pytest.raises(ValueError, match="'dynamic' or 'compact'"):
        draw(Blend([0]), skip="static")
    with pytest.raises(ValueError, match="on its carry"):
        draw(Early(), skip="static")
    traced = jax.jit(lambda scale: draw(gk.guidance.cfg(scale), skip="static").value)
    with pytest.raises(ValueError, match="inside your own `jit`"):
        traced(jnp.asarray(2.0))
    with pytest.raises(ValueError, match="dynamic"):
        gk.Sampler(gd.heun(GRID), skip="dynamik")


# Slots.


def test_equal_slots_are_merged():
    class Twice(Guidance):
        def slots(self):
            return Slot("a"), Slot("b", cond="null"), Slot("c")

        def init(self, x):
            return None

        def needs(self, carry, ctx):
            return {"a": True, "b": False, "c": ctx.sigma > 0}

        def combine(self, preds, ctx, carry):
            return (preds["a"].x0 + preds["c"].x0) / 2 + 0 * preds["b"].x0, carry, {}

    calls = []
    draws = draw(Twice(), calls=calls)
    assert draws.nfe.tolist() == [9] * 4 and len(calls) == 36
    np.testing.assert_allclose(draws.value, draw(None).value, rtol=1e-6)
    weak = eqx.nn.Linear(2, 2, key=jr.key(0))
    groups = merged((Slot("a", net=weak), Slot("b", net=weak), Slot("c", net=eqx.nn.Linear(2, 2, key=jr.key(1)))))
    assert [[slot.name for slot in group] for group in groups] == [["a", "b"], ["c"]]


def test_slots_with_a_net_and_a_condition_of_their_own():
    class Away(Guidance):
        net: object

        def slots(self):
            return Slot("main"), Slot("other", net=self.net, cond=2)

        def init(self, x):
            return None

        def needs(self, carry, ctx):
            return {"main": True, "other": True}

        def combine(self, preds, ctx, carry):
            return preds["other"].x0, carry, {}

    shifted = lambda x, sigma, cond=None: labeled()(x, sigma, cond) + 10.0
    draws = draw(Away(shifted), table=gd.ddim(np.array([1.0, 0.0])))
    same = lambda x, sigma, cond=None: x
    start = np.asarray(gk.sample(gd.ddim(np.array([1.0, 0.0])), same, 4, key=jr.key(0), shape=(2,)).value)
    np.testing.assert_allclose(draws.value, 13.0 + (start - 3.0) / 2, rtol=1e-5)
    wrong = lambda x, sigma, cond=None: x[:1]
    with pytest.raises(ValueError, match="keeps the shape"):
        draw(Away(wrong))


def test_gradient_slot_is_the_gradient_through_the_denoiser(x64):
    class Descend(Guidance):
        def slots(self):
            return (Slot("main", loss=lambda x0, ctx: jnp.sum((x0 - ctx.cond) ** 2) / ctx.sigma),)

        def init(self, x):
            return None

        def needs(self, carry, ctx):
            return {"main": True}

        def combine(self, preds, ctx, carry):
            return preds["main"].gradient, carry, {"x0": preds["main"].x0}

    start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    sampler = gk.Sampler(gd.ddim(np.array([2.0, 0.0])), Descend())
    draws = gk.sample(sampler, labeled(), 4, key=jr.key(0), cond=NUMBERS, x_init=start)
    mean = np.asarray(NUMBERS)[:, None] + 1.0
    x0 = mean + (np.asarray(start) - mean) / 5
    np.testing.assert_allclose(draws.value, 2 * (x0 - np.asarray(NUMBERS)[:, None]) / 2.0 / 5, rtol=1e-12)
    np.testing.assert_allclose(draws.info["x0"][:, 0], x0, rtol=1e-12)


class Question(Guidance):
    """Asks for another label once the first prediction is known, where that is positive."""

    def slots(self):
        return Slot("first"), Slot("second", cond="asked", ask=self.ask)

    def ask(self, preds, ctx, carry):
        return preds["first"].x0[0] > 0, (ctx.cond + 1) % 3

    def init(self, x):
        return None

    def needs(self, carry, ctx):
        return {"first": True}

    def combine(self, preds, ctx, carry):
        return preds["first"].x0 + jnp.where(preds["second"].present, preds["second"].x0, 100.0), carry, {}


@pytest.mark.parametrize("skip", ["dynamic", "compact"])
def test_two_stages(skip):
    table = gd.ddim(np.array([1.0, 0.0]))
    start = jnp.array([[-8.0, 0.0], [2.0, 1.0], [-9.0, 3.0], [-4.0, 0.0]])
    calls = []
    sampler = gk.Sampler(table, Question(), skip=skip)
    draws = gk.sample(sampler, labeled(calls), 4, key=jr.key(0), cond=NUMBERS, x_init=start)
    jax.effects_barrier()
    x, label = np.asarray(start), np.asarray(NUMBERS)[:, None]
    predict = lambda c: c + 1 + (x - c - 1) / 2
    asked = predict(label)[:, :1] > 0
    np.testing.assert_allclose(
        draws.value, predict(label) + np.where(asked, predict((label + 1) % 3), 100.0), rtol=1e-6
    )
    np.testing.assert_array_equal(draws.nfe_logical, 1 + asked[:, 0])
    assert len(calls) == int(draws.nfe.sum()) == 4 + (4 if skip == "dynamic" else 1)


def test_unknown_names_in_a_plan():
    class Wrong(Guidance):
        def slots(self):
            return (Slot("main"),)

        def init(self, x):
            return None

        def needs(self, carry, ctx):
            return {"mian": True}

        def combine(self, preds, ctx, carry):
            return preds["main"].x0, carry, {}

    with pytest.raises(ValueError, match="mian"):
        draw(Wrong())
    with pytest.raises(ValueError, match="asked"):
        Slot("a", cond="nul")


# The carry.


def test_the_carry_is_written_once_per_step():
    draws = draw(Blend())
    table = gd.heun(GRID)
    # Correctors read what the predictor of their step wrote.
    np.testing.assert_array_equal(draws.info["evaluations"][0], table.step + table.corrector)
    np.testing.assert_array_equal(draws.info["corrector"][0], table.corrector)
    assert draws.info["evaluations"].shape == (4, table.num_rows)


# Step transforms.


class Shift(StepTransform):
    """Adds to the state and counts, at the start or at the end of steps."""

    amount: jax.Array
    at: str = eqx.field(static=True)

    def init(self, x):
        return jnp.zeros(len(x), jnp.int32)

    def active(self, ctx):
        return ctx.step < 3

    def __call__(self, x, carry, ctx, step):
        return x + self.amount * (1 + 0 * ctx.sigma), carry + 1


def by_hand(table, start, when):
    """DDIM by hand with the shift; `table` is that of DDIM."""
    x = np.asarray(start, np.float64)
    for i, (s, t) in enumerate(itertools.pairwise(GRID)):
        x = x + 0.5 if when == "start" and i < 3 else x
        x0 = x / (1 + s**2)
        x = x0 + t / s * (x - x0)
        x = x + 0.5 if when == "end" and i < 3 else x
    return x


@pytest.mark.parametrize("when", ["start", "end"])
def test_transforms_act_at_starts_and_ends_of_steps(when, x64):
    start = jnp.asarray(5 * np.random.default_rng(0).normal(size=(4, 2)))
    shift = Shift(jnp.asarray(0.5), when)
    unconditional = lambda x, sigma, cond=None: x / (1 + sigma**2)
    run = lambda table: gk.sample(table, unconditional, 4, key=jr.key(0), x_init=start, guidance=shift).value
    np.testing.assert_allclose(run(gd.ddim(GRID)), by_hand(None, start, when), rtol=1e-12)
    # A predictor-corrector of order 1 whose every correction is linear: the shift moves the corrected state along.
    still = lambda x, sigma, cond=None: 0.0 * x
    for table in (gd.heun(GRID[:-1]), gd.unipc(GRID[:-1]), gd.dpmpp(GRID[:-1], 3, warm_start=True)):
        value = gk.sample(table, still, 4, key=jr.key(0), x_init=start, guidance=shift).value
        levels = GRID[:3] if when == "start" else GRID[1:4]
        expected = np.asarray(start) * GRID[-2] / GRID[0] + 0.5 * np.sum(GRID[-2] / levels)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_transforms_step_with_the_guided_denoiser_and_count():
    class Back(StepTransform):
        """One guided step back up and down again, in the first two steps."""

        at: str = eqx.field(static=True, default="end")

        def init(self, x):
            return None

        def active(self, ctx):
            return ctx.step < 2

        def __call__(self, x, carry, ctx, step):
            up = step(x, ctx.sigma, ctx.sigma_start, net=weak)
            return step(up, ctx.sigma_start, ctx.sigma), carry

    weak_calls, calls = [], []
    weak = labeled(weak_calls)
    table = gd.ddim(GRID)
    hooks = (gk.guidance.cfg(2.0), Back())
    draws = draw(hooks, table=table, calls=calls)
    assert draws.nfe.tolist() == draws.nfe_logical.tolist() == [2 * 5 + 2 * (1 + 2)] * 4
    assert len(calls) == 4 * (10 + 4) and len(weak_calls) == 4 * 2
    off = draw((gk.guidance.cfg(1.0), Back()), table=table)
    assert off.nfe.tolist() == [5 + 2 * 2] * 4


def test_transforms_leave_no_trace_when_idle():
    never = Shift(jnp.asarray(9.0), "end")
    never = eqx.tree_at(lambda s: s.amount, never, jnp.asarray(0.0))
    np.testing.assert_allclose(draw((Blend(), never)).value, draw(Blend()).value, rtol=1e-6, atol=1e-7)


# Populations.


class Reverse(Population):
    """Reverses the order of the particles after every step, and remembers what it saw."""

    num_particles: int = eqx.field(static=True)

    def init(self, x):
        return {"steps": jnp.zeros((), jnp.int32), "kept": jnp.zeros(())}

    def update(self, event, carry, ctx):
        assert event.x.shape == event.x_prev.shape == event.x0.shape == (self.num_particles, 2)
        kept = jnp.sum(event.x_prev * 0 + ctx.sigma)
        return jnp.arange(self.num_particles)[::-1], {"steps": carry["steps"] + 1, "kept": kept}

    def report(self, carry):
        return {"steps": carry["steps"], "level": carry["kept"]}


@pytest.mark.parametrize("batch_size", [None, 2, 4])
def test_population_permutes_everything(batch_size):
    # A step of UniPC uses base, history and carry: reversing all of them after each of five steps reverses the draws.
    table = gd.unipc(GRID)
    cond = jnp.array([0, 0, 1, 1, 2, 2])
    run = lambda g, **kw: gk.sample(table, labeled(), 6, key=jr.key(0), shape=(2,), cond=cond, guidance=g, **kw)
    plain = run(Blend())
    mixed = run((Blend(), Reverse(2)), batch_size=batch_size)
    swapped = np.asarray(plain.value).reshape(3, 2, 2)[:, ::-1].reshape(6, 2)
    np.testing.assert_allclose(mixed.value, swapped, rtol=1e-5, atol=1e-6)
    assert mixed.info["steps"].tolist() == [5] * 3
    np.testing.assert_allclose(mixed.info["level"], 0.0)
    assert mixed.info["evaluations"].shape == (6, 5)
    padded = 0 if batch_size is None else -6 % batch_size
    assert int(mixed.nfe.sum()) == (6 + padded) * int(plain.nfe[0])


def test_population_sees_the_step_from_start_to_end():
    class Watch(Population):
        num_particles: int = eqx.field(static=True)

        def init(self, x):
            return {"start": x, "end": x, "x0": x, "aux": jnp.zeros(len(x)), "step": jnp.zeros((), jnp.int32)}

        def update(self, event, carry, ctx):
            seen = {"start": event.x_prev, "end": event.x, "x0": event.x0, "step": ctx.step}
            return jnp.arange(self.num_particles), seen | {"aux": 1.0 * event.aux["corrector"]}

        def report(self, carry):
            return carry

    table = gd.heun(GRID[:-1])
    run = lambda g: gk.sample(table, labeled(), 4, key=jr.key(0), shape=(2,), cond=0, guidance=g, trajectory=True)
    draws = run((Blend(), Watch(4)))
    states = np.asarray(draws.trajectory)
    np.testing.assert_allclose(draws.info["start"][0], states[:, -2], rtol=1e-6)
    np.testing.assert_allclose(draws.info["end"][0], states[:, -1], rtol=1e-6)
    assert int(draws.info["step"][0]) == 3 and (draws.info["aux"] == 1.0).all()
    assert np.isfinite(draws.info["x0"]).all() and (draws.info["x0"] != 0).all()


def test_population_blocks_are_checked():
    pair = Reverse(2)
    with pytest.raises(ValueError, match="num_samples"):
        draw(pair, n=3, cond=0)
    with pytest.raises(ValueError, match="batch_size"):
        gk.sample(gd.ddim(GRID), labeled(), 4, key=jr.key(0), shape=(2,), guidance=pair, batch_size=3)
    with pytest.raises(ValueError, match="same within each population"):
        draw(pair, cond=jnp.array([0, 1, 0, 0]))


def test_hooks_are_sorted():
    shift, pair = Shift(jnp.asarray(1.0), "end"), Reverse(2)
    hooks = collect_hooks([shift, Blend(), pair, shift])
    assert isinstance(hooks.guidance, Blend) and len(hooks.transforms) == 2 and hooks.population is pair
    again = collect_hooks((hooks, shift))
    assert len(again.transforms) == 3
    for two, says in (((Blend(), Blend()), "at most one `Guidance`"), ((pair, pair), "at most one population")):
        with pytest.raises(ValueError, match=says):
            collect_hooks(two)


def test_guidance_is_differentiable():
    def loss(scale):
        guidance = gk.guidance.interval(gk.guidance.cfg(scale), 0.2, 2.0)
        return jnp.sum(draw(guidance, table=gd.ddim(GRID)).value ** 2)

    gradient = jax.grad(loss)(jnp.asarray(2.0))
    slope = (loss(2.01) - loss(1.99)) / 0.02
    np.testing.assert_allclose(gradient, slope, rtol=2e-2)
