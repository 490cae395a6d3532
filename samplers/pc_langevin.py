"""Predictor-corrector sampling with Langevin steps.

What: reverse-diffusion steps, each followed by one Langevin step whose size follows from the draw's own score.
Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
algorithm 2.
Cost: 119 evaluations.
Expect: draws that do not depend on the rest of their batch, unlike those of the published code.
"""

import genkit as gk


sampler = gk.diffusion.predictor_corrector(gk.diffusion.karras(60, 0.02, 80.0), snr=0.16, num_corrections=1)
