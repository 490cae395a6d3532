"""Class-conditional diffusion model of handwritten digits.

What: a residual perceptron of 0.8 million weights under EDM preconditioning, trained by denoising score matching on the
1,400 training digits of `gk.data.digits()`; a tenth of the labels is dropped, so that it serves guidance.
Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022, table 1.
Cost: half a minute on two cores.
Expect: `genkit demo` trains this file and judges it.
"""

import optax

import genkit as gk


NUM_STEPS = 4_000

digits = gk.data.digits()
sigma_data = float(digits.x_train.std())


def build(key):
    """The denoiser before training."""
    net = gk.nn.MLP((1, 8, 8), width=256, depth=3, num_labels=10, key=key)
    return gk.diffusion.Preconditioned(net, "F", sigma_data=sigma_data)


recipe = gk.Recipe(
    build=build,
    data=gk.data.Batches((digits.x_train, digits.y_train), batch_size=128),
    phases=gk.Phase(
        gk.diffusion.DenoisingScoreMatching(cond_dropout=0.1),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 2e-3, 100, NUM_STEPS, 2e-5), weight_decay=1e-2),
    ),
    num_steps=NUM_STEPS,
    ema=0.998,
    name="digits",
)
