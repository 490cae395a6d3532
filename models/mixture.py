"""A mixture of three groups: every value belongs to one of them, and the groups are summed out.

What: weights `w ~ Dirichlet(1, 1, 1)`, ordered means with steps `~ Gamma(2, 0.7)`, one spread `s ~ LogNormal(0, 0.5)`,
`z_n ~ Categorical(w)` and `y_n ~ N(means[z_n], s)`. `gk.infer` sums over `z` and draws it afterwards.
Source: written for genkit; 60 values drawn from weights (.2, .5, .3), means 1, 4, 7.5 and spread .8, rounded to .1.
Cost: grows with values times groups.
"""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import genkit as gk


TEXT = """
1.8 2.9 2.9 7.9 2.5 4.3 8.4 7.5 5.6 0.4 -0.8 3.5 3.8 4.1 3.4 4.0 3.4 1.2 6.4 0.6 7.8 3.7 7.0 2.2 7.2 3.4 8.0 3.2 1.1
5.4 -0.2 3.6 3.1 7.9 3.3 1.6 0.3 1.8 4.5 8.3 6.0 3.6 5.0 3.7 2.1 0.4 8.2 6.0 6.5 3.9 1.7 0.2 3.3 4.1 3.2 3.2 1.1 4.5
7.9 6.1
"""
values = jnp.array([float(word) for word in TEXT.split()])


def model(y):
    """A mixture of three normals with ordered means."""
    w = numpyro.sample("w", dist.Dirichlet(jnp.ones(3)))
    # Steps between the means keep the groups from changing names.
    steps = numpyro.sample("steps", dist.Gamma(2.0, 0.7).expand([3]).to_event(1))
    means = numpyro.deterministic("means", jnp.cumsum(steps))
    s = numpyro.sample("s", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("value", y.shape[0]):
        z = numpyro.sample("z", dist.Categorical(w))
        numpyro.sample("y", dist.Normal(means[z], s), obs=y)


problem = gk.Problem(model, args=(values,), name="mixture")
