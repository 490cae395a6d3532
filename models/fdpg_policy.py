"""An autoregressive policy moved to an unnormalized target by f-DPG.

What: sequences of eight bits; the target prefers those that read the same backwards, by a factor of e^2. The policy is
a gated recurrent unit; the Jensen-Shannon divergence is followed by its score-function gradient, with a running
normalizer and baseline.
Source: Go et al., "Aligning Language Models with Preferences through f-divergence Minimization", ICML 2023.
Cost: ten seconds on two cores.
Expect: log_z 5.88, its exact value; under the target 0.330 of the sequences are palindromes (0.0625 before).
"""

import jax
import jax.numpy as jnp

import genkit as gk


LENGTH, BONUS = 8, 2.0


def target(word):
    """Log of the unnormalized target of one sequence."""
    same = jnp.all(word == word[::-1])
    return jnp.where(same, BONUS, 0.0)


recipe = gk.distill.policy_recipe(
    gk.distill.AutoregressivePolicy(2, LENGTH, width=32, key=jax.random.key(0)),
    target,
    divergence=gk.divergence.JensenShannon(),
    num_steps=1_000,
    num_draws=256,
    name="f-DPG",
)
