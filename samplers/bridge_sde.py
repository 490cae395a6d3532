"""Euler-Maruyama paths of a Schrödinger bridge.

What: simulates dX = drift dt + sqrt(epsilon) dB, for bridges known only by their drift and as a check of the exact way.
Source: Kloeden and Platen, "Numerical Solution of Stochastic Differential Equations", 1992, section 10.2.
Cost: 200 evaluations of the drift per draw.
Expect: an error of weak order one in the step.
"""

import genkit as gk


sampler = gk.bridge.EulerPaths(num_steps=200)
