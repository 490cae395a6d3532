"""DEIS of third order with a warm start in 16 evaluations.

What: the predicted noise extrapolated by a polynomial; the first two steps are one-step methods, so that the order is
real.
Source: Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", ICLR 2023.
Cost: 16 evaluations.
Expect: errors that fall with the third power of the steps.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.deis(gk.diffusion.karras(12, 0.02, 80.0), order=3, warm_start=True))
