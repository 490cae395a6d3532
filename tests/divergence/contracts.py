"""Contract cases of distances between samples."""

import jax.numpy as jnp
import jax.random as jr
from contract import Case

import genkit as gk


d = gk.divergence


def rows(cost):
    return cost.map_rows(lambda row, i: jnp.sum(row) + i), cost.transpose().map_rows(lambda row, i: jnp.max(row))


def state():
    cost = d.MatrixCost(jnp.arange(4.0).reshape(2, 2))
    return d.sinkhorn_potentials(cost, jnp.log(jnp.full(2, 0.5)), jnp.log(jnp.full(2, 0.5)), 1.0)


CASES = [
    Case("MatrixCost", lambda: d.MatrixCost(jr.uniform(jr.key(0), (3, 4))), rows),
    Case("PointCost", lambda: d.PointCost(jr.normal(jr.key(0), (3, 2)), jr.normal(jr.key(1), (4, 2))), rows),
    Case("SinkhornState", state),
]
