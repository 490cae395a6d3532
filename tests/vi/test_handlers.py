"""numpyro's handlers around and inside every loop and branch: numpyro's density, or the closed form, or a refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond as numpyro_cond, scan as numpyro_scan
from numpyro.infer.reparam import LocScaleReparam

from genkit import vi


pytestmark = pytest.mark.usefixtures("x64")

Y = np.array([0.5, 1.0, -1.0, 2.0, 1.5, 0.7, 0.2, 1.1])
SIZE = len(Y)
MASK = np.array([True, False, True, True, False, True, True, False])
WEIGHTS = np.linspace(0.5, 2.0, SIZE)
NORMAL = dist.Normal(0.0, 1.0)


# --- eight observations in each kind of loop ----------------------------------------------------------------------


def statement(a, y=None):
    return numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def in_plate(a, inside):
    with numpyro.plate("n", SIZE), inside():
        statement(a)


def in_scan(a, inside):
    def body(carry, _):
        with inside():
            statement(a)
        return carry, None

    vi.scan(body, 0.0, None, length=SIZE)


def in_vmap(a, inside):
    def lane(_):
        with inside():
            return statement(a)

    vi.vmap(lane)(np.arange(SIZE))


def in_numpyro_scan(a, inside):
    def body(carry, _):
        with inside():
            statement(a)
        return carry, None

    numpyro_scan(body, 0.0, None, length=SIZE)


LOOPS = {"plate": in_plate, "vi.scan": in_scan, "vi.vmap": in_vmap, "numpyro scan": in_numpyro_scan}


def nothing():
    return handlers.infer_config(config_fn=lambda site: {})


def log_lik(a, mask=True, scale=1.0):
    return jnp.sum(jnp.where(mask, scale * dist.Normal(a, 1.0).log_prob(Y), 0.0))


TRACE = {"y": {"type": "sample", "name": "y", "value": Y, "is_observed": False, "infer": {}}}
OUTSIDE = {
    "condition": (lambda: handlers.condition(data={"y": jnp.asarray(Y)}), log_lik),
    "condition by function": (
        lambda: handlers.condition(condition_fn=lambda site: Y if site["name"] == "y" else None),
        log_lik,
    ),
    "substitute": (lambda: handlers.substitute(data={"y": Y}), log_lik),
    "replay": (lambda: handlers.replay(trace=TRACE), log_lik),
}
AROUND = {
    "mask": (lambda: handlers.mask(mask=MASK), lambda a: log_lik(a, mask=MASK)),
    "mask of all": (lambda: handlers.mask(mask=False), lambda a: jnp.zeros(())),
    "scale": (lambda: handlers.scale(scale=WEIGHTS), lambda a: log_lik(a, scale=WEIGHTS)),
    "scale of all": (lambda: handlers.scale(scale=2.0), lambda a: log_lik(a, scale=2.0)),
    "infer_config": (nothing, log_lik),
    "seed": (lambda: handlers.seed(rng_seed=0), log_lik),
    "block of another": (lambda: handlers.block(hide=["other"]), log_lik),
}


def check_cell(model, want):
    """Density and gradient at a point, numpyro's own density, and the bound at a draw of the guide."""
    measure = vi.program(model)()
    joint = lambda a: NORMAL.log_prob(a) + want(a)
    got = jax.value_and_grad(lambda a: measure.log_density({"a": a}))(0.2)
    np.testing.assert_allclose(got, jax.value_and_grad(joint)(0.2), rtol=1e-10)

    def guide():
        return vi.sample("a", dist.Normal(0.3, 0.5))

    def bound_and_draw():
        a, log_q = vi.draw(vi.program(guide)())
        return measure.log_density(a) - log_q - (joint(a["a"]) - log_q)

    np.testing.assert_allclose(vi.E(bound_and_draw)(key=jax.random.key(0)), 0.0, atol=1e-10)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", OUTSIDE)
def test_values_from_outside_are_cut_to_the_step(loop, handler):
    around, want = OUTSIDE[handler]

    def model():
        a = numpyro.sample("a", NORMAL)
        with around():
            LOOPS[loop](a, nothing)

    check_cell(model, want)
    if handler == "condition":
        value, _ = numpyro.infer.util.log_density(model, (), {}, {"a": 0.2})
        np.testing.assert_allclose(vi.program(model)().log_density({"a": 0.2}), value, rtol=1e-10)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("handler", AROUND)
def test_handlers_around_a_loop(loop, handler):
    around, want = AROUND[handler]

    def model():
        a = numpyro.sample("a", NORMAL)
        with around(), handlers.condition(data={"y": Y}):
            LOOPS[loop](a, nothing)

    check_cell(model, want)


@pytest.mark.parametrize("loop", LOOPS)
def test_condition_of_a_program(loop):
    """The case of an array of observations in a loop: every step sees its own entry."""

    def model():
        LOOPS[loop](numpyro.sample("a", NORMAL), nothing)

    posterior = vi.condition(vi.program(model)(), {"y": Y})
    np.testing.assert_allclose(posterior.log_density({"a": 0.0}), NORMAL.log_prob(0.0) + log_lik(0.0), rtol=1e-12)
    latent = vi.program(model)().log_density({"a": 0.0, "y": Y})
    np.testing.assert_allclose(latent, NORMAL.log_prob(0.0) + log_lik(0.0), rtol=1e-12)


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "plate"])
def test_handlers_inside_a_body(loop):
    """One value, mask or scale for every step."""
    rows = {
        "condition": (lambda: handlers.condition(data={"y": 0.7}), 1.0),
        "substitute": (lambda: handlers.substitute(data={"y": 0.7}), 1.0),
        "mask": (lambda: handlers.mask(mask=False), 0.0),
        "scale": (lambda: handlers.scale(scale=3.0), 3.0),
        "block": (lambda: handlers.block(), 0.0),
        "infer_config": (nothing, 1.0),
    }
    for name, (inside, factor) in rows.items():

        def model(inside=inside):
            with handlers.condition(data={"y": 0.7}):
                LOOPS[loop](numpyro.sample("a", NORMAL), inside)

        want = NORMAL.log_prob(0.2) + factor * SIZE * dist.Normal(0.2, 1.0).log_prob(0.7)
        if name == "block":
            with pytest.raises(TypeError, match="key"):
                vi.program(model)().log_density({"a": 0.2})
            got = vi.program(model)().log_density({"a": 0.2}, key=jax.random.key(0))
        else:
            got = vi.program(model)().log_density({"a": 0.2})
        np.testing.assert_allclose(got, want, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("scan", [vi.scan, numpyro_scan])
def test_walks_observed_at_the_first_steps_only(scan):
    """Steps without a value stay latent: forecasts of an autoregressive model."""
    given = 5

    def model():
        def body(carry, _):
            y = numpyro.sample("y", dist.Normal(0.8 * carry, 1.0))
            return y, None

        scan(body, jnp.zeros(()), None, length=SIZE)

    want = jnp.sum(dist.Normal(0.8 * np.concatenate([[0.0], Y[:-1]]), 1.0).log_prob(Y))
    short = vi.condition(vi.program(model)(), {"y": Y[:given]})
    np.testing.assert_allclose(short.log_density({"y": Y[given:]}), want, rtol=1e-12)
    value, log_density = short.sample(key=jax.random.key(0))
    assert value["y"].shape == (SIZE - given,)
    np.testing.assert_allclose(short.log_density(value), log_density, rtol=1e-12)
    whole = vi.condition(vi.program(model)(), {"y": Y})
    np.testing.assert_allclose(whole.log_density({}), want, rtol=1e-12)
    around = vi.program(handlers.condition(model, {"y": Y[:given]}))()
    np.testing.assert_allclose(around.log_density({"y": Y[given:]}), want, rtol=1e-12)

    def guide():
        with numpyro.plate("rest", SIZE - given):
            vi.sample("y", dist.Normal(0.3, 1.2))

    def gap():
        drawn, log_q = vi.draw(vi.program(guide)())
        whole = jnp.concatenate([Y[:given], drawn["y"]])
        means = 0.8 * jnp.concatenate([jnp.zeros(1), whole[:-1]])
        return short.log_density(drawn) - jnp.sum(dist.Normal(means, 1.0).log_prob(whole)) + 0 * log_q

    np.testing.assert_allclose(vi.E(gap)(key=jax.random.key(0)), 0.0, atol=1e-10)
    assert np.isfinite(vi.E(lambda: vi.elbo(short, vi.program(guide)()))(key=jax.random.key(0)))


@pytest.mark.parametrize("scan", [vi.scan, numpyro_scan])
def test_interventions_reach_every_step(scan):
    """`do` puts values in and leaves fresh sites behind, as it does in a Python loop."""

    def model():
        def body(carry, _):
            y = numpyro.sample("y", dist.Normal(0.8 * carry, 1.0))
            return y, None

        with handlers.do(data={"y": Y}):
            last, _ = scan(body, jnp.zeros(()), None, length=SIZE)
        numpyro.sample("z", dist.Normal(last, 1.0))

    fresh = np.linspace(-1.0, 1.0, SIZE)
    got = vi.program(model)().log_density({"y": fresh, "z": 0.4})
    means = 0.8 * np.concatenate([[0.0], Y[:-1]])
    want = jnp.sum(dist.Normal(means, 1.0).log_prob(fresh)) + dist.Normal(Y[-1], 1.0).log_prob(0.4)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("scan", [vi.scan, numpyro_scan])
@pytest.mark.parametrize("place", ["around", "inside"])
def test_reparametrized_sites_in_loops(scan, place):
    def handler():
        return handlers.reparam(config={"x": LocScaleReparam(0.0)})

    def model():
        def body(carry, _):
            with handler() if place == "inside" else nothing():
                x = numpyro.sample("x", dist.Normal(carry, 2.0))
            return x, None

        with handler() if place == "around" else nothing():
            last, _ = scan(body, jnp.zeros(()), None, length=3)
        numpyro.sample("z", dist.Normal(last, 1.0), obs=0.4)

    steps = np.array([0.3, -0.2, 1.0])
    want = jnp.sum(NORMAL.log_prob(steps)) + dist.Normal(2.0 * steps.sum(), 1.0).log_prob(0.4)
    np.testing.assert_allclose(vi.program(model)().log_density({"x_decentered": steps}), want, rtol=1e-12)


def test_parameters_lifted_inside_a_loop_are_refused():
    def model():
        def body(carry, _):
            return carry + numpyro.param("w", 1.0), None

        with handlers.lift(prior={"w": NORMAL}):
            vi.scan(body, 0.0, None, length=3)

    with pytest.raises(ValueError, match="`lift` must not surround a loop.*'w'"):
        vi.program(model)().sample(key=jax.random.key(0))


@pytest.mark.parametrize("branch", [vi.cond, lambda p, t, f: numpyro_cond(p, lambda _: t(), lambda _: f(), None)])
def test_handlers_around_branches(branch):
    rows = {
        "condition": (lambda: handlers.condition(data={"y": 0.7}), 1.0),
        "substitute": (lambda: handlers.substitute(data={"y": 0.7}), 1.0),
        "mask": (lambda: handlers.mask(mask=False), 0.0),
        "scale": (lambda: handlers.scale(scale=3.0), 3.0),
        "infer_config": (nothing, 1.0),
        "seed": (lambda: handlers.seed(rng_seed=0), 1.0),
    }
    for name, (around, factor) in rows.items():

        def model(around=around):
            a = numpyro.sample("a", NORMAL)
            with around(), handlers.condition(data={"y": 0.7}):
                branch(a > 0, lambda: statement(a), lambda: statement(2 * a))

        for a in (0.2, -0.4):
            mean = a if a > 0 else 2 * a
            want = NORMAL.log_prob(a) + factor * dist.Normal(mean, 1.0).log_prob(0.7)
            got = vi.program(model)().log_density({"a": jnp.array(a)})
            np.testing.assert_allclose(got, want, rtol=1e-10, err_msg=name)


def test_branches_that_scale_one_site_differently():
    def model():
        a = numpyro.sample("a", NORMAL)

        def scaled():
            with handlers.scale(scale=3.0):
                return statement(a, 0.7)

        vi.cond(a > 0, scaled, lambda: statement(a, 0.7))

    for a, factor in ((0.2, 3.0), (-0.2, 1.0)):
        want = NORMAL.log_prob(a) + factor * dist.Normal(a, 1.0).log_prob(0.7)
        np.testing.assert_allclose(vi.program(model)().log_density({"a": jnp.array(a)}), want, rtol=1e-12)


def test_loops_in_loops_take_stacked_values():
    values = np.arange(6.0).reshape(2, 3)

    def model():
        def outer(carry, _):
            vi.vmap(lambda w: w * numpyro.sample("x", NORMAL))(np.ones(3))
            return carry, None

        vi.scan(outer, 0.0, None, length=2)

    want = jnp.sum(NORMAL.log_prob(values))
    np.testing.assert_allclose(vi.program(model)().log_density({"x": values}), want, rtol=1e-12)
    np.testing.assert_allclose(vi.condition(vi.program(model)(), {"x": values}).log_density({}), want, rtol=1e-12)
    with pytest.raises(ValueError, match=r"'x'.*\(2, 3\).*got shape \(4, 3\)"):
        vi.condition(vi.program(model)(), {"x": np.zeros((4, 3))}).log_density({})


def test_control_flow_of_another_kind_raises():
    """A canary: numpyro's messages are known by the argument names of its public functions."""

    def strange(pred, body, start):
        return None

    def model():
        numpyro.primitives.apply_stack(
            {"type": "control_flow", "fn": strange, "args": (1, 2, 3), "kwargs": {}, "value": None}
        )

    with pytest.raises(RuntimeError, match="Control flow"):
        vi.program(model)().log_density({})


# --- shapes that broadcast to more than was meant -----------------------------------------------------------------


def weigh(model):
    return vi.program(model)().log_density({})


ROW = np.array([0.1, 0.2, 0.3, 0.4])


def test_observations_that_the_site_would_broadcast_are_refused():
    batch = dist.Normal(jnp.zeros(4), 1.0)
    event = batch.to_event(1)
    for law, obs in (
        (batch, ROW[:, None]),
        (batch, ROW[:3]),
        (event, 0.5),
        (event, ROW[:, None]),
        (dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)), ROW[:3, None]),
        (batch.mask(np.ones((4, 1), bool)), ROW),
    ):
        with pytest.raises(ValueError, match="`obs` at site 'y' must have the shape"):
            weigh(lambda law=law, obs=obs: numpyro.sample("y", law, obs=obs))


def test_observations_that_hold_the_site_are_right():
    want = jnp.sum(NORMAL.log_prob(ROW))
    for law in (NORMAL, dist.Normal(jnp.zeros(4), 1.0), dist.Normal(jnp.zeros(1), 1.0)):
        np.testing.assert_allclose(weigh(lambda law=law: numpyro.sample("y", law, obs=ROW)), want, rtol=1e-12)

    one = weigh(lambda: numpyro.sample("y", dist.Normal(jnp.zeros(4), 1.0), obs=0.5))
    np.testing.assert_allclose(one, 4 * NORMAL.log_prob(0.5), rtol=1e-12)

    def masked():
        with handlers.mask(mask=np.array([True, True, False, True])):
            numpyro.sample("y", NORMAL, obs=ROW)

    np.testing.assert_allclose(weigh(masked), jnp.sum(NORMAL.log_prob(ROW[[0, 1, 3]])), rtol=1e-12)


def test_scales_and_masks_that_would_broadcast_are_refused():
    def scaled():
        with handlers.scale(scale=np.ones((4, 1))):
            numpyro.sample("y", dist.Normal(jnp.zeros(4), 1.0), obs=ROW)

    def masked():
        with handlers.mask(mask=np.ones((4, 1), bool)):
            numpyro.sample("y", dist.Normal(jnp.zeros(4), 1.0), obs=ROW)

    def short():
        with handlers.mask(mask=np.ones(2, bool)):
            numpyro.sample("y", dist.Normal(jnp.zeros(4), 1.0), obs=ROW)

    with pytest.raises(ValueError, match=r"`scale` at site 'y'.*\(4,\).*\(4, 1\)"):
        weigh(scaled)
    with pytest.raises(ValueError, match="`obs` at site 'y'.*mask included"):
        weigh(masked)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - JAX's own words, with a note of ours
        weigh(short)
    assert "'y'" in "".join(caught.value.__notes__)


# --- names --------------------------------------------------------------------------------------------------------


def test_names_with_equal_checksums_draw_different_numbers():
    def model():
        return numpyro.sample("plumless", NORMAL), numpyro.sample("buckeroo", NORMAL)

    value, _ = vi.program(model)().sample(key=jax.random.key(0))
    assert value["plumless"] != value["buckeroo"]
    drawn = []

    def both():
        value, _ = vi.draw(vi.program(model)())
        drawn.append(value)
        return value["plumless"]

    vi.E(both)(key=jax.random.key(0))
    assert drawn[0]["plumless"] != drawn[0]["buckeroo"]
