"""The lower half of digits, given the upper half of one, by RePaint.

What: the known half is put in place at every step; every stretch of two steps is drawn four times, so that both halves
agree. The known digit is the first held-out one; put another in `known`.
Source: Lugmayr et al., "RePaint: Inpainting Using Denoising Diffusion Probabilistic Models", CVPR 2022, algorithm 1.
Cost: 100 evaluations.
Expect: digits that share their upper half, for any model of `gk.data.digits()`.
"""

import numpy as np

import genkit as gk


known = gk.data.digits().x_test[0]
mask = np.zeros((1, 8, 8))
mask[:, :4] = 1

table = gk.diffusion.repaint(gk.diffusion.karras(28, 0.02, 80.0), jump=2, num_resamples=4, sigma_lo=0.05)
sampler = gk.Sampler(table, gk.diffusion.Replacement(mask, known))
