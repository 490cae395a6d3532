"""A five-sample bound, for any mix of sites: leave-one-out baselines where there is no pathwise gradient."""

import functools

import genkit as gk


objective = functools.partial(gk.vi.iwelbo, num_particles=5)
sampler = gk.vi.Fit("full_rank", objective=objective, num_steps=3000, num_samples=2000)
