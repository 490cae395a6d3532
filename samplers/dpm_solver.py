"""Single-step DPM-Solver of third order in 22 evaluations.

What: three evaluations in each step and no memory of the steps before, so that no start is needed.
Source: Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
NeurIPS 2022, algorithm 2.
Cost: 22 evaluations.
Expect: the draws of `flow_ode.py` to a hundredth; multistep methods need fewer evaluations.
"""

import genkit as gk


sampler = gk.Sampler(gk.diffusion.dpm_solver(gk.diffusion.log_uniform(8, 0.02, 80.0), order=3))
