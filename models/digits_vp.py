"""Variance-preserving diffusion of handwritten digits with the `v` prediction.

What: a residual perceptron on a variance-preserving schedule, trained by denoising score matching on the 1,400 training
digits of `gk.data.digits()`.
Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021; Salimans
and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", ICLR 2022 (`v`).
Cost: a minute on two cores.
Expect: a model for `samplers/pc_langevin.py`, `samplers/inpaint.py` and every table.
"""

import optax

import genkit as gk


NUM_STEPS = 4_000

digits = gk.data.digits()


def build(key):
    """The denoiser before training."""
    net = gk.nn.MLP((1, 8, 8), width=256, depth=3, num_labels=10, key=key)
    return gk.diffusion.Preconditioned(net, "v", sigma_data=float(digits.x_train.std()), schedule=gk.diffusion.VP())


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches((digits.x_train, digits.y_train), batch_size=128),
    phases=gk.Phase(
        gk.diffusion.DenoisingScoreMatching(cond_dropout=0.1),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, NUM_STEPS, 2e-5), weight_decay=1e-2),
    ),
    num_steps=NUM_STEPS,
    ema=0.998,
    name="digits_vp",
)
