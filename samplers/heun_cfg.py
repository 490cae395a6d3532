"""Heun's method with classifier-free guidance at scale 1.5.

What: the deterministic second-order sampler on Karras' grid; guidance where it helps, at intermediate noise.
Source: Karras et al., NeurIPS 2022, algorithm 1; Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022;
Kynkaanniemi et al., "Applying Guidance in a Limited Interval", NeurIPS 2024.
Cost: 35 evaluations, and one more for each within the interval.
Expect: labels of digits right in more than 99 of 100 draws.
"""

import genkit as gk


sampler = gk.Sampler(
    gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0)),
    # At higher noise guidance costs diversity, at lower noise it changes nothing.
    guidance=gk.guidance.interval(gk.guidance.cfg(1.5), 0.05, 5.0),
)
