"""Four NUTS chains: `genkit infer models/eight_schools.py --sampler samplers/nuts.py`."""

import genkit as gk


sampler = gk.mcmc.NUTS(num_warmup=1000, num_samples=1000, num_chains=4, target_accept=0.9)
