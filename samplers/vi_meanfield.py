"""Mean-field variational inference with a stopping rule: fast, blind to correlations; look at k-hat."""

import genkit as gk


sampler = gk.vi.Fit("mean_field", num_steps=4000, num_samples=2000, num_particles=8, stop=gk.vi.Plateau())
