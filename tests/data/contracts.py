"""Contract cases of data sets and batches."""

import jax.numpy as jnp
import jax.random as jr
from contract import Case

import genkit as gk


def batches(start):
    while True:
        yield jnp.zeros(3)


CASES = [
    Case(
        "Batches",
        lambda: gk.data.Batches((jnp.arange(20.0).reshape(10, 2), jnp.arange(10)), batch_size=4),
        lambda data: data(jr.key(0)),
    ),
    Case(
        "Generated",
        lambda: gk.data.Generated(gk.data.two_moons, batch_size=4),
        lambda data: data(jr.key(0)),
        grad=False,
        vmap=False,  # it has no leaves
    ),
    Case("Host", lambda: gk.data.Host(batches)),
    Case("Digits", gk.data.digits),
]
