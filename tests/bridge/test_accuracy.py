"""What fitted bridges reach: generated pairs, robustness over seeds, real data. Slow or long."""

import functools
import itertools
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from bridge.helpers import rotated_pair

import genkit as gk


# cBW2-UVP of the published solver on the published benchmark (the same mixture construction, other pairs).
LIGHTSB = {
    (2, 0.1): 0.03, (16, 0.1): 0.08, (64, 0.1): 0.28,
    (2, 1.0): 0.05, (16, 1.0): 0.09, (64, 1.0): 0.24,
    (2, 10.0): 0.07, (16, 10.0): 0.11, (64, 10.0): 0.21,
}  # fmt: skip
PUBLISHED_RATE = {0.1: 1e-3, 1.0: 3e-3, 10.0: 6e-2}
CEILING = {2: 0.05, 16: 0.25, 64: 0.5}
# In the plane 50 diagonal components do well at epsilon = 1: KL .0028 against our .0006, which is what 20,000 pairs
# allow (34 numbers / 40,000 = .0009 in expectation).
SHORT = pytest.mark.xfail(strict=True, raises=AssertionError, reason="4.7 times lower, not 5")
ROWS = list(itertools.product((2, 16, 64), (0.1, 1.0, 10.0)))


def tell(figures):
    """Figures for whoever runs with `-s`."""
    sys.stdout.write(f"{figures}\n")
    sys.stdout.flush()


def scores(pair, bridge, judge):
    y0, y1 = judge
    uvp = float(gk.bridge.cbw2_uvp(bridge, pair.bridge, y0[:300], y1))
    return uvp, float(gk.bridge.plan_kl(pair.bridge, bridge, y0, y1))


def chosen_components(x0, x1, epsilon):
    """K by the objective on a fifth of the fitting pairs given, after short fits to the rest; no judging data."""
    held, cut = {}, 4 * len(x0) // 5
    for k in (3, 5, 8):
        bridge, _ = gk.bridge.fit_light(
            x0[:cut], x1[:cut], epsilon, k, scale="full", num_steps=300, polish=40, key=jr.key(3)
        )
        held[k] = float(bridge.objective(x0[cut:], x1[cut:]))
    return min(held, key=held.get)


@functools.cache
def generated_pair_figures(d, epsilon):
    """cBW2-UVP in percent and divergence of the plans in nats: ours, and the divergence of the published recipe.

    20,000 fitting pairs (50,000 at d = 64), judging data apart, K chosen within the fitting data.

    The pairs and all samples are drawn from seeds no setting was tuned on. Columns: d,
    epsilon, n, K; ours (cBW2-UVP in percent, divergence of the plans in nats, CPU seconds); the published recipe on
    the same data; LightSB's published cBW2-UVP; up to d = 16 also our divergence without the polish, and with it
    when the ends are n points each of which no two are coupled (there the sampling errors of the marginals add up).
    """
    n, polish = {2: (20_000, 300), 16: (20_000, 150), 64: (50_000, 60)}[d]
    # At d = 64 a choice among 8,000 pairs took three components for five: there all pairs choose, judged on a pair
    # that was not seen before.
    seed, choosing = (20_311, 10_000) if d < 64 else (20_411, n)
    pair = rotated_pair(d, epsilon, key=jr.key(seed))
    (x0, x1), judge = pair.sample(n, key=jr.key(seed + 1)), pair.sample(40_000, key=jr.key(seed + 2))
    apart, _ = pair.sample(n, key=jr.key(seed + 3))
    k = chosen_components(x0[:choosing], x1[:choosing], epsilon)
    fit = lambda x0, x1, k, **options: gk.bridge.fit_light(x0, x1, epsilon, k, key=jr.key(4), **options)[0]
    full = functools.partial(fit, k=k, scale="full", num_steps=500)
    start = time.process_time()
    ours = full(x0, x1, polish=polish)
    middle = time.process_time()
    rate = PUBLISHED_RATE[epsilon]
    theirs = fit(x0, x1, 50, init="published", start_scale=1.0, num_steps=10_000, learning_rate=rate)
    end = time.process_time()
    (uvp, kl), (their_uvp, their_kl) = scores(pair, ours, judge), scores(pair, theirs, judge)
    others = [full(x0, x1), full(apart, x1, polish=polish)] if d < 64 else []
    rest = " | ".join(f"{scores(pair, bridge, judge)[1]:.4f}" for bridge in others)
    tell(
        f"| {d} | {epsilon} | {n} | {k} | {uvp:.4f} | {kl:.4f} | {middle - start:.0f} "
        f"| {their_uvp:.3f} | {their_kl:.3f} | {end - middle:.0f} | {LIGHTSB[d, epsilon]} | {rest} |"
    )
    return uvp, kl, their_kl


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("d", "epsilon"), ROWS)
def test_generated_pairs_within_the_ceiling(d, epsilon):
    """One row of the table, both tests, is `-k "generated and 16-0.1" -s`."""
    uvp, _, _ = generated_pair_figures(d, epsilon)
    assert uvp <= CEILING[d]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("d", "epsilon"), [pytest.param(*row, marks=[SHORT] if row == (2, 1.0) else []) for row in ROWS]
)
def test_generated_pairs_against_the_published_recipe(d, epsilon):
    _, kl, their_kl = generated_pair_figures(d, epsilon)
    assert kl <= their_kl / 5


@pytest.mark.long
def test_no_collapse_where_the_published_start_collapses():
    """Wide targets at epsilon = .1, 20 seeds: at least K/3 effective components; the published start loses more."""
    k, d = 10, 8
    effective = {"balanced": [], "published": []}
    for seed in range(20):
        key0, key1, key_means, key_fit = jr.split(jr.key(seed), 4)
        means = 8.0 * jr.normal(key_means, (k, d))
        x0 = jr.normal(key0, (2000, d))
        label_key, noise_key = jr.split(key1)
        x1 = means[jr.randint(label_key, (2000,), 0, k)] + jr.normal(noise_key, (2000, d))
        for init, values in effective.items():
            _, report = gk.bridge.fit_light(
                x0, x1, 0.1, k, init=init, num_steps=2000, batch_size=128, key=jr.clone(key_fit),
                learning_rate=2e-2 if init == "balanced" else 1e-2,
            )  # fmt: skip
            values.append(float(report.effective_components))
    tell({name: (round(min(v), 2), round(float(np.median(v)), 2)) for name, v in effective.items()})
    assert min(effective["balanced"]) >= k / 3
    assert min(effective["published"]) < k / 3


def digits_in_components():
    """Threes and eights in the sixteen principal components of the training digits: (train, test), each (x0, x1)."""
    digits = gk.data.digits()
    split = lambda x, y: [np.asarray(x)[np.asarray(y) == label].reshape(-1, 64) for label in (3, 8)]
    train, test = split(digits.x_train, digits.y_train), split(digits.x_test, digits.y_test)
    both = np.concatenate(train)
    axes = np.linalg.svd(both - both.mean(0), full_matrices=False)[2][:16]
    return ([jnp.asarray((x - both.mean(0)) @ axes.T) for x in part] for part in (train, test))


def validated(fits, x0, x1, folds=4):
    """The name of the fit with the lowest objective on points left out, in turns; and every objective."""
    order = [np.random.default_rng(5).permutation(len(x) // folds * folds).reshape(folds, -1) for x in (x0, x1)]
    table = {}
    for name, fit in fits.items():
        values = []
        for i in range(folds):
            rest = [np.delete(rows, i, 0).ravel() for rows in order]
            bridge = fit(x0[rest[0]], x1[rest[1]])
            values.append(float(bridge.objective(x0[order[0][i]], x1[order[1][i]])))
        table[name] = round(float(np.mean(values)), 2)
    return min(table, key=table.get), table


@pytest.mark.long
def test_digits_three_to_eight_in_sixteen_components():
    """Held-out objective better than one full Gaussian and than the published diagonal recipe.

    K and noise are chosen by folds of the training digits; the test digits judge once.
    """
    (x0, x1), (y0, y1) = digits_in_components()
    epsilon = 0.1
    moments = lambda x: (x.mean(0), jnp.cov(x.T))
    single = gk.bridge.gaussian(*moments(x0), *moments(x1), epsilon)
    published, _ = gk.bridge.fit_light(
        x0, x1, epsilon, 10, init="published", num_steps=10_000, learning_rate=1e-2, key=jr.key(0)
    )

    def ours(k, noise):
        options = {"scale": "full", "num_steps": 500, "batch_size": 256, "noise": noise}
        return lambda x0, x1: gk.bridge.fit_light(x0, x1, epsilon, k, key=jr.key(0), **options)[0]

    fits = {(k, noise): ours(k, noise) for k in (1, 2, 3, 5) for noise in (0.2, 0.3, 0.4, 0.5)}
    best, table = validated(fits, x0, x1)
    start = time.process_time()
    fitted = fits[best](x0, x1)
    seconds = time.process_time() - start
    held = {
        name: round(float(bridge.objective(y0, y1)), 2)
        for name, bridge in (("single", single), ("published", published), ("ours", fitted))
    }
    tell({"folds": table, "chosen": best, "held out": held, "CPU seconds of the fit": round(seconds, 1)})
    assert held["ours"] < held["single"]
    assert held["ours"] < held["published"]


@pytest.mark.long
def test_two_routes_meet():
    """Bridge matching from independent pairs finds the bridge of the likelihood route, with more noise."""
    pair = rotated_pair(2, 1.0, key=jr.key(7))
    (x0, x1), judge = pair.sample(20_000, key=jr.key(0)), pair.sample(4000, key=jr.key(1))
    matched, _ = gk.bridge.fit_matching(x0, x1, 1.0, 5, scale="full", num_steps=3000, batch_size=512, key=jr.key(3))
    uvp, kl = scores(pair, matched, judge)
    tell(f"cBW2-UVP {uvp:.4f}, KL {kl:.4f}")
    assert uvp < 0.2 and kl < 0.02
    neural, _ = gk.bridge.sf2m(x0, x1, 1.0, num_steps=1500, key=jr.key(4))
    ends = eqx.filter_jit(lambda b, x: b.sample(x, jnp.array([1.0]), key=jr.key(5))[:, 0])(neural, judge[0])
    assert float(gk.divergence.energy_distance(ends[:2000], judge[1][:2000])) < 0.1


@pytest.mark.long
def test_choosing_components_and_scale():
    """Objective on held-out points above that of the truth, in nats per point: the table of the page on bridges."""
    pair = rotated_pair(16, 1.0, key=jr.key(107))
    (x0, x1), judge = pair.sample(20_000, key=jr.key(100)), pair.sample(4000, key=jr.key(101))
    objective = jax.jit(lambda bridge: bridge.objective(*judge))
    truth, table = float(objective(pair.bridge)), {}
    for scale in ("iso", "diag", "lowrank", "full"):
        for k in (1, 2, 5, 10, 20):
            bridge, _ = gk.bridge.fit_light(
                x0, x1, 1.0, k, scale=scale, num_steps=1000, batch_size=256, rank=4, key=jr.key(4)
            )
            table[scale, k] = float(objective(bridge)) - truth
        tell(f"| {scale} | " + " | ".join(f"{table[scale, k]:.3f}" for k in (1, 2, 5, 10, 20)) + " |")
    assert table["full", 5] < 0.05
    assert min(table["diag", k] for k in (1, 2, 5, 10, 20)) > 5 * table["full", 5]
