"""Contract cases of the networks."""

import jax.numpy as jnp
import jax.random as jr
from contract import Case

import genkit as gk


def on(*shape, cond=None):
    return lambda net: net(jr.normal(jr.key(1), shape), jnp.asarray(0.3), cond)


CASES = [
    Case("MLP", lambda: gk.nn.MLP((3,), width=8, depth=2, key=jr.key(0)), on(3)),
    Case("MLP, labels", lambda: gk.nn.MLP((3,), width=8, depth=1, num_labels=4, key=jr.key(0)), on(3, cond=2)),
    Case("MLP, no label", lambda: gk.nn.MLP((3,), width=8, depth=1, num_labels=4, key=jr.key(0)), on(3)),
    Case("UNet", lambda: gk.nn.UNet((1, 4, 4), widths=(4, 8), key=jr.key(0)), on(1, 4, 4), eager=False, rtol=1e-4),
    Case("DiT", lambda: gk.nn.DiT((1, 4, 4), width=16, depth=1, key=jr.key(0)), on(1, 4, 4), eager=False, rtol=1e-4),
    Case(
        "ConditionEmbedding",
        lambda: gk.nn.ConditionEmbedding(8, num_labels=3, key=jr.key(0)),
        lambda embed: embed(jnp.asarray(0.3), 1),
    ),
]
