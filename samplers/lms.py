"""The linear multistep method of fourth order in 20 steps.

What: Adams-Bashforth on the predicted noise, with the weights of the grid as it is; the first steps are one-step
methods, so that the order is real.
Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", section III.5.
Cost: 26 evaluations.
Expect: errors that fall with the fourth power of the steps.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.lms(gk.diffusion.karras(20, 0.02, 80.0), order=4, warm_start=True))
