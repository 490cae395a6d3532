"""Schrödinger bridge from a Gaussian to the two interleaved half circles.

What: a light bridge of 24 full-covariance components at epsilon = 0.1; paths, plan and likelihoods in closed form.
Source: Korotin, Gushchin, Burnaev, "Light Schrödinger bridge", ICLR 2024; start and covariances are genkit's own.
Cost: about ten seconds on two cores.
Expect: an energy distance of transported points to fresh moons below 0.01.
"""

import jax

import genkit as gk


key_source, key_target = jax.random.split(jax.random.key(0))
x0 = 0.6 * jax.random.normal(key_source, (8_000, 2))
x1 = gk.data.two_moons(8_000, key=key_target)

recipe = gk.bridge.recipe(x0, x1, 0.1, 24, scale="full", num_steps=3_000, name="bridge_moons")
