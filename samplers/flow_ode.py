"""The probability flow solved adaptively to a tolerance.

What: a fifth-order Runge-Kutta pair in the angle chart, each draw with steps of its own.
Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
equation 13.
Cost: 60 to 120 evaluations.
Expect: the draws that every deterministic table converges to.
"""

import genkit as gk


sampler = gk.diffusion.probability_flow(0.02, 80.0, rtol=1e-4, atol=1e-4)
