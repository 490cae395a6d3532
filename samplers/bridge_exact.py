"""Exact paths of a Schrödinger bridge.

What: the end point is drawn from the plan, the path from the bridge of the reference; no time steps, no error.
Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024, section 3.2.
Cost: one evaluation of the potential per draw.
Expect: draws exact for the fitted bridge, on any grid.
"""

import genkit as gk


sampler = gk.bridge.ExactPaths(num_steps=20)
