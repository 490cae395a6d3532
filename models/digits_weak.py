"""A weak model of handwritten digits: narrower than `models/digits.py` and trained a tenth as long.

What: the same data, conditions and preconditioning with a perceptron of width 64 and 400 steps; the bad version of
itself that autoguidance (`gk.guidance.autoguide`) and reflection (`gk.guidance.reflect`) ask for.
Source: Karras et al., "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024, section 4.
Cost: a few seconds on two cores.
Expect: `gk.guidance.autoguide(gk.load("runs/digits_weak").ema, 2.0)` guides the run of `models/digits.py`.
"""

import optax

import genkit as gk


NUM_STEPS = 400

digits = gk.data.digits()
sigma_data = float(digits.x_train.std())


def build(key):
    """The denoiser before training."""
    net = gk.nn.MLP((1, 8, 8), width=64, depth=3, num_labels=10, key=key)
    return gk.diffusion.Preconditioned(net, "F", sigma_data=sigma_data)


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches((digits.x_train, digits.y_train), batch_size=128),
    phases=gk.Phase(
        gk.diffusion.DenoisingScoreMatching(cond_dropout=0.1),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, NUM_STEPS, 2e-5), weight_decay=1e-2),
    ),
    num_steps=NUM_STEPS,
    ema=0.99,
    name="digits_weak",
)
