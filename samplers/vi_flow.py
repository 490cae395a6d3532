"""Variational inference with a coupling flow on the unconstrained space: slower, follows bends and correlations."""

import genkit as gk


sampler = gk.vi.Fit("flow", num_steps=4000, num_samples=2000, num_particles=16)
