"""Draw paths of a trained latent SDE.

What: simulates the learned distribution of the latent path at 50 equal times, two steps between them.
Source: the step of `gk.sde.FractionalSDE`.
Cost: 200 drift calls a path.
Expect: draws of shape (50, d), d latent coordinates.
"""

import genkit as gk


sampler = gk.sde.PathSampler(50, steps_per_interval=2)
