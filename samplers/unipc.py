"""UniPC of third order in 12 evaluations.

What: a deterministic predictor-corrector that re-uses each evaluation for the correction.
Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", NeurIPS
2023, algorithms 5 to 8.
Cost: 12 evaluations.
Expect: the smallest error of the shipped samplers at equal evaluations on Gaussian data.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.unipc(gk.diffusion.karras(12, 0.02, 80.0), order=3))
