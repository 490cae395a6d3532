"""A multistep method that solves the flow of Gaussian data exactly, in 16 evaluations.

What: third-order extrapolation of the network's own output, in the angle that its preconditioning defines.
Source: Zheng et al., "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics", NeurIPS 2023,
section 3.1, with the coefficients of Gaussian data.
Cost: 16 evaluations.
Expect: no error at all at high noise, where every data set is Gaussian of standard deviation `sigma_data`.
"""

import genkit as gk


data_scale = float(gk.data.digits().x_train.std())
grid = gk.diffusion.angle_uniform(16, 0.02, 80.0, data_scale)
sampler = gk.Sampler(gk.diffusion.rosenbrock(grid, order=3, sigma_data=data_scale))
