"""Adaptive guidance: stop guiding a draw once its two predictions agree.

What: classifier-free guidance at scale 2 until the cosine of the two data predictions reaches 0.9995, draw by draw; the
draws that still need both are evaluated in batches of their own. All digits share much, so that the threshold is high.
Source: Castillo et al., "Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", AAAI 2025.
Cost: about 64 evaluations instead of 72, with DPM-Solver++ in 36 steps.
Expect: draws of digits that differ from those of plain guidance by about a hundredth.
"""

import genkit as gk


sampler = gk.Sampler(
    gk.diffusion.dpmpp(gk.diffusion.karras(36, 0.002, 80.0)),
    guidance=gk.guidance.adaptive(gk.guidance.cfg(2.0), 0.9995),
    skip="compact",
)
