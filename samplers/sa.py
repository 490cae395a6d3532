"""SA-Solver: a stochastic multistep method in 20 evaluations.

What: third-order predictor and corrector on the reverse diffusion, noise only between the levels 0.05 and 1.
Source: Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", NeurIPS 2023.
Cost: 20 evaluations.
Expect: the variety of ancestral sampling at the cost of a deterministic method.
"""

import genkit as gk


grid = gk.diffusion.karras(20, 0.02, 80.0)
sampler = gk.Sampler(gk.diffusion.sa(grid, order=3, tau=lambda sigma: float(0.05 < sigma < 1.0)))
