"""A training step of `gk.fit` beside the same step written by hand in JAX, Equinox and Optax.

Run with `-m benchmark` on a quiet machine. Both sides are compiled before the clock starts; the runs alternate, and the
fastest of each side counts, so that other work on the machine cancels.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.scipy.special import ndtri

import genkit as gk


CHUNK, CHUNKS, BATCH, DECAY, DROPOUT = 100, 10, 128, 0.998, 0.1
OPTIMIZER = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, 4000, 2e-5), weight_decay=1e-2)


def network(key):
    return gk.nn.MLP((1, 8, 8), width=256, depth=3, num_labels=10, key=key)


def by_hand(x_train, y_train, sigma_data):
    """EDM denoising score matching on digits, as one would write it for one model: the function to time."""
    net, static = eqx.partition(network(jr.key(0)), eqx.is_inexact_array)

    def loss(net, key_batch, key):
        index = jr.randint(key_batch, (BATCH,), 0, len(x_train))
        key_level, key_noise, key_drop = jr.split(key, 3)
        key_shift, key_order = jr.split(key_level)
        quantile = (jr.uniform(key_shift) + jnp.arange(BATCH) / BATCH) % 1
        quantile = jnp.clip(quantile, 2.0**-25, 1 - 2.0**-24)
        sigma = jnp.exp(-1.2 + 1.2 * ndtri(jr.permutation(key_order, quantile)))
        labels = jnp.where(jr.bernoulli(key_drop, DROPOUT, (BATCH,)), -1, y_train[index])
        x0 = x_train[index]
        x = x0 + sigma[:, None, None, None] * jr.normal(key_noise, x0.shape)

        def denoise(x, sigma, label):
            norm = jnp.sqrt(sigma_data**2 + sigma**2)
            output = eqx.combine(net, static)(x / norm, jnp.log(sigma) / 4, label)
            return (sigma_data / norm) ** 2 * x + sigma * sigma_data / norm * output

        squares = jnp.sum((jax.vmap(denoise)(x, sigma, labels) - x0) ** 2, axis=(1, 2, 3))
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        return jnp.mean(weight * squares)

    def step(carry, _):
        net, opt, ema, count = carry
        key_batch, key_loss = jr.split(jr.fold_in(jr.key(1), count))
        value, gradient = jax.value_and_grad(loss)(net, key_batch, key_loss)
        updates, opt = OPTIMIZER.update(gradient, opt, net)
        net = optax.apply_updates(net, updates)
        rate = 1 - jnp.minimum(DECAY, (1 + count) / (10 + count))
        ema = jax.tree.map(lambda m, x: m + rate * (x - m), ema, net)
        return (net, opt, ema, count + 1), value

    chunk = jax.jit(lambda carry: jax.lax.scan(step, carry, None, CHUNK), donate_argnums=0)

    def run():
        start = jax.tree.map(jnp.copy, net)
        carry, losses = (start, OPTIMIZER.init(start), jax.tree.map(jnp.copy, net), jnp.array(0)), []
        for _ in range(CHUNKS):
            carry, values = chunk(carry)
            losses.append(np.asarray(values))
        return np.concatenate(losses)

    return run


def by_genkit(x_train, y_train, sigma_data):
    recipe = gk.Recipe(
        build=lambda key: gk.diffusion.Preconditioned(network(jr.key(0)), "F", sigma_data=sigma_data),
        data=gk.data.Batches((x_train, y_train), batch_size=BATCH),
        phases=gk.Phase(gk.diffusion.DenoisingScoreMatching(cond_dropout=DROPOUT), OPTIMIZER),
        num_steps=CHUNK * CHUNKS,
        ema=DECAY,
        log_every=CHUNK,
    )
    return lambda: gk.fit(recipe, key=jr.key(1)).log["loss"]


@pytest.mark.benchmark
@pytest.mark.timeout(1200)
def test_a_training_step_costs_what_it_costs_by_hand():
    digits = gk.data.digits()
    arguments = jnp.asarray(digits.x_train), jnp.asarray(digits.y_train), float(digits.x_train.std())
    sides = {"by hand": by_hand(*arguments), "genkit": by_genkit(*arguments)}
    final = {name: np.mean(run()[-CHUNK:]) for name, run in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(5):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / (CHUNK * CHUNKS))
    best = {name: 1e6 * min(values) for name, values in times.items()}
    ratio = best["genkit"] / best["by hand"]
    print(f"\nby hand {best['by hand']:.0f} us, gk.fit {best['genkit']:.0f} us a step, ratio {ratio:.3f}")
    # The same work: the losses of the last hundred steps agree to a few percent (the draws differ).
    assert final["genkit"] == pytest.approx(final["by hand"], rel=0.1)
    assert ratio <= 1.05
