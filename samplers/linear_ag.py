"""LinearAG: most unconditional predictions are a linear function of past ones, fitted to the model before drawing.

What: classifier-free guidance at scale 2 in the first 20 of 32 DDIM steps, 10 of them with both predictions; ridge
regression on 200 draws fits the coefficients of the others in the call that draws.
Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025,
section 5.
Cost: 42 evaluations instead of 64; once, before drawing, 11 times 200 draws.
Expect: draws of digits that differ from those of plain guidance by about a hundredth.
"""

import genkit as gk


sampler = gk.guidance.LinearSampler(
    gk.diffusion.ddim(gk.diffusion.karras(32, 0.002, 80.0)),
    gk.guidance.cfg(2.0),
    # Step 0 has no past, and at intermediate noise the second prediction is hardest to guess from it.
    true_steps=(0, 4, 8, *range(13, 20)),
    stop=20,
)
