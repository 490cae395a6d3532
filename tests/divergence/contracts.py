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


def everything(f):
    u = jnp.array([-1.0, 0.3, 2.0])
    return f.phi(u), f.weight(u), f.reward(u), f.critic(u)


PLAIN = ("ReverseKL", "ForwardKL", "JensenShannon", "SoftenedReverseKL", "SoftenedForwardKL", "SquaredHellinger",
         "PearsonChi2", "NeymanChi2", "Jeffreys", "LeCam")  # fmt: skip

CASES = [
    *(Case(name, getattr(d, name)) for name in PLAIN),
    Case("JensenShannon, used", d.JensenShannon, everything, grad=False, vmap=False),
    Case("Alpha", lambda: d.Alpha(0.4), everything, eager=False),
    Case("TotalVariation", lambda: d.TotalVariation(0.4), everything, eager=False),
    Case("TotalVariation, exact", d.TotalVariation),
    Case("Combination", lambda: 2.0 * d.ForwardKL() + d.LeCam(), everything, eager=False),
    Case("Skewed", lambda: d.ForwardKL().skew(0.3).dual(), everything, eager=False),
    Case("MatrixCost", lambda: d.MatrixCost(jr.uniform(jr.key(0), (3, 4))), rows),
    Case("PointCost", lambda: d.PointCost(jr.normal(jr.key(0), (3, 2)), jr.normal(jr.key(1), (4, 2))), rows),
    Case("SinkhornState", state),
]
