"""Resampling: offspring counts unbiased exactly, the conditional law equal to the law it conditions."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from stats import z_score

from genkit._core._resampling import (
    _ancestors,
    _cumulative,
    conditional_resample,
    effective_sample_size,
    systematic_resample,
)


WEIGHTS = np.array([0.05, 0.4, 0.0, 0.3, 0.25])
LOG_WEIGHTS = np.log(np.where(WEIGHTS > 0, WEIGHTS, 1.0)) + np.where(WEIGHTS > 0, 0.0, -np.inf) + 3.0


def cyclic_law(weights):
    """The exact law of (slot 0, slot 1, ...) under a uniform comb: pieces of V between breakpoints."""
    k = len(weights)
    edges = np.cumsum(weights)[:-1]
    breaks = np.unique(np.concatenate([[0, 1], np.mod(edges[:, None] - np.arange(k) / k, 1).ravel(), np.arange(k) / k]))
    law = {}
    for low, high in itertools.pairwise(breaks):
        points = np.mod((low + high) / 2 + np.arange(k) / k, 1)
        key = tuple(np.searchsorted(np.cumsum(weights), points, side="right").tolist())
        law[key] = law.get(key, 0.0) + high - low
    return law


def test_offspring_are_unbiased_exactly(x64):
    # The average over the shift, by exact integration between the points where an ancestor changes.
    k = len(WEIGHTS)
    cumulative = _cumulative(jnp.asarray(LOG_WEIGHTS))
    breaks = np.unique(np.concatenate([[0, 1], np.mod(k * np.cumsum(WEIGHTS)[:-1], 1)]))
    counts = np.zeros(k)
    for low, high in itertools.pairwise(breaks):
        ancestors = _ancestors(cumulative, ((low + high) / 2 + jnp.arange(k)) / k)
        counts += (high - low) * np.bincount(ancestors, minlength=k)
    np.testing.assert_allclose(counts, k * WEIGHTS, atol=1e-12)


def test_systematic_offspring():
    n, k = 20_000, len(WEIGHTS)
    draws = np.asarray(
        jax.vmap(lambda key: systematic_resample(jnp.asarray(LOG_WEIGHTS), key=key))(jr.split(jr.key(0), n))
    )
    counts = np.stack([(draws == m).sum(axis=1) for m in range(k)], axis=1)
    assert (np.diff(draws, axis=1) >= 0).all()
    assert ((counts >= np.floor(k * WEIGHTS - 1e-6)) & (counts <= np.ceil(k * WEIGHTS + 1e-6))).all()
    assert (counts[:, 2] == 0).all()
    tolerance = z_score(k) * counts.std(axis=0) / np.sqrt(n)
    assert (np.abs(counts.mean(axis=0) - k * WEIGHTS) <= tolerance + 1e-6).all()


@pytest.mark.parametrize("kept", [0, 1, 4])
@pytest.mark.parametrize("slot", [0, 3])
def test_conditional_law(kept, slot):
    # Against the exact conditional law: all slots are alike, so conditioning slot 0 and rotating gives any other.
    n, _k = 20_000, len(WEIGHTS)
    draw = lambda key: conditional_resample(jnp.asarray(LOG_WEIGHTS), kept, key=key, slot=slot)
    draws = np.roll(np.asarray(jax.vmap(draw)(jr.split(jr.key(1), n))), -slot, axis=1)
    assert (draws[:, 0] == kept).all()
    exact = {a: p / WEIGHTS[kept] for a, p in cyclic_law(WEIGHTS).items() if a[0] == kept}
    assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
    found, counts = np.unique(draws, axis=0, return_counts=True)
    # An outcome on the edge of two pieces may appear by rounding; at float32 that is one in a million.
    for row, count in zip(found, counts, strict=True):
        p = exact.get(tuple(row.tolist()), 0.0)
        assert abs(count / n - p) <= z_score(len(exact)) * np.sqrt(p * (1 - p) / n) + 1e-4
    assert {a for a, p in exact.items() if p > 1e-2} <= {tuple(row.tolist()) for row in found}


def test_conditional_average_is_the_unconditional_law():
    # Drawing the kept particle by its weight makes every slot's ancestor follow the weights.
    n, k = 20_000, len(WEIGHTS)

    def draw(key):
        key_kept, key_rest = jr.split(key)
        kept = jr.categorical(key_kept, jnp.asarray(LOG_WEIGHTS))
        return conditional_resample(jnp.asarray(LOG_WEIGHTS), kept, key=key_rest)

    draws = np.asarray(jax.vmap(draw)(jr.split(jr.key(2), n)))
    shares = np.stack([(draws == m).mean(axis=0) for m in range(k)], axis=1)
    tolerance = z_score(k * k) * np.sqrt(WEIGHTS * (1 - WEIGHTS) / n)
    assert (np.abs(shares - WEIGHTS) <= tolerance + 1e-6).all()


def test_effective_sample_size():
    assert effective_sample_size(jnp.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(jnp.array([0.0, -jnp.inf])) == 1
    assert effective_sample_size(jnp.asarray(LOG_WEIGHTS)) == pytest.approx(1 / np.sum(WEIGHTS**2), rel=1e-5)


def test_one_particle_and_many():
    assert systematic_resample(jnp.zeros(1), key=jr.key(0)).tolist() == [0]
    many = systematic_resample(jnp.zeros(100_000), key=jr.key(0))
    np.testing.assert_array_equal(np.sort(many)[[0, -1]], [0, 99_999])


def test_wrong_slot():
    with pytest.raises(ValueError, match="slot"):
        conditional_resample(jnp.zeros(3), 0, key=jr.key(0), slot=3)
