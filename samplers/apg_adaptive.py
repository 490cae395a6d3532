"""Three in one: guidance without saturation, at intermediate noise alone, and no longer than it matters.

What: projected guidance at scale 4 in steps that start between 0.1 and 20, draw by draw until the two data predictions
agree; the draws that still need both are evaluated in batches of their own.
Source: Sadat, Hilliges and Weber, ICLR 2025, algorithm 1; Kynkaanniemi et al., NeurIPS 2024; Castillo et al., AAAI
2025, section 4.
Cost: 36 evaluations with DPM-Solver++ in 36 steps, and one more for each that is guided.
Expect: labels of digits right in more than 99 of 100 draws, the contrast of the data.
"""

import genkit as gk


guided = gk.guidance.interval(gk.guidance.apg(4.0, norm_rms=0.15), 0.1, 20.0)
sampler = gk.Sampler(
    gk.diffusion.dpmpp(gk.diffusion.karras(36, 0.002, 80.0)),
    guidance=gk.guidance.adaptive(guided, 0.99),
    skip="compact",
)
