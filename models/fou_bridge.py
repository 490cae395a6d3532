"""Bridge of a fractional Ornstein-Uhlenbeck process: from 0 at time 0 to 0 at time 2.

What: dX = -X dt + dB of Hurst index 0.7, observed at its end alone with error 0.1; the neural guide starts from the
exact control and is trained to keep it. The posterior spread at time 1 is known exactly.
Source: Daems et al., "Variational Inference for SDEs Driven by Fractional Noise", ICLR 2024, section 5.1.
Cost: half a minute on two cores.
Expect: a posterior standard deviation of 0.528 at time 1, and a bound of -0.642 (the exact evidence).
"""

import equinox as eqx
import jax
import numpy as np
import optax

import genkit as gk


observed = gk.sde.Observed(np.array([2.0]), np.array([0.0]), gk.sde.GaussianNoise(0.1))
sde = gk.sde.FractionalSDE(
    gk.sde.OrnsteinUhlenbeck(1.0), gk.sde.Constant(1.0), gk.noise.ma_fbm(), 0.7, 2.0, step="exponential"
)


class Bridge(eqx.Module):
    """The neural guide; `paths` draws from it."""

    guide: gk.sde.NeuralGuide

    def paths(self, ts, num_paths, *, key):
        """Posterior paths, shape (num_paths, len(ts), 1)."""

        def simulate(key):
            return gk.sde.simulate(sde, ts, guide=self.guide, max_step=0.05, key=key).x

        return jax.vmap(simulate)(jax.random.split(key, num_paths))


def build(key):
    """The exact control plus a network that starts at zero."""
    return Bridge(gk.sde.NeuralGuide(sde, observed, width=32, max_step=0.05, key=key))


def negative_bound(model, batch, *, key):
    """Minus the evidence bound over a few paths."""
    bound = gk.sde.elbo(sde, model.guide, observed, num_particles=32, max_step=0.05, key=key)
    return -bound, {"elbo": bound}


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches(np.zeros((1, 1), np.float32), batch_size=1),
    phases=gk.Phase(negative_bound, optax.adam(1e-3)),
    num_steps=300,
    name="fou bridge",
)
