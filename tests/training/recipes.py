"""A small training, as tests and the processes they start and kill use it."""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import genkit as gk
from genkit.training._host import AbstractData


class Squares(gk.Objective):
    """Regression on noisy inputs, so that the objective's key matters."""

    def __call__(self, model, batch, *, key):
        x, y = batch
        noise = 0.1 * jax.random.normal(key, x.shape)
        return jnp.mean((jax.vmap(model)(x + noise) - y) ** 2), {"size": jnp.mean(x**2)}


class Rows(eqx.Module):
    """Random rows of a table."""

    x: jax.Array
    batch_size: int = eqx.field(static=True)

    def __call__(self, key):
        rows = self.x[jax.random.randint(key, (self.batch_size,), 0, len(self.x))]
        return rows, jnp.sin(rows)


class Counted(AbstractData):
    """Batches made in Python, each by its number."""

    limit: int = eqx.field(static=True, default=10**9)

    def batches(self, start):
        for i in range(start, self.limit):
            x = np.random.default_rng(i).normal(size=(16, 2)).astype(np.float32)
            yield x, np.sin(x)


def build(key):
    return eqx.nn.MLP(2, 2, 8, 1, key=key)


objective, optimizer = Squares(), optax.adam(3e-3)


def recipe(data=None, num_steps=60, **options):
    rows = Rows(jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)), jnp.float32), 16)
    phases = options.pop("phases", gk.Phase(objective, optimizer))
    options = {"ema": 0.99, "log_every": 10} | options
    return gk.Recipe(build, rows if data is None else data, phases, num_steps, **options)


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def same(a, b):
    """Whether all arrays of two results are equal, bit by bit."""
    pairs = list(zip(arrays(a), arrays(b), strict=True))
    return len(pairs) > 0 and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def train_here(run, num_steps, host):
    """Train in a process of its own, with a checkpoint after every compiled call."""
    data = Counted() if host else None
    gk.fit(recipe(data, num_steps, save_every=1), key=jax.random.key(5), run=Path(run), resume=True, progress=False)


if __name__ == "__main__":
    train_here(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "host")
