"""Ancestral sampling in 60 evaluations.

What: each level is drawn from the posterior given the predicted data, as DDPM does.
Source: Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, algorithm 2.
Cost: 60 evaluations.
Expect: varied draws, a few percent short in variance.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.ancestral(gk.diffusion.karras(60, 0.02, 80.0)))
