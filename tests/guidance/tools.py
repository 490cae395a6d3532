"""A mixture whose denoiser counts its evaluations, and one guided prediction without a draw around it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import genkit as gk
from genkit.sampling import Context
from genkit.sampling._runner import Runner


gd, gg = gk.diffusion, gk.guidance
DIM, CLASSES = 3, 4


def mixture():
    """Two components for each of four classes, in three dimensions."""
    means = np.random.default_rng(0).normal(size=(2 * CLASSES, DIM))
    return gd.MixtureDenoiser(jnp.ones(8), jnp.asarray(means), jnp.asarray(0.09), labels=np.repeat(np.arange(4), 2))


def states(n=5, sigma=0.8):
    """Noisy examples and their labels."""
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(n, DIM)) * np.sqrt(1 + sigma**2)), jnp.arange(n) % CLASSES


def predict(guidance, model=None, *, sigma=0.8, sigma_next=0.5, step=2, corrector=False, carry=None, skip="dynamic"):
    """One guided prediction of five examples: values, carry, reports, counts; compiled as in a draw."""
    model = mixture() if model is None else model
    x, cond = states(sigma=sigma)

    @eqx.filter_jit
    def run(guidance, model, carry):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(len(x)))
        level = lambda s: jnp.asarray(s, x.dtype)
        ctx = Context(
            x,
            level(sigma),
            sigma_start=level(sigma),
            sigma_next=level(sigma_next),
            step=jnp.asarray(step),
            num_steps=jnp.asarray(8),
            corrector=jnp.asarray(corrector),
            cond=cond,
            key=keys,
        )
        carry = jax.vmap(guidance.init)(x) if carry is None else carry
        return Runner(model, guidance, skip, False)(ctx, carry)

    return run(guidance, model, carry)


def parts(sigma=0.8, other=None, model=None):
    """Noisy examples, predictions with the condition, without, and with the condition `other`, as numpy arrays."""
    model = mixture() if model is None else model
    x, cond = states(sigma=sigma)
    with_cond = jax.vmap(lambda y, c: model(y, sigma, c))(x, cond)
    without = jax.vmap(lambda y: model(y, sigma))(x)
    away = None if other is None else np.asarray(jax.vmap(lambda y: model(y, sigma, other))(x))
    return np.asarray(x), np.asarray(with_cond), np.asarray(without), away
