"""NUTS for a Hurst index with its scale and rate: `genkit infer models/nile.py --sampler samplers/nuts_hurst.py`.

What: four chains with a dense mass matrix, since index, scale and rate of a fractional process are correlated.
Source: Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 15, 2014.
Cost: each leapfrog step is one gradient of the square-root filter.
Expect: r-hat of the index below 1.01; look at its posterior's width before its mean.
"""

import genkit as gk


sampler = gk.mcmc.NUTS(num_warmup=500, num_samples=500, num_chains=4, dense_mass=True)
