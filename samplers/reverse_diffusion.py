"""Reverse diffusion in 120 evaluations: each noising step is undone as it was made.

What: the predictor of score-based models without its corrector; `gk.diffusion.euler_maruyama` is its like in time.
Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
equation 46.
Cost: 120 evaluations.
Expect: varied draws; `sa.py` reaches them in a sixth of the evaluations.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.reverse_diffusion(gk.diffusion.karras(120, 0.02, 80.0)))
