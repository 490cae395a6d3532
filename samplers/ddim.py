"""DDIM with a little noise in 30 evaluations.

What: first-order steps with a share `eta` of the ancestral noise.
Source: Song, Meng and Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equation 12.
Cost: 30 evaluations.
Expect: the plain baseline; `dpmpp.py` reaches it in fewer.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.ddim(gk.diffusion.karras(30, 0.02, 80.0), eta=0.2))
