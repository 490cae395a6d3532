"""The cone: a ring-shaped posterior that no mean-field guide can follow.

What: `x, y ~ N(0, 10)`, `z ~ N(x^2 + y^2, 0.1 + (x^2 + y^2) / 100)` observed at 5.
Source: Becker et al., "Probabilistic Programming with Programmable Variational Inference", PLDI 2024, section 7.
Expected: log evidence -5.3232; the best mean-field ELBO is -8.0745, the best five-sample bound of that family -7.538.
Cost: `genkit infer` with `samplers/vi_meanfield.py` a few seconds.
"""

import numpyro
import numpyro.distributions as dist

import genkit as gk


def model(z):
    """Two coordinates and their noisy squared radius."""
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    y = numpyro.sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    numpyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=z)


problem = gk.Problem(model, args=(5.0,), name="cone")
