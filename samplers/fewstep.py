"""Two evaluations of a consistency model or a distilled denoiser, with fresh noise between.

What: denoise from the highest level, add noise of a low level, denoise again.
Source: Song et al., "Consistency Models", ICML 2023, algorithm 1.
Cost: 2 evaluations.
Expect: finer detail than one evaluation, where the student was trained at both levels.
"""

import genkit as gk


sampler = gk.distill.Renoise([2.5, 0.5])
