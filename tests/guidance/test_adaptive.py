"""Adaptive guidance, policies and LinearAG: what is skipped, counted by a callback, and how far the draws move."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


pytestmark = pytest.mark.usefixtures("x64")
gd, gg = gk.diffusion, gk.guidance
NUM = 12
COND = np.arange(NUM) % 4


def law():
    """Four classes of three components in eight dimensions (the bed "G2")."""
    means = np.random.default_rng(0).normal(size=(12, 8))
    return gd.MixtureDenoiser(jnp.ones(12), jnp.asarray(means), jnp.asarray(0.09), labels=np.repeat(np.arange(4), 3))


class Counting:
    """The mixture, noting every evaluated example."""

    shape, num_labels = (8,), 4

    def __init__(self):
        self.law, self.calls = law(), []

    def __call__(self, x, sigma, cond=None):
        jax.debug.callback(lambda _: self.calls.append(cond is None), x)
        return self.law(x, sigma, cond)


TABLE = gd.ddim(gd.karras(32, 0.002, 80.0))


def draw(guidance, *, skip="dynamic", model=None, table=TABLE, n=NUM, key=1, **kwargs):
    sampler = gk.Sampler(table, guidance, skip=skip)
    return gk.sample(sampler, model or law(), n, key=jr.key(key), cond=jnp.asarray(COND[:n]), **kwargs)


def deviation(draws, baseline):
    move = np.linalg.norm(np.asarray(draws.value - baseline.value), axis=1)
    return float(np.mean(move / np.linalg.norm(np.asarray(baseline.value), axis=1)))


@pytest.mark.parametrize(
    "skip", ["compact", *(pytest.param(skip, marks=pytest.mark.slow) for skip in ("dynamic", "phases"))]
)
def test_saves_a_fifth_of_the_evaluations_at_a_deviation_of_a_hundredth(skip):
    model = Counting()
    draws = draw(gg.adaptive(gg.cfg(4.0), 0.99), skip=skip, model=model)
    jax.effects_barrier()
    assert len(model.calls) == int(draws.nfe.sum())
    assert deviation(draws, draw(gg.cfg(4.0))) <= 0.01
    # Gathered, the draws that still need both save a fifth; else the second evaluation ends with the last of the batch.
    saved = 1 - len(model.calls) / (64 * NUM)
    together = (32 - int(np.asarray(draws.nfe_logical).max() - 32)) / 64
    assert saved >= 0.2 if skip == "compact" else saved == together > 0
    assert model.calls.count(False) == 32 * NUM, "the plain prediction in every step"
    # Latched for good, one by one, and not all at once.
    latched = np.asarray(draws.info["latched"])
    assert (np.diff(latched.astype(int), axis=1) >= 0).all() and len(set(latched.sum(axis=1).tolist())) > 2
    np.testing.assert_array_equal(draws.nfe_logical, 64 - latched[:, :-1].sum(axis=1))


@pytest.mark.parametrize(
    "skip", ["compact", *(pytest.param(skip, marks=pytest.mark.slow) for skip in ("dynamic", "phases"))]
)
def test_batched_equals_one_by_one(skip):
    guidance = gg.adaptive(gg.cfg(4.0), 0.99)
    alone, together = draw(guidance, batch_size=1), draw(guidance, skip=skip)
    np.testing.assert_allclose(together.value, alone.value, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(together.nfe_logical, alone.nfe_logical)
    assert len(set(alone.nfe.tolist())) > 2, "mixed latch times"
    assert int(together.nfe.sum()) >= int(alone.nfe.sum()) == int(alone.nfe_logical.sum())


def test_a_threshold_above_one_never_latches():
    never, plain = draw(gg.adaptive(gg.cfg(4.0), 1.1)), draw(gg.cfg(4.0))
    np.testing.assert_allclose(never.value, plain.value, rtol=1e-10)
    assert never.nfe.tolist() == [64] * NUM


def test_a_network_that_cannot_tell_conditions_apart_at_high_noise_is_still_guided():
    # As networks are beyond the noise levels of their training: the predictions agree there, and part below.
    blind = law()
    model = lambda x, sigma, cond=None: blind(x, sigma, None if cond is None else jnp.where(sigma > 20, -1, cond))
    sampler = lambda guidance: gk.Sampler(gd.ddim(gd.karras(16, 0.01, 80.0)), guidance)
    run = lambda guidance: gk.sample(sampler(guidance), model, 4, shape=(8,), cond=COND[:4], key=jr.key(1))
    waiting, literal = (run(gg.adaptive(gg.cfg(4.0), 0.99, hysteresis=h)) for h in (True, False))
    baseline = run(gg.cfg(4.0))
    assert deviation(waiting, baseline) < 0.5 * deviation(literal, baseline)
    assert literal.nfe_logical.tolist() == [17] * 4 and int(waiting.nfe_logical.max()) < 32


@pytest.mark.slow
def test_noise_predictions_agree_at_high_noise():
    # To the letter the published rule latches at once; waiting for a disagreement mends it.
    literal = draw(gg.adaptive(gg.cfg(4.0), 0.991, "eps", hysteresis=False))
    waiting = draw(gg.adaptive(gg.cfg(4.0), 0.991, "eps"))
    baseline = draw(gg.cfg(4.0))
    assert literal.nfe.max() <= 34 and deviation(literal, baseline) > 0.2
    assert float(waiting.nfe_logical.mean()) < 60 and deviation(waiting, baseline) <= 0.01


def test_correctors_neither_latch_nor_learn():
    table = gd.heun(gd.karras(8, 0.01, 20.0))
    draws = draw(gg.adaptive(gg.apg(4.0, momentum=-0.5), 0.9), table=table)
    # A row needs both unless the predictor of an earlier step latched; the corrector follows its own step's predictor.
    latched, corrector = np.asarray(draws.info["latched"]), np.asarray(table.corrector)
    after = latched[:, ~corrector]
    before = np.concatenate([np.zeros((NUM, 1), bool), after[:, :-1]], axis=1)
    both = (~before).sum(axis=1) + (~after[:, : corrector.sum()]).sum(axis=1)
    np.testing.assert_array_equal(draws.nfe_logical, table.num_rows + both)
    assert 0 < both.min() < table.num_rows


@pytest.mark.slow
def test_policies():
    scales = np.where(np.arange(32) < 20, 4.0, 1.0)
    table, steps = draw(gg.cfg(scales)), draw(gg.step_adaptive(gg.cfg(4.0), 20))
    np.testing.assert_allclose(table.value, steps.value, rtol=1e-10)
    assert table.nfe.tolist() == steps.nfe.tolist() == [52] * NUM
    static = draw(gg.cfg(scales), skip="static")
    np.testing.assert_allclose(static.value, table.value, rtol=1e-10)
    assert static.nfe.tolist() == [52] * NUM
    assert deviation(table, draw(gg.cfg(4.0))) < 0.005


def test_tables_of_another_length():
    for guidance in (gg.cfg(np.ones(31)), gg.policy(gg.cfg(2.0), np.ones(33, bool)) >> gg.NormCap()):
        with pytest.raises(ValueError, match=r"one number per step \(32\)"):
            draw(guidance)
    with pytest.raises(ValueError, match="scale"):
        draw(gg.negative(2.0, 1) + gg.cfg(np.ones(31)))


@pytest.mark.slow
def test_policy_search_beats_equal_policies():
    table = gd.ddim(gd.karras(10, 0.01, 20.0))
    fit = gg.search_policy(table, law(), 4.0, 32, cond=np.arange(32) % 4, budget=16.0, num_updates=80, key=jr.key(0))
    policy = draw(gg.cfg(fit.scales), table=table, key=3)
    baseline = draw(gg.cfg(4.0), table=table, key=3)
    assert int(policy.nfe[0]) <= 16
    # Guidance first, the condition alone later: found, not put in.
    assert float(np.asarray(fit.scales)[-2:].max()) <= 1.0
    uniform = draw(gg.cfg(np.where(np.arange(10) % 5 < 3, 4.0, 1.0)), table=table, key=3)
    assert int(uniform.nfe[0]) == 16 and deviation(policy, baseline) < deviation(uniform, baseline)


def line():
    """Two classes on a line, and a table of six steps."""
    pair = gd.MixtureDenoiser(jnp.ones(2), jnp.array([[-1.0], [1.0]]), jnp.array(0.01), labels=np.array([0, 1]))
    return pair, gd.ddim(gd.karras(6, 0.01, 10.0))


def test_a_policy_search_is_a_fit():
    pair, table = line()
    fit = gg.search_policy(table, pair, 3.0, 4, cond=1, budget=9.0, num_updates=3, key=jr.key(0))
    assert isinstance(fit, gk.Fitted) and int(fit.state.step) == int(fit.model.updates) == 3
    assert fit.model.logits.shape == (6, 5) and set(fit.log) == {"loss", "distance", "cost", "entropy"}
    # At the first update all options are alike: two of five take one evaluation, the others two.
    assert fit.log["cost"][0] == pytest.approx(6 * 8 / 5) and fit.log["entropy"][0] == pytest.approx(np.log(5))
    excess = (fit.log["cost"] - 9.0).clip(0) / 9.0
    weighed = 1e-2 * np.arange(3) / 3 * fit.log["entropy"]
    np.testing.assert_allclose(fit.log["loss"], fit.log["distance"] + excess + weighed, rtol=1e-6)
    # The mean of the options 0, 1, 3/2, 3 and 6 in every step: a relaxed policy draws by the mean scale.
    by_hand = lambda scale: gk.sample(table, pair, 4, cond=1, guidance=gg.cfg(scale), key=jr.key(0)).value
    move = np.mean((by_hand(2.3) - by_hand(3.0)) ** 2) / np.mean(by_hand(3.0) ** 2)
    assert fit.log["distance"][0] == pytest.approx(float(move), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cond": None}, "`cond` must be given"),
        ({"cond": [0, 1, 1]}, "`cond` must be a scalar or of length 4"),
        ({"budget": 0.0}, "budget"),
        ({"num_updates": 0}, "num_updates"),
        ({"sampler": gk.Sampler(TABLE, gg.cfg(2.0))}, "without guidance"),
    ],
)
def test_wrong_searches(change, says):
    pair, table = line()
    wanted = {"sampler": table, "cond": 1, "budget": 9.0, "num_updates": 3} | change
    sampler = wanted.pop("sampler")
    with pytest.raises(ValueError, match=says):
        gg.search_policy(sampler, pair, 3.0, 4, key=jr.key(0), **wanted)


# LinearAG.

TRUE = [0, 4, 8, *range(13, 20)]


@pytest.fixture(scope="module")
def fit():
    with jax.enable_x64(True):
        cond = jnp.arange(200) % 4
        return gg.fit_linear_ag(TABLE, law(), gg.cfg(4.0), 200, cond=cond, true_steps=TRUE, stop=20, key=jr.key(5))


def test_linear_ag(fit):
    model = Counting()
    exempt = gg.linear_ag(fit)
    draws = draw(exempt)
    assert fit.num_evaluations == 42 and draws.nfe.tolist() == draws.nfe_logical.tolist() == [42] * NUM
    assert deviation(draws, draw(gg.cfg(4.0))) <= 0.0025
    with pytest.raises(ValueError, match="the model differ"):
        draw(exempt, model=model)


def test_linear_ag_refuses_another_draw(fit):
    other = gd.ddim(gd.karras(32, 0.002, 60.0))
    for name, table in (("the grid", other), ("the table", gd.ddim(gd.karras(32, 0.002, 80.0), eta=0.5))):
        with pytest.raises(ValueError, match=name):
            draw(gg.linear_ag(fit), table=table)
    scaled = gg.LinearFit(gg.cfg(5.0), fit.coefficients, fit.true, fit.stop, fit.error, fit.table, fit.model, fit.scale)
    with pytest.raises(ValueError, match="the scale differ"):
        draw(gg.linear_ag(scaled))


@pytest.mark.slow
def test_linear_ag_is_exact_where_everything_is_linear():
    # Gaussian pairs of equal covariance: the noise predictions differ by a multiple of one fixed vector, which true
    # steps reveal, so that predictions are exact; with corrector rows, too.
    pair = gd.MixtureDenoiser(
        jnp.ones(2), jnp.asarray([[0.0, 0.0], [1.0, 2.0]]), jnp.asarray(0.25), labels=np.array([0, 1])
    )
    away = gg.negative(2.0, 0)
    for table in (gd.ddim(gd.karras(8, 0.05, 5.0)), gd.heun(gd.karras(6, 0.05, 5.0))):
        start = table.num_steps
        cond = jnp.ones(16, int)
        fit = gg.fit_linear_ag(
            table, pair, away, 16, cond=cond, true_steps=[0, 1], stop=start, ridge=1e-14, key=jr.key(0)
        )
        linear = gk.sample(table, pair, 6, cond=1, guidance=gg.linear_ag(fit), key=jr.key(7))
        exact = gk.sample(table, pair, 6, cond=1, guidance=away, key=jr.key(7))
        np.testing.assert_allclose(linear.value, exact.value, rtol=1e-5, atol=1e-6)
        assert int(linear.nfe[0]) == fit.num_evaluations < int(exact.nfe[0])


@pytest.mark.slow
def test_linear_ag_is_stable_over_a_hundred_seeds(fit):
    linear = [draw(gg.linear_ag(fit), key=100 + seed) for seed in range(100)]
    exact = [draw(gg.cfg(4.0), key=100 + seed) for seed in range(100)]
    moves = [deviation(a, b) for a, b in zip(linear, exact, strict=True)]
    # No feedback: without ridge and roll-outs deviations reach 1e7. A draw between two components may change sides,
    # which moves the mean of its batch by hundredths (measured: mean .00105, worst batch .0139).
    assert np.mean(moves) <= 0.0025 and max(moves) < 0.05


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"true_steps": [1, 2]}, "0 among them"),
        ({"true_steps": [0, 4]}, "true_steps"),
        ({"stop": 99}, "stop"),
        ({"ridge": 0.0}, "ridge"),
        ({"guidance": gg.perpneg(2.0, 1)}, "two predictions"),
        ({"sampler": gk.Sampler(TABLE, gg.cfg(2.0))}, "without guidance"),
        ({"lags": -1}, "lags"),
    ],
)
def test_wrong_fits(change, says):
    wanted = {"sampler": TABLE, "guidance": gg.cfg(4.0), "true_steps": [0, 2], "stop": 4} | change
    sampler, guidance = wanted.pop("sampler"), wanted.pop("guidance")
    with pytest.raises(ValueError, match=says):
        gg.fit_linear_ag(sampler, law(), guidance, 8, cond=0, key=jr.key(0), **wanted)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: gg.adaptive(gg.classifier(lambda x, s, c: 0.0, 1.0)), ValueError, "compares two predictions"),
        (lambda: gg.adaptive(gg.cfg(2.0), space="noise"), ValueError, "space"),
        (lambda: gg.adaptive(2.0), TypeError, "guidance"),
        (lambda: gg.adaptive(gg.cfg(2.0), np.nan), ValueError, "threshold"),
        (lambda: gg.policy(gg.cfg(2.0), [1.0, 0.0]), ValueError, "active"),
        (lambda: gg.step_adaptive(gg.cfg(2.0), -1), ValueError, "num_steps"),
        (lambda: gg.linear_ag(3), TypeError, "fit"),
        (lambda: gg.cfg(lambda sigma: sigma), TypeError, "scale"),
    ],
)
def test_wrong_values(make, error, says):
    with pytest.raises(error, match=says):
        make()
