"""Adams-Bashforth of second order on the velocity of straight paths, in 16 evaluations.

What: steps along `x_t = (1 - t) x0 + t eps`, where models trained by flow matching are smoothest.
Source: Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, section 4.1 (the paths).
Cost: 16 evaluations.
Expect: for `models/digits_flow.py` and its like as good as `dpmpp.py`.
"""

import genkit as gk


grid = gk.diffusion.time_uniform(gk.diffusion.CondOT(), 16, t_min=0.02, t_max=0.98)
sampler = gk.Sampler(gk.diffusion.velocity_ab(grid, order=2))
