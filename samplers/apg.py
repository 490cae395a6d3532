"""Adaptive projected guidance: a high scale without saturation.

What: guidance at scale 4 without the part along the prediction, its length limited and with reverse momentum.
Source: Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion
Models", ICLR 2025, algorithm 1.
Cost: 70 evaluations.
Expect: labels of digits right in more than 99 of 100 draws, the contrast of the data.
"""

import genkit as gk


sampler = gk.Sampler(
    gk.diffusion.heun(gk.diffusion.karras(18, 0.002, 80.0)),
    guidance=gk.guidance.apg(4.0, norm_rms=0.15, momentum=-0.5),
)
