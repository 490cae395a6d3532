"""Where a filter loses digits, and what it must refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import pytest

import genkit as gk
import genkit.noise as gn
import genkit.sde as gs


TS = np.array([0.2, 0.5, 0.6, 1.0])
Y = np.stack([np.sin(3 * TS), np.cos(TS)], 1)
NOISE = gs.GaussianNoise(0.1)
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])
STIFF = (3.0, 100.0, 1e4)


def pulled(rates, turn=None):
    """Two coordinates pulled to 0 at `rates`, seen from axes turned by an orthogonal matrix."""
    lift, scale = gn.ma_fbm(5, 0.05, 1e3), gs.Constant(0.7)
    if turn is None:
        return gs.FractionalSDE(gs.OrnsteinUhlenbeck(rates), scale, lift, 0.3, 1.0, x0=np.zeros(2))
    matrix = jnp.asarray(turn) @ jnp.diag(rates) @ jnp.asarray(turn).T
    drift = lambda t, x: -matrix.astype(x.dtype) @ x
    return gs.FractionalSDE(drift, scale, lift, 0.3, 1.0, x0=np.zeros(2))


def stiff_values():
    """Exact steps of each coordinate; the same rates unknown to the compiler; the same process from turned axes."""
    exact = [float(gs.kalman(pulled(jnp.array([0.5, q])), gs.Observed(TS, Y, NOISE))) for q in STIFF]
    unknown = jax.jit(lambda r: gs.kalman(pulled(r), gs.Observed(TS, Y, NOISE)))
    turned = jax.jit(lambda r: gs.kalman(pulled(r, TURN), gs.Observed(TS, Y @ TURN.T, NOISE)))
    return exact, *([float(f(jnp.array([0.5, q]))) for q in STIFF] for f in (unknown, turned))


@pytest.mark.slow
def test_coupled_and_stiff_drift_in_float32():
    exact, unknown, turned = stiff_values()
    np.testing.assert_allclose(unknown, exact, rtol=1e-5)
    np.testing.assert_allclose(turned, exact, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_coupled_and_stiff_drift():
    exact, unknown, turned = stiff_values()
    np.testing.assert_allclose(unknown, exact, rtol=1e-8)
    np.testing.assert_allclose(turned, exact, rtol=1e-7)


@pytest.mark.slow
def test_precise_observations_in_float32():
    """Weights of the linear guide stay equal where beside the observations' precision 1 is lost to rounding."""
    ts = np.arange(1, 21) / 20

    @jax.jit
    def weights(y, deviation, hurst):
        observed = gs.Observed(ts, y, gs.GaussianNoise(deviation))
        sde = gs.FractionalSDE(gs.OrnsteinUhlenbeck(0.0), gs.Constant(1.0), gn.ma_fbm(), hurst, 1.0)
        guide = gs.LinearGuide(sde, observed)
        return gs.log_weights(sde, guide, observed, num_particles=32, key=jr.key(0)), gs.kalman(sde, observed)

    for hurst, deviation in ((0.1, 1e-3), (0.1, 1e-4), (0.3, 1e-4), (0.7, 1e-4)):
        values, exact = weights(gn.fbm(hurst, ts, key=jr.key(1)), deviation, hurst)
        assert values.std() < 0.05, (hurst, deviation)
        assert abs(values.mean() - exact) < 0.01, (hurst, deviation)


def model(drift, diffusion=0.7, horizon=1.0, x0=0.0, **kwargs):
    diffusion = gs.Constant(diffusion) if isinstance(diffusion, float) else diffusion
    return gs.FractionalSDE(drift, diffusion, gn.brownian(), 0.5, horizon, x0=x0, **kwargs)


OU = gs.OrnsteinUhlenbeck(1.0)


@pytest.mark.parametrize(
    ("law", "match"),
    [
        (lambda x: dist.Normal(x**2, 0.1), "mean affine"),
        (lambda x: dist.Normal(x, 0.1 + abs(x)), "does not depend on x"),
    ],
)
def test_observations_that_no_filter_takes(law, match):
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([0.5, 1.0]), law)
    for evidence in (lambda: gs.kalman(model(OU), observed), lambda: gs.gp_log_evidence(0.5, observed, theta=1.0)):
        with pytest.raises(ValueError, match=match):
            evidence()


@pytest.mark.slow
def test_inside_jit_what_no_filter_takes_is_nan():
    """Where coefficients are traced nothing can be refused beforehand."""
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([0.5, 1.0]), NOISE)
    sine = gs.Observed(observed.ts, observed.y, lambda x: dist.Normal(jnp.sin(x), 0.4))

    @jax.jit
    def values(rate):
        linear, cubic = (model(lambda t, x, p=p: rate * (1.0 - x**p)) for p in (1, 3))
        late = model(lambda t, x: -rate * t * x)
        return (
            gs.kalman(linear, observed),
            gs.kalman(late, observed, steps_per_interval=2),
            gs.kalman(cubic, observed),
            gs.kalman(late, observed),
            gs.kalman(linear, sine),
            gs.gp_log_evidence(0.5, sine, theta=rate),
        )

    assert np.isfinite(values(2.0)).tolist() == [True, True, False, False, False, False]


@pytest.mark.slow
def test_inside_jit_an_exact_step_of_what_is_not_affine_is_nan():
    @jax.jit
    def ends(rate):
        drifts = (lambda t, x: -rate * x, lambda t, x: -rate * x**3, lambda t, x: -rate * (x + x[::-1]))
        sdes = (model(drift, x0=np.ones(2), step="exact") for drift in drifts)
        return [gs.simulate(sde, np.array([0.5, 1.0]), key=jr.key(0)).x for sde in sdes]

    assert [bool(np.isfinite(x).all()) for x in ends(2.0)] == [True, False, False]


def test_evidence_of_the_process_of_known_numbers_is_exact_in_float32():
    """Hundreds of points of a smooth process: float32 would be off by nats."""
    ts = np.arange(1, 401) / 400
    y = np.sin(3 * ts) + 0.02 * np.random.default_rng(0).normal(size=400)
    observed = gs.Observed(ts, y, gs.GaussianNoise(0.02))
    value = gs.gp_log_evidence(gs.LearnedHurst(0.9), observed)
    assert value.dtype == jnp.float32
    power = 1.8
    cov = (ts[:, None] ** power + ts**power - np.abs(ts[:, None] - ts) ** power) / 2 + 0.02**2 * np.eye(400)
    exact = -(y @ np.linalg.solve(cov, y) + np.linalg.slogdet(cov)[1] + 400 * np.log(2 * np.pi)) / 2
    assert abs(value - exact) < 2e-3 * abs(exact) ** 0.5


def test_the_horizon_is_not_learned():
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([0.5, 1.0]), NOISE)
    evidence = lambda horizon: gs.kalman(model(OU, 0.7, horizon), observed)
    assert jax.grad(evidence)(2.0) == 0.0


def test_normal_starts_under_another_name():
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([0.5, 1.0]), NOISE)
    law = dist.Normal(jnp.zeros(1), 1.0)
    np.testing.assert_allclose(
        gs.kalman(model(OU, x0=law.to_event(1)), observed), gs.kalman(model(OU, x0=law), observed), rtol=1e-6
    )


def test_few_effective_paths_are_told():
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([3.0, -3.0]), NOISE)
    blind = gs.NeuralGuide(model(OU), observed, width=4, linear=False, key=jr.key(0))
    with pytest.warns(UserWarning, match="effective paths of 64: the guide misses"):
        gs.forecast(model(OU), blind, observed, np.array([1.0]), num_paths=64, key=jr.key(0))


def test_units_of_observations_do_not_matter():
    """An affine law far from 0 and very precise is still affine."""
    observed = gs.Observed(np.array([0.5, 1.0]), np.array([1e3, 1e3 + 1]), lambda x: dist.Normal(1e3 + 3 * x, 1e-2))
    assert np.isfinite(gs.kalman(model(OU), observed))


@pytest.mark.parametrize("horizon", [1e-2, 1.0, 1e6])
def test_what_is_affine_does_not_depend_on_the_clock(horizon):
    """A cubic drift of equal effect on every clock, and a diffusion that grows tenfold over each."""
    observed = gs.Observed(np.array([0.5, 1.0]) * horizon, np.array([0.5, 0.4]), NOISE)
    cubic = model(lambda t, x: -10 / horizon * x**3, 1.0 / horizon**0.5, horizon, 2.0)
    growing = model(lambda t, x: 0 * x, lambda t, x: (1 + 9 * t / horizon) / horizon**0.5, horizon)
    linear = model(lambda t, x: 3 / horizon * (5.0 - x), 1.0 / horizon**0.5, horizon, 2.0)
    with pytest.raises(ValueError, match="`drift` must be affine"):
        gs.kalman(cubic, observed)
    with pytest.raises(ValueError, match="`drift` must be affine in x; got"):
        gs.kalman(cubic, observed, steps_per_interval=2)
    with pytest.raises(ValueError, match="`diffusion` must be constant"):
        gs.kalman(growing, observed)
    assert np.isfinite(gs.kalman(growing, observed, steps_per_interval=2))
    np.testing.assert_allclose(
        gs.kalman(linear, observed),
        gs.kalman(
            model(lambda t, x: 3.0 * (5.0 - x), 1.0, 1.0, 2.0),
            gs.Observed(np.array([0.5, 1.0]), np.array([0.5, 0.4]), NOISE),
        ),
        rtol=1e-4,
    )


def test_a_path_that_cannot_be_linearized_along():
    observed = gs.Observed(np.arange(1.0, 11.0), np.zeros(10), NOISE)
    with pytest.raises(gk.NonFiniteError, match=r"blew up in step \d+ .* state before it"):
        gs.LinearGuide(model(lambda t, x: x**3, 1.0, 10.0, 1.0), observed)


@pytest.mark.slow
def test_a_plan_for_other_steps_is_not_used():
    """As many steps of other lengths: prepared anew where that can be seen, NaN where not."""
    observed = gs.Observed(np.array([0.1, 1.0]), np.array([1.0, -1.0]), NOISE)
    sde = model(OU, 1.0)
    bound = lambda guide: gs.elbo(sde, guide, observed, max_step=0.1, key=jr.key(0), num_particles=64)
    other, right = gs.LinearGuide(sde, observed, steps_per_interval=5), gs.LinearGuide(sde, observed, max_step=0.1)
    inside = jax.jit(lambda: bound(gs.LinearGuide(sde, observed, steps_per_interval=5)))
    np.testing.assert_allclose([bound(other), inside(), eqx.filter_jit(bound)(right)], float(bound(right)), rtol=1e-4)
    assert np.isnan(eqx.filter_jit(bound)(other))


@pytest.mark.slow
def test_a_neural_guide_knows_no_later_times():
    """Its law up to the last observation does not depend on how far a path goes on; afterwards it does not steer."""
    ts = np.array([0.5, 1.0])
    sde = gs.FractionalSDE(OU, gs.Constant(1.0), gn.ma_fbm(3, 0.1, 100.0), 0.7, 2.0)
    guide = gs.NeuralGuide(sde, gs.Observed(ts, np.array([0.3, 0.9]), NOISE), width=8, linear=False, key=jr.key(0))
    last = lambda g: g.control.layers[-1].weight
    guide = eqx.tree_at(last, guide, jr.normal(jr.key(1), last(guide).shape))
    draw = lambda guide, ts: jax.jit(jax.vmap(lambda k: gs.simulate(sde, ts, guide=guide, max_step=0.1, key=k)))(
        jr.split(jr.key(2), 8)
    )
    short, long = draw(guide, ts), draw(guide, np.array([0.5, 1.0, 2.0]))
    np.testing.assert_allclose(long.x[:, :2], short.x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(long.log_weight, short.log_weight, rtol=1e-4, atol=1e-4)
